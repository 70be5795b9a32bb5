"""Files that are written whole or not at all, and the manifest that lists them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch

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


def require_own(folder: Path, resumed_from: Path | None) -> None:
    """Refuse a *folder* with checkpoints of a run that did not resume from it.

    Raises:
        FileExistsError: If it is so.
    """
    entries = read_manifest(folder)
    if entries and (resumed_from is None or resumed_from.resolve().parent != folder.resolve()):
        raise FileExistsError(
            f"checkpoint: {folder} holds the checkpoints of another run, the newest of epoch {entries[-1]['epoch']}. "
            "Call run.resume() first to go on from it, give another folder, or delete this one."
        )


def serialize(tree: dict[str, Any]) -> bytes:
    """The bytes of a ``.pt`` file. Done in memory, so that a full disk harms no file."""
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return buffer.getvalue()


def load(path: Path) -> Any:
    """Read a ``.pt`` file, onto the CPU; no code in it can run."""
    return torch.load(path, map_location="cpu", weights_only=True)


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


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """The checkpoints of a folder, oldest first; none if there is no manifest."""
    path = folder / MANIFEST
    if not path.exists():
        return []
    entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["checkpoints"]
    return sorted(entries, key=lambda entry: entry["number"])


def write_manifest(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Replace the manifest."""
    text = json.dumps({"format": 1, "checkpoints": entries}, indent=1) + "\n"
    write(folder / MANIFEST, text.encode())


def describe(data: bytes) -> dict[str, int]:
    """What a manifest keeps of a file, to know it again by."""
    return {"bytes": len(data), "crc32": zlib.crc32(data)}


def damage(folder: Path, entry: dict[str, Any]) -> str:
    """What is wrong with the file of a manifest's entry; empty if it is sound."""
    path = folder / entry["file"]
    try:
        data = path.read_bytes()
    except OSError as error:
        return str(error)
    if len(data) != entry["bytes"]:
        return f"it has {len(data)} bytes, {entry['bytes']} were written"
    return "" if zlib.crc32(data) == entry["crc32"] else "its checksum is wrong"
