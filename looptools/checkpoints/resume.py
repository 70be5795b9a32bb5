"""Find the newest sound checkpoint and go on from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..intervals import highest
from ..middleware.checkpoint import checkpoint
from ..warn import warn
from .contents import Refused
from .files import Damaged, damage, differs, set_aside
from .fingerprint import read_words
from .forgetful import forgetful
from .identity import identity
from .loading import load
from .lock import hold
from .manifest import Manifest, read_manifest, readable_manifest, write_manifest
from .tree import FORMATS, restore

if TYPE_CHECKING:
    from ..run import Run


def resume(run: Run, path: str | Path | None, accept: str | Iterable[str] = ()) -> Path | None:
    """Put *run* where the newest sound checkpoint was saved.

    Args:
        run: A run that has not begun.
        path: A folder, or one file; None for the folders of the run's checkpoint parts.
        accept: Words for what may differ; see `fingerprint.WORDS`.

    Returns:
        The file, or None if there is no checkpoint.

    Raises:
        RuntimeError: If the run has begun, all files are damaged, or the file belongs to another run.
    """
    cursor, words = run.cursor, read_words(accept)
    if cursor.started:
        raise RuntimeError("resume: the run has begun already. Resume first, or call run.reset().")
    if path is not None and not Path(path).exists():
        raise FileNotFoundError(f"resume: there is no {path}.")
    own = path is None
    if path is not None and Path(path).is_file():
        file, tree = Path(path), load(path)
    else:
        folders = [Path(path)] if path is not None else _own_folders(run)
        for folder in folders if own else ():
            if folder.exists():
                hold(cursor, folder)  # nobody else may write there, from now on
        found = _newest(folders, own)
        if found is None:
            return None
        file, tree = found
    if not isinstance(tree, dict) or tree.get("format") not in FORMATS:
        raise RuntimeError(
            f"resume: {file} is not a checkpoint of a run of this version. Weights alone: lt.load_weights(model, path)."
        )
    try:
        restore(run, tree, words)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise RuntimeError(f"resume: {file} does not hold what this version saves: {error!r}.") from error
    cursor.resumed_from = file
    for name in forgetful(cursor):
        warn(f"resume: {name} begins anew: what it keeps in local variables is not saved. Fields of a class are.")
    for part in _parts(run):
        manifest = readable_manifest(part.folder)
        if manifest.run == identity(cursor).id:
            for criterion in part.best:
                _reconcile(run, part.folder, manifest, criterion)
    return file


def _parts(run: Run) -> list[checkpoint]:
    return [slot.part for slot in run.cursor.slots if isinstance(slot.part, checkpoint)]


def _own_folders(run: Run) -> list[Path]:
    """The folders of the run's checkpoint parts, that with the newest checkpoint first, and those of the same run."""
    folders = [part.folder for part in _parts(run)]
    if not folders:
        raise RuntimeError("resume: the run has no checkpoint part. Pipe lt.checkpoint(folder) on, or give a path.")
    manifests = {folder: read_manifest(folder) for folder in folders}
    first = max(folders, key=lambda folder: _newest_number(manifests[folder]))
    return [first, *(f for f in folders if f != first and manifests[f].run == manifests[first].run != "")]


def _newest_number(manifest: Manifest) -> int:
    """0 where no id says that the numbers count as one run's."""
    return max((entry["number"] for entry in manifest.checkpoints), default=0) if manifest.run else 0


def _newest(folders: list[Path], own: bool) -> tuple[Path, Any] | None:
    """The newest sound checkpoint of *folders*, which are one run's; damaged ones are said and, if *own*, set aside."""
    entries = [(entry, folder) for folder in folders for entry in read_manifest(folder).checkpoints]
    damaged: list[tuple[Path, dict[str, Any]]] = []
    for entry, folder in sorted(entries, key=lambda found: found[0]["number"], reverse=True):
        file = folder / entry["file"]
        try:
            tree = load(file, "resume", entry)
        except (Damaged, Refused, OSError) as error:
            told = error if isinstance(error, RuntimeError) else f"resume: {file} cannot be read: {error.strerror}."
            warn(f"{told} Trying the one before.")
            damaged.append((folder, entry))
            continue
        for place, its in damaged if own else ():
            _set_aside(place, its)
        return file, tree
    if damaged:
        where = " and ".join(map(str, folders))
        raise RuntimeError(f"resume: every checkpoint in {where} is damaged. Nothing was changed.")
    return None


def _set_aside(folder: Path, entry: dict[str, Any]) -> None:
    """Take a damaged file out of the way, and off the list."""
    manifest = read_manifest(folder)
    manifest.checkpoints = [other for other in manifest.checkpoints if other != entry]
    if set_aside(folder / entry["file"]) is not None or not (folder / entry["file"]).exists():
        with contextlib.suppress(OSError):  # read-only: it is passed over each time
            write_manifest(folder, manifest)


def _reconcile(run: Run, folder: Path, manifest: Manifest, criterion: highest) -> None:
    """Have ``run.best`` say what the best file holds, where that is a better result from behind the checkpoint."""
    metric = criterion.metric
    held = next((entry for entry in manifest.best if entry.get("metric") == metric and entry["rank"] == 1), None)
    if held is None or damage(folder / held["file"], held):
        return
    if differs(folder / held["file"], held):  # written, but the process was killed before it could be listed
        held = load(folder / held["file"])["best"].get(metric, held)
    facts = run.best.get(metric, {})
    if criterion.better(held["value"], facts.get("value")):
        run.best = {
            **run.best,
            metric: {**facts, **{key: held[key] for key in ("value", "epoch", "iteration", "file")}},
        }
