"""Read a ``.pt`` file, once it is known to be whole and harmless."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .contents import Contents, Refused, read_contents, shown
from .files import Damaged, damage, has_trailer

TRAILED = 2  # the first format whose files prove themselves


def load(path: str | Path, who: str = "resume", entry: dict[str, Any] | None = None) -> Any:
    """Read a ``.pt`` file, onto the CPU; no code in it can run.

    First it is seen to be whole, then what it says that it holds is looked at, and only then it is loaded, by
    ``torch.load`` with ``weights_only=True``, whatever the environment says. What is not plain weights and values is
    refused: there is no way around.

    Args:
        path: The file.
        who: The public name that an error begins with.
        entry: What the manifest says of the file.

    Raises:
        Damaged: If it is not what was written.
        OSError: If it cannot be read.
        Refused: If it is no file of plain values and tensors, or declares more than it holds.
    """
    path = Path(path)
    examine(path, who, entry)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of many kinds, some with a page of advice that does not hold here
        reason = shown(str(error).partition("\n")[0], 200)
        raise Refused(f"{who}: {path} cannot be read: {reason}") from error


def examine(path: Path, who: str, entry: dict[str, Any] | None = None) -> Contents:
    """See that a file is whole and harmless, and return what it says that it holds. Nothing of it is loaded.

    Args:
        path: The file.
        who: The public name that an error begins with.
        entry: What the manifest says of the file.

    Raises:
        Damaged: If it is not what was written.
        OSError: If it cannot be read.
        Refused: If it is no file of plain values and tensors, or declares more than it holds.
    """
    if entry is not None or has_trailer(path):
        _require_whole(path, who, entry)
        return read_contents(path, who)
    contents = read_contents(path, who)  # first: to take the checksums of a foreign archive is to unpack it
    if _has_lost_its_trailer(contents.tree):
        raise Damaged(f"{who}: {path} is damaged: the checksum that a checkpoint ends with is gone.")
    _require_whole(path, who, entry)
    return contents


def _require_whole(path: Path, who: str, entry: dict[str, Any] | None) -> None:
    wrong = damage(path, entry)
    if wrong:
        raise Damaged(f"{who}: {path} is damaged: {wrong}.")


def _has_lost_its_trailer(tree: Any) -> bool:
    """Whether a tree says that it is the checkpoint of a run, of a format whose files end with a checksum."""
    if not isinstance(tree, Mapping) or not {"format", "run", "progress"} <= tree.keys():
        return False
    return isinstance(tree["format"], int) and tree["format"] >= TRAILED
