"""Find the newest sound checkpoint and go on from it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..middleware.checkpoint import checkpoint
from .files import damage, load, read_manifest
from .tree import FORMAT, restore

if TYPE_CHECKING:
    from ..run import Run


def resume(run: Run, path: str | Path | None) -> Path | None:
    """Put *run* where the newest sound checkpoint was saved.

    Args:
        run: A run that has not begun.
        path: A folder, or one file; None for the folder of the run's checkpoint part.

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
    return file


def _own_folder(run: Run) -> Path:
    folders = [slot.part.folder for slot in run.cursor.slots if isinstance(slot.part, checkpoint)]
    if not folders:
        raise RuntimeError("resume: the run has no checkpoint part. Pipe lt.checkpoint(folder) on, or give a path.")
    return Path(folders[0])


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
        warnings.warn(f"resume: {folder / entry['file']} is damaged: {wrong}. Trying the one before.", stacklevel=4)
    raise RuntimeError(f"resume: every checkpoint in {folder} is damaged. Nothing was changed.")
