"""Write a checkpoint, keep the last ones and the best ones."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..intervals import highest
from .best import enter, stems, take, weights
from .files import (
    Manifest,
    describe,
    free_name,
    read_manifest,
    require_own,
    serialize,
    stem_of,
    write,
    write_manifest,
)
from .identity import identity
from .tree import capture

if TYPE_CHECKING:
    from ..run import Run


def save(
    run: Run, folder: str | Path, *, keep: int | None = None, best: Sequence[highest] = (), only_best: bool = False
) -> Path | None:
    """Save the run at a boundary; older checkpoints go only once the new one is safe.

    Args:
        run: The run.
        folder: Where to, made if missing.
        keep: How many of the newest stay; None for all.
        best: By what results are ranked: if the newest is among the best so far, it is written to their files as well.
        only_best: Write nothing but these.

    Returns:
        The file; None if only the best are written.

    Raises:
        FileExistsError: If the folder holds another run's checkpoints.
        LookupError: If nobody writes the metric of *best*.
        OSError: If the file cannot be written; what was there stays, and so does ``run.best``.
        RuntimeError: If an iteration is open.
        TypeError: If something cannot be saved, by name.
    """
    cursor, folder = run.cursor, Path(folder)
    if cursor.state is not None and not cursor._counted:
        raise RuntimeError("save: an iteration is open. Finish it first: next(run).")
    folder.mkdir(parents=True, exist_ok=True)
    manifest, own = read_manifest(folder), identity(cursor)
    if manifest.run != own.id:
        require_own(folder, cursor.resumed_from, "save")
    named = stems(best)
    results = [take(run, criterion, folder, named[criterion.metric]) for criterion in best]
    taken = [result for result in results if result is not None]
    if only_best and not taken:
        return None
    ranked = {**run.best, **{result.metric: result.facts for result in taken}}
    name = free_name(stem_of(run.progress), {entry["file"] for entry in manifest.checkpoints})
    number = max([own.number, *(entry["number"] for entry in manifest.checkpoints)]) + (not only_best)
    border = cursor.passes.phase is None
    files = _Files(capture(run, border=border, best=ranked) | {"run": {"id": own.id, "number": number}})
    data = b"" if only_best else files.write(run.model, folder, [name])
    written = [(result, files.write(result.model, folder, result.files)) for result in taken]
    old = [] if only_best else _add(manifest, name, data, number, border, keep, run)
    for result, its_data in written:
        old += enter(manifest, result, describe(its_data))
    manifest.run = own.id
    write_manifest(folder, manifest)
    run.best, own.number = ranked, number  # last, so that after a failure all of it is done again
    for entry in old:
        with contextlib.suppress(OSError):
            (folder / entry["file"]).unlink()
    return None if only_best else folder / name


class _Files:
    """Writes one tree to several files, which differ in the model whose plain weights they hold."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self.tree = tree
        self._data: dict[int, bytes] = {}

    def write(self, model: Any, folder: Path, names: list[str]) -> bytes:
        data = self._data.get(id(model))
        if data is None:
            plain = weights(model)
            data = self._data[id(model)] = serialize(self.tree if plain is None else {**self.tree, "weights": plain})
        for name in names:
            write(folder / name, data)
        return data


def _add(
    manifest: Manifest, name: str, data: bytes, number: int, border: bool, keep: int | None, run: Run
) -> list[dict[str, Any]]:
    """Put a new file into the manifest, and take out those that are to go, which are returned."""
    entries, progress = manifest.checkpoints, run.progress
    facts: dict[str, Any] = {"number": number, "file": name}
    facts |= {"epoch": progress.epoch, "iteration": progress.iteration, "round": progress.round, "border": border}
    entries.append(facts | describe(data))
    newest_border = next((entry for entry in reversed(entries) if entry["border"]), None)
    old = [entry for entry in (entries[:-keep] if keep else []) if entry is not newest_border]
    manifest.checkpoints = [entry for entry in entries if entry not in old]
    return old
