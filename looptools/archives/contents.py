"""What a file says that it holds: keys, shapes, kinds and sizes. No tensor is loaded, and no code of the file runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import attrs
import torch

from .archive import Archive, Refused, read_archive
from .pickled import Reading
from .stand_ins import LARGEST, Outline, shown

__all__ = ["Contents", "Outline", "Refused", "read_contents", "read_header", "shown"]

# Bytes of data.pkl, of which a tensor takes about 80 and a row of history 200. One can make a reader take 80 bytes of
# memory and a microsecond.
MOST_PICKLE = 64 << 20
MOST_TIMES, ALWAYS = 8, 64 << 20  # bytes that all tensors together may have: so often the file's, or so many
MOST_HEADER = 100_000_000  # bytes of a safetensors header: its own bound
ORDERS = (b"little", b"big")

# A safetensors file names its kinds of numbers so.
_KINDS = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@attrs.frozen(eq=False)
class Contents:
    """What a file holds.

    Args:
        path: The file.
        bytes: Its size.
        tree: As `torch.load` would give it, with an `Outline` in place of each tensor.
        tensors: How many tensors there are.
        stored: Bytes of their storages; what several share is counted once.
    """

    path: Path
    bytes: int
    tree: Any = attrs.field(repr=False)
    tensors: int
    stored: int


def read_contents(path: str | Path, who: str = "verify") -> Contents:
    """Read what a ``.pt`` file says that it holds, in time and memory bounded by its size.

    It is checked for being what ``torch.save`` makes of tensors and plain values, and of nothing else; not for having
    been damaged since: `damage` sees to that.

    Args:
        path: The file, of the format that ``torch.save`` writes since torch 1.6.
        who: The public name that an error begins with.

    Raises:
        OSError: If the file cannot be read.
        Refused: If it is anything else, or declares more than it holds.

    Example:
        >>> torch.save({"epoch": 3, "weight": torch.zeros(2, 3)}, folder / "weights.pt")
        >>> contents = read_contents(folder / "weights.pt")
        >>> contents.tree["epoch"], contents.tree["weight"].shape, contents.stored
        (3, (2, 3), 24)
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            archive = read_archive(file, path)
            _require_weights(file, archive)
            reading = Reading(archive.read(file, "data.pkl"), _storages(archive))
        tree = reading.read()
        _require_bounded(reading.tensors, archive.size)
        stored = sum(archive.records[f"data/{key}"].bytes for key in reading.storages)
        return Contents(path, archive.size, tree, len(reading.tensors), stored)
    except Refused as error:
        raise Refused(f"{who}: {path} {error}. It was not loaded.") from None


def _storages(archive: Archive) -> dict[str, int]:
    """Bytes of the records that hold tensors."""
    return {name[5:]: record.bytes for name, record in archive.records.items() if name.startswith("data/")}


def _require_weights(file: BinaryIO, archive: Archive) -> None:
    """See that an archive is one of weights, before its pickle is read."""
    records = archive.records
    if "constants.pkl" in records or any(name.startswith("code/") for name in records):
        raise Refused("is a TorchScript archive, which holds code. Save the model's state_dict() instead")
    if "data.pkl" not in records or "version" not in records:
        raise Refused("is a zip archive, but not one of torch.save: it has no data.pkl, or no version")
    if records["data.pkl"].bytes > MOST_PICKLE:
        raise Refused(f"has {records['data.pkl'].bytes} bytes besides its tensors; {MOST_PICKLE} are the most")
    order = archive.read(file, "byteorder")
    if "byteorder" in records and order not in ORDERS:
        raise Refused(f"says that its bytes are in the order {shown(order)}, which is neither little nor big")


def _require_bounded(tensors: list[Outline], size: int) -> None:
    """See that what would be loaded is in proportion to the file: with a stride of 0 one number can be 10**12."""
    declared = sum(outline.bytes for outline in tensors)
    if declared > max(MOST_TIMES * size, ALWAYS):
        raise Refused(
            f"declares tensors of {declared} bytes, but has only {size} itself. Expanded tensors are saved whole after "
            "tensor.contiguous()"
        )


def read_header(path: str | Path, who: str = "verify") -> Contents:
    """Read what a safetensors file says that it holds; safetensors itself is not needed.

    Raises:
        OSError: If the file cannot be read.
        Refused: If its header is not sound, or its tensors do not fill the file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, MOST_HEADER):
                raise Refused("is cut off, or no safetensors file")
            header = _parse(file.read(length))
        tree = {name: _outline(name, facts) for name, facts in header.items() if name != "__metadata__"}
        _require_filled([header[name]["data_offsets"] for name in tree], size - 8 - length)
        return Contents(path, size, tree, len(tree), size - 8 - length)
    except Refused as error:
        raise Refused(f"{who}: {path} {error}.") from None


def _parse(data: bytes) -> dict[str, Any]:
    try:
        header = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise Refused(f"is no safetensors file: its header is no JSON ({shown(error)})") from None
    if not isinstance(header, dict):
        raise Refused("is no safetensors file: its header is no JSON object")
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a name that comes twice, one reader takes the first and another the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _outline(name: str, facts: Any) -> Outline:
    """What the header says of one tensor."""
    try:
        dtype, shape, (start, end) = facts["dtype"], facts["shape"], facts["data_offsets"]
        counts = [*shape, start, end]
        if any(type(count) is not int or not 0 <= count <= LARGEST for count in counts) or len(shape) > 64:
            raise ValueError("a size that cannot be")
        kind = _KINDS[dtype] if type(dtype) is str else _KINDS[""]
        if math.prod(shape) * kind.itemsize != end - start:
            raise ValueError("its size is not that of its shape")
    except (KeyError, TypeError, ValueError) as error:
        raise Refused(f"is damaged: its header on {shown(name)} cannot be right ({shown(error)})") from None
    return Outline(kind, tuple(shape), end - start, name)


def _require_filled(places: list[list[int]], size: int) -> None:
    """See that the tensors lie one behind the other, from the header's end to that of the file."""
    free = 0
    for start, end in sorted(map(tuple, places)):
        if start != free:
            raise Refused("is damaged: its tensors overlap, or leave a gap")
        free = end
    if free != size:
        raise Refused(f"is damaged: its tensors take {free} bytes, {size} are there")
