"""The list of a folder's checkpoints, ``checkpoints.json``: it proves itself, and is made anew from the files."""

from __future__ import annotations

import contextlib
import json
import re
import zlib
from pathlib import Path
from typing import Any

import attrs

from ..archives.files import set_aside, sums, write_bytes
from ..archives.loading import examine
from ..archives.whole import naming
from ..warn import warn
from .lock import alone

MANIFEST = "checkpoints.json"
FORMAT = 2
NAMES = re.compile(r"epoch_\d+-iteration_\d+(-\d+)?\.pt")  # of `stem_of` and `free_name`


@attrs.define
class Manifest:
    """What a folder holds: its checkpoints, oldest first, the best ones of each metric, by rank, and whose they are."""

    run: str = ""  # the run's id; runs of older versions have none
    checkpoints: list[dict[str, Any]] = attrs.field(factory=list)
    best: list[dict[str, Any]] = attrs.field(factory=list)


class Broken(Exception):  # noqa: N818 - a manifest is
    """Why a manifest is not to be trusted."""


def read_manifest(folder: Path) -> Manifest:
    """The checkpoints of a folder; none if it is a new one.

    A list that is damaged, or missing beside checkpoints, is made anew from the files, which prove themselves; this is
    said, and the damaged one set aside.

    Raises:
        RuntimeError: If none of the files is sound either, or a later version of looptools has written the list.
        OSError: If it cannot be read.
    """
    path = folder / MANIFEST
    try:
        return read_list(path)
    except FileNotFoundError:
        if not checkpoints_in(folder):
            return Manifest()
        wrong = f"{path} is missing"
    except Broken as error:
        wrong = f"{path} is damaged: {error}"
    manifest = rebuilt(folder)
    if not manifest.checkpoints:
        raise RuntimeError(
            f"checkpoint: {wrong}, and no checkpoint beside it is sound. Nothing was changed. Resume from another "
            "file, run.resume(path), or begin anew in another folder."
        )
    listed = [entry["file"] for entry in manifest.checkpoints]
    out = [file.name for file in checkpoints_in(folder) if file.name not in listed]
    left = f" Damaged, or of another run, are {', '.join(out)}." if out else ""
    warn(f"checkpoint: {wrong}. It is made anew from {len(listed)} checkpoints, the newest {listed[-1]}.{left}")
    with alone(folder) as may_write:
        if may_write:
            set_aside(path)
            with contextlib.suppress(OSError):  # read-only, or full: what is known now will do
                write_manifest(folder, manifest)
    return manifest


def readable_manifest(folder: Path) -> Manifest:
    """The same; an empty one if it cannot be read."""
    try:
        return read_manifest(folder)
    except (RuntimeError, OSError):
        return Manifest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest."""
    content = {"format": FORMAT, **attrs.asdict(manifest)}
    text = json.dumps({"crc32": _checksum(content), **content}, indent=1) + "\n"
    write_bytes(folder / MANIFEST, text.encode())


def _checksum(content: dict[str, Any]) -> int:
    """Of what stands in the manifest, however it is laid out."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def read_list(path: Path) -> Manifest:
    """The list as it stands in its file.

    Raises:
        Broken: If it is not what was written.
        OSError: If it cannot be read.
    """
    try:
        with naming(path):
            content = json.loads(path.read_bytes())
        number = content["format"]
        if number != 1 and content.pop("crc32") != _checksum(content):  # the first format had none
            raise Broken("its checksum is wrong")
        if number not in (1, FORMAT):
            raise RuntimeError(
                f"checkpoint: {path} has format {number}; here 1 and {FORMAT} are known. It needs a newer looptools."
            )
        checkpoints = sorted(content["checkpoints"], key=lambda entry: entry["number"])
        best = content.get("best") or []
        best = [best] if isinstance(best, dict) else best  # there used to be one only
        names = [entry["file"] for entry in checkpoints] + [entry.get("file", "best.pt") for entry in best]
        for name in names:
            if not _is_name(name):  # what is listed may be renamed and deleted
                raise Broken(f"it names {name!r:.100}, which is no checkpoint in its folder")
        return Manifest(content.get("run", ""), checkpoints, best)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Broken(f"it cannot be read ({error})") from error


def _is_name(name: Any) -> bool:
    """Whether it is the name of a ``.pt`` file, and no way out of its folder on any system."""
    return isinstance(name, str) and name.endswith(".pt") and not set(name) & set("/\\:\0")


def checkpoints_in(folder: Path) -> list[Path]:
    """The files that were named by the run; a copy that the user has named must not become one that is retired."""
    return sorted(path for path in folder.glob("*.pt") if NAMES.fullmatch(path.name))


@attrs.frozen
class _Saved:
    """What a file says of the run that has saved it; the first runs had neither id nor number."""

    path: Path
    run: str
    newer: tuple[int, float]  # its number, and seconds at work: a best one has the number of the checkpoint before it
    place: dict[str, Any]
    best: list[dict[str, Any]]


def rebuilt(folder: Path) -> Manifest:
    """What the files of a folder say of themselves; only those of the run that has saved the newest count.

    The newest is the one with the largest number, neither by time nor by name.
    """
    sound = [saved for path in sorted(folder.glob("*.pt")) if (saved := _saved(path)) is not None]
    named = set(checkpoints_in(folder))
    listed = {saved.path: saved for saved in sound if saved.path in named}
    if not listed:
        return Manifest()
    run = max(listed.values(), key=lambda saved: saved.newer).run
    own = sorted((saved for saved in sound if saved.run == run), key=lambda saved: saved.newer)
    entries: list[dict[str, Any]] = []
    for saved in own:
        if saved.path in listed:
            number = saved.newer[0] or len(entries) + 1
            entries.append({"number": number, "file": saved.path.name, **saved.place, **sums(saved.path)})
    names = {saved.path.name for saved in own}
    best = [entry | sums(folder / entry["file"]) for entry in own[-1].best if entry["file"] in names]
    return Manifest(run, entries, best)


def _saved(path: Path) -> _Saved | None:
    """Read what a file says; no tensor is loaded. None if it is not the sound checkpoint of a run."""
    try:
        tree = examine(path, "checkpoint").tree
        progress, run = tree["progress"], tree.get("run", {})
        place: dict[str, Any] = {key: _number(progress[key]) for key in ("epoch", "iteration", "round")}
        best = [entry for metric, facts in tree["best"].items() for entry in _ranked(metric, facts)]
        newer = _number(run.get("number", 0)), float(progress["seconds"])
        return _Saved(path, str(run.get("id", "")), newer, place | {"border": bool(tree["border"])}, best)
    except (RuntimeError, OSError, LookupError, TypeError, ValueError, AttributeError):
        return None


def _number(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no number")
    return value


def _ranked(metric: Any, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The best files of a metric, as ``run.best`` knows them and `Manifest` lists them."""
    keys = ("value", "epoch", "iteration", "file")
    ranked = [(1, facts), *enumerate(facts.get("top", []), 1)]
    return [{"metric": str(metric), "rank": rank, **{key: entry[key] for key in keys}} for rank, entry in ranked]


def require_own(folder: Path, resumed_from: Path | None, who: str = "checkpoint") -> None:
    """Refuse a *folder* with checkpoints of another run than the one that *resumed_from* belongs to.

    Raises:
        FileExistsError: If it is so.
    """
    manifest = read_manifest(folder)
    if not manifest.checkpoints or (resumed_from is not None and _of_one_run(manifest, folder, resumed_from.parent)):
        return
    raise FileExistsError(
        f"{who}: {folder} holds the checkpoints of another run, the newest of epoch "
        f"{manifest.checkpoints[-1]['epoch']}. Call run.resume() first to go on from it, give another folder, or "
        "delete this one."
    )


def _of_one_run(manifest: Manifest, folder: Path, other: Path) -> bool:
    return folder.resolve() == other.resolve() or (manifest.run != "" and manifest.run == readable_manifest(other).run)
