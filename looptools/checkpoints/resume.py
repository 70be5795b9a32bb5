"""Find the newest sound checkpoint and go on from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..archives.contents import Refused
from ..archives.files import Damaged, damage, differs, set_aside
from ..archives.loading import load
from ..intervals import highest
from ..middleware.checkpoint import checkpoint
from ..warn import warn
from .fingerprint import read_words
from .forgetful import forgetful
from .identity import identity
from .lock import hold, let_go
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
    try:
        found = _find(run, None if path is None else Path(path))
        if found is None:
            return None
        file, tree = found
        _go_on(run, file, tree, words)
    except BaseException:
        let_go(cursor)  # which never began
        raise
    cursor.resumed_from = file
    for name in forgetful(cursor):
        warn(f"resume: {name} begins anew: what it keeps in local variables is not saved. Fields of a class are.")
    for part in _parts(run):
        manifest = readable_manifest(part.folder)
        own = identity(cursor)
        if manifest.run == own.id:
            own.number = max(own.number, _newest_number(manifest))  # after an older file, too: the next is the newest
            for criterion in part.best:
                _reconcile(run, part.folder, manifest, criterion)
    return file


def _find(run: Run, path: Path | None) -> tuple[Path, Any] | None:
    """The checkpoint to go on from, loaded. The run's own folders are held from now on: nobody else may write there."""
    if path is not None:
        return (path, load(path)) if path.is_file() else _newest([path], own=False)
    folders = _own_folders(run)
    for folder in folders:
        if folder.exists():
            hold(run.cursor, folder)
    return _newest(folders, own=True)


def _go_on(run: Run, file: Path, tree: Any, words: Iterable[str]) -> None:
    if not isinstance(tree, dict) or tree.get("format") not in FORMATS:
        raise RuntimeError(
            f"resume: {file} is not a checkpoint of a run of this version. Weights alone: lt.load_weights(model, path)."
        )
    try:
        restore(run, tree, words)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RuntimeError(f"resume: {file} does not hold what this version saves: {error!r}.") from error


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
        if not file.exists():
            warn(f"resume: {file} is missing. Trying the one before.")
            damaged.append((folder, entry))
            continue
        try:
            tree = load(file, "resume", entry)
        except (Damaged, Refused, OSError) as error:
            if isinstance(error, OSError):
                warn(f"resume: {file} cannot be read: {error.strerror}. Trying the one before.")
            else:
                warn(f"{error} Trying the one before.")
            damaged.append((folder, entry))
            continue
        for place, its in damaged if own else ():
            _set_aside(place, its)
        return file, tree
    if damaged:
        where = " and ".join(map(str, folders))
        raise RuntimeError(
            f"resume: every checkpoint in {where} is damaged or missing. Nothing was changed. lt.verify(folder) shows "
            "what is sound: run.resume(file) goes on from any, a best file too. To begin anew, delete the folder, or "
            "give another."
        )
    return None


def _set_aside(folder: Path, entry: dict[str, Any]) -> None:
    """Take a damaged file out of the way, and off the list."""
    if not damage(folder / entry["file"], entry):  # a passing error of the disk, or what this version refuses
        return
    manifest = read_manifest(folder)
    manifest.checkpoints = [other for other in manifest.checkpoints if other != entry]
    if set_aside(folder / entry["file"]) is not None or not (folder / entry["file"]).exists():
        with contextlib.suppress(OSError):  # read-only: it is passed over each time
            write_manifest(folder, manifest)


def _reconcile(run: Run, folder: Path, manifest: Manifest, criterion: highest) -> None:
    """Have ``run.best`` say what the best file holds, where that is a better result from behind the checkpoint."""
    metric = criterion.metric
    held = next((entry for entry in manifest.best if entry.get("metric") == metric and entry["rank"] == 1), None)
    facts = run.best.get(metric, {})
    if held is None:
        return
    file = folder / held["file"]
    wrong = damage(file, held)
    if wrong:  # one that nobody can load is no use to anybody
        warn(f"resume: {file}, the best of {metric}, is damaged: {wrong}. The next result takes its place.")
        run.best = {**run.best, metric: {key: value for key, value in facts.items() if key == "top"}}
        return
    if differs(file, held):  # written, but the process was killed before it could be listed
        try:
            held = load(file)["best"].get(metric, held)
        except (RuntimeError, LookupError, TypeError, AttributeError):  # no checkpoint: the user has put it there
            return
    if criterion.better(held["value"], facts.get("value")):
        run.best = {
            **run.best,
            metric: {**facts, **{key: held[key] for key in ("value", "epoch", "iteration", "file")}},
        }
