"""Files that are written whole or not at all, and the manifest that lists them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Container
from pathlib import Path
from typing import Any

import attrs
import torch

from ..state import Progress

MANIFEST = "checkpoints.json"


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


def serialize(tree: dict[str, Any]) -> bytes:
    """The bytes of a ``.pt`` file. Done in memory, so that a full disk harms no file."""
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return buffer.getvalue()


def load(path: Path) -> Any:
    """Read a ``.pt`` file, onto the CPU; no code in it can run.

    Raises:
        RuntimeError: If it is not what was written: by the manifest beside it, else by the checksums within.
    """
    wrong = damage(path, _known(path))
    if wrong:
        raise RuntimeError(f"resume: {path} is damaged: {wrong}.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's own errors, of many kinds
        raise RuntimeError(f"resume: {path} cannot be read: {error}") from error


def _known(path: Path) -> dict[str, Any] | None:
    """What the manifest beside a file says of it, if it does."""
    manifest = readable_manifest(path.parent)
    entries = [*manifest.checkpoints, *manifest.best]
    return next((entry for entry in reversed(entries) if entry["file"] == path.name), None)


def _damage_within(path: Path) -> str:
    """What the checksums of a ``.pt`` file, which is a zip archive, say; torch.load does not look at them."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError) as error:
        return str(error)
    return "" if bad is None else f"the checksum of {bad} is wrong"


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


def write(path: Path, data: bytes) -> None:
    """Write *data* to *path*: to a temporary file first, which then takes its place."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the new name in *folder* outlast a power cut, where the system can do that (Windows cannot)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@attrs.define
class Manifest:
    """What a folder holds: its checkpoints, oldest first, the best ones of each metric, by rank, and whose they are."""

    run: str = ""  # the run's id; runs of older versions have none
    checkpoints: list[dict[str, Any]] = attrs.field(factory=list)
    best: list[dict[str, Any]] = attrs.field(factory=list)


def read_manifest(folder: Path) -> Manifest:
    """The checkpoints of a folder; none if it is a new one.

    Raises:
        RuntimeError: If the manifest cannot be read, or is missing beside checkpoints.
    """
    path = folder / MANIFEST
    if not path.exists():
        if any(folder.glob("epoch_*.pt")):
            raise RuntimeError(f"checkpoint: {folder} holds checkpoints but no {MANIFEST}. Resume from a file.")
        return Manifest()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        checkpoints = sorted(content["checkpoints"], key=lambda entry: entry["number"])
        best = content.get("best") or []
        best = [best] if isinstance(best, dict) else best  # there used to be one only
        return Manifest(content.get("run", ""), checkpoints, best)
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"checkpoint: {path} cannot be read ({error}). Resume from a file beside it.") from error


def readable_manifest(folder: Path) -> Manifest:
    """The same; an empty one if it cannot be read."""
    try:
        return read_manifest(folder)
    except RuntimeError:
        return Manifest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest."""
    text = json.dumps({"format": 1, **attrs.asdict(manifest)}, indent=1) + "\n"
    write(folder / MANIFEST, text.encode())


def describe(data: bytes) -> dict[str, int]:
    """What a manifest keeps of a file, to know it again by."""
    return {"bytes": len(data), "crc32": zlib.crc32(data)}


def damage(path: Path, entry: dict[str, Any] | None) -> str:
    """What is wrong with the file of a manifest's entry; empty if it is sound.

    A best file is written over, so a process that was killed before it wrote the manifest leaves a new one beside an
    old entry; there the checksums within have the last word, as they have without an entry.
    """
    if entry is None:
        return _damage_within(path)
    wrong = differs(path, entry)
    is_best = "number" not in entry
    return "" if is_best and wrong and not _damage_within(path) else wrong


def differs(path: Path, entry: dict[str, Any]) -> str:
    """In what a file is not that of the manifest's entry; empty if it is."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return str(error)
    if len(data) != entry["bytes"]:
        return f"it has {len(data)} bytes, {entry['bytes']} were written"
    return "" if zlib.crc32(data) == entry["crc32"] else "its checksum is wrong"
