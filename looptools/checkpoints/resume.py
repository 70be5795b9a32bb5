"""Find the newest sound checkpoint and go on from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..intervals import highest
from ..middleware.checkpoint import checkpoint
from ..warn import warn
from .files import Manifest, damage, differs, load, read_manifest, readable_manifest
from .identity import identity
from .tree import FORMAT, restore

if TYPE_CHECKING:
    from ..run import Run


def resume(run: Run, path: str | Path | None) -> Path | None:
    """Put *run* where the newest sound checkpoint was saved.

    Args:
        run: A run that has not begun.
        path: A folder, or one file; None for the folder of the run's checkpoint part, of several the one with the
            newest checkpoint.

    Returns:
        The file, or None if the folder holds no checkpoint.

    Raises:
        RuntimeError: If the run has begun, all files are damaged, none was saved at the end of a pass, or the
            file belongs to another pipe.
    """
    cursor = run.cursor
    if cursor.started:
        raise RuntimeError("resume: the run has begun already. Resume first, or call run.reset().")
    place = _own_folder(run) if path is None else Path(path)
    if path is not None and not place.exists():
        raise FileNotFoundError(f"resume: there is no {place}.")
    file, tree = _read(place) if place.is_file() else _newest(place)
    if file is None:
        return None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise RuntimeError(f"resume: {file} is not a checkpoint of a run. Weights alone are loaded by torch.load.")
    if not tree.get("border"):
        raise RuntimeError(f"resume: {file} was saved within a pass; only the end of a pass can be gone on from.")
    restore(run, tree)
    cursor.resumed_from = file
    for part in _parts(run):
        manifest = readable_manifest(part.folder)
        if manifest.run == identity(cursor).id:
            for criterion in part.best:
                _reconcile(run, part.folder, manifest, criterion)
    return file


def _own_folder(run: Run) -> Path:
    """The folder of the run's checkpoint part; of several the one with the newest that can be gone on from."""
    folders = [part.folder for part in _parts(run)]
    if not folders:
        raise RuntimeError("resume: the run has no checkpoint part. Pipe lt.checkpoint(folder) on, or give a path.")
    return max(folders, key=_newest_numbers)


def _parts(run: Run) -> list[checkpoint]:
    return [slot.part for slot in run.cursor.slots if isinstance(slot.part, checkpoint)]


def _newest_numbers(folder: Path) -> tuple[int, int]:
    """Of its checkpoints that can be gone on from, and of all; 0 where no id says that they count as one run's."""
    manifest = read_manifest(folder)
    entries = manifest.checkpoints if manifest.run else []
    numbers = [entry["number"] for entry in entries if entry["border"]]
    return max(numbers, default=0), max((entry["number"] for entry in entries), default=0)


def _read(path: Path) -> tuple[Path | None, Any]:
    return path, load(path)


def _newest(folder: Path) -> tuple[Path | None, Any]:
    """The newest checkpoint of a folder that was saved at a pass's end and is sound."""
    entries = read_manifest(folder).checkpoints
    if not entries:
        return None, None
    candidates = [entry for entry in reversed(entries) if entry["border"]]
    if not candidates:
        raise RuntimeError(
            f"resume: the {len(entries)} checkpoints in {folder} were saved within a pass; only the end of a pass "
            "can be gone on from. Save at lt.rounds(1) or lt.epochs(1)."
        )
    for entry in candidates:
        wrong = damage(folder / entry["file"], entry)
        if not wrong:
            return _read(folder / entry["file"])
        warn(f"resume: {folder / entry['file']} is damaged: {wrong}. Trying the one before.")
    raise RuntimeError(f"resume: every checkpoint in {folder} is damaged. Nothing was changed.")


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
