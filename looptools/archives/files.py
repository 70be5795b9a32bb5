"""The files of a folder of checkpoints: written, copied, checked, set aside."""

from __future__ import annotations

import os
import tempfile
import zipfile
import zlib
from collections.abc import Container
from io import FileIO
from pathlib import Path
from typing import Any, cast

import torch

from ..state import Progress
from .trailer import END, LENGTH, MAGIC, NO_COMMENT, trailer
from .whole import Stream, checksum, naming, replacing


class Damaged(RuntimeError):  # noqa: N818 - a file is
    """A file that is not what was written."""


def require_folder(folder: Path, part: str) -> None:
    """Make *folder*, and see that files can be written there.

    Raises:
        OSError: If not, with the name of the *part* that wants to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        error.add_note(f"{part}: cannot write to {folder}. Give a folder that can be made and written to.")
        raise


def stem_of(progress: Progress) -> str:
    """The name of what is saved after so much."""
    return f"epoch_{progress.epoch:04d}-iteration_{progress.iteration:06d}"


def free_name(stem: str, taken: Container[str]) -> str:
    """The first free one of ``stem.pt``, ``stem-2.pt`` and so on."""
    name, number = f"{stem}.pt", 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}.pt"
    return name


def write(path: Path, tree: Any) -> dict[str, int]:
    """Save *tree* as ``torch.save`` does, whole or not at all, with a trailer behind it.

    It goes through a temporary file, is synced, read back and compared; then it takes the place of *path*.

    Returns:
        Size and checksum, as a manifest's entry has them.

    Raises:
        OSError: If it cannot be written, with errno and *path*: what was there stays.

    Example:
        >>> sums = write(folder / "a.pt", {"weight": torch.ones(2)})
        >>> sums == {"bytes": (folder / "a.pt").stat().st_size, "crc32": zlib.crc32((folder / "a.pt").read_bytes())}
        True
        >>> torch.load(folder / "a.pt", weights_only=True)
        {'weight': tensor([1., 1.])}
    """
    with replacing(path) as stream:
        torch.save(tree, cast(Any, stream))
        stream.seal()
    return _sums(stream)


def write_bytes(path: Path, data: bytes) -> dict[str, int]:
    """Write *data* in the same way, without a trailer."""
    with replacing(path) as stream:
        stream.torch_sums = False
        stream.write(data)
    return _sums(stream)


def copy(source: Path, path: Path) -> dict[str, int]:
    """Write a checkpoint once more, in the same way.

    No hard link, and no clone that shares its blocks: damage would hit both.

    Raises:
        OSError: If it cannot be written, or *source* is not sound, with errno and *path*.
    """
    with replacing(path) as stream, FileIO(source) as file:
        stream.copy(file)
    return _sums(stream)


def _sums(stream: Stream) -> dict[str, int]:
    return {"bytes": stream.size, "crc32": stream.crc}


def has_trailer(path: Path) -> bool:
    """Whether a file claims to be one that proves itself; `damage` says whether it is right.

    Raises:
        OSError: If it cannot be read.
    """
    with naming(path), FileIO(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - LENGTH))
        return file.read(LENGTH).startswith(MAGIC)


def damage(path: Path, entry: dict[str, Any] | None = None) -> str:
    """What is wrong with a file; empty if it is sound.

    Its trailer has the last word. Files of older versions, and of torch.save itself, have none: these are judged by
    the manifest's *entry*, or by the checksums of the zip archive, which torch.load does not look at. (A best file is
    written over, so a process that was killed then leaves a new one beside an old entry.)
    """
    try:
        with naming(path), FileIO(path) as file:
            size = os.fstat(file.fileno()).st_size
            before = max(0, size - LENGTH)
            crc = checksum(file, before)
            end = file.read(LENGTH) or b""
    except OSError as error:
        return str(error)
    if end == trailer(before, crc):
        return ""
    if end.startswith(MAGIC):
        return "its checksum is wrong"
    wrong = _differs(size, zlib.crc32(end, crc), entry) if entry else ""
    return wrong if wrong and entry and "number" in entry else _damage_within(path, end)


def differs(path: Path, entry: dict[str, Any]) -> str:
    """In what a file is not that of the manifest's entry; empty if it is."""
    try:
        found = sums(path)
    except OSError as error:
        return str(error)
    return _differs(found["bytes"], found["crc32"], entry)


def sums(path: Path) -> dict[str, int]:
    """Size and checksum of a file.

    Raises:
        OSError: If it cannot be read.
    """
    with naming(path), FileIO(path) as file:
        size = os.fstat(file.fileno()).st_size
        return {"bytes": size, "crc32": checksum(file, size)}


def _differs(size: int, crc: int, entry: dict[str, Any]) -> str:
    if size != entry["bytes"]:
        return f"it has {size} bytes, {entry['bytes']} were written"
    return "" if crc == entry["crc32"] else "its checksum is wrong"


def _damage_within(path: Path, end: bytes) -> str:
    """What the checksums of a zip archive without a trailer say.

    An archive of torch.save has no comment; one with another than our trailer once had that.
    """
    if (end[-END:][:4], end[-2:]) != NO_COMMENT:
        return "its end is missing or wrong, as of a file that was cut off"
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type or entry.file_size != entry.compress_size for entry in entries):
                return "it holds compressed data, which torch.save never writes"
            bad = archive.testzip()
    except Exception as error:  # zipfile's own, of many kinds
        return str(error) or type(error).__name__
    return "" if bad is None else f"the checksum of {bad} is wrong"


def set_aside(path: Path) -> Path | None:
    """Rename a damaged file to the first free one of ``name.damaged``, ``name.damaged-2`` and so on.

    Returns:
        Its new name; None if it cannot be renamed, as in a folder that is read-only.
    """
    name, number = f"{path.name}.damaged", 1
    while (aside := path.with_name(name)).exists():
        number += 1
        name = f"{path.name}.damaged-{number}"
    try:
        path.rename(aside)
    except OSError:
        return None
    return aside
