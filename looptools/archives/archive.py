"""Where the records of a ``.pt`` file lie, read strictly: what two zip readers could read differently is refused.

`torch.load` reads the archive with a reader of its own. A file that shows one thing to one reader and another to the
next could pass every check; so nothing is accepted here but the plain layout that ``torch.save`` writes.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import attrs

MOST_RECORDS = 1_000_000  # with AdamW a parameter takes three
SMALL = 256  # bytes of the records that describe the archive
IS_FOLDER = 0x10  # among the attributes of a record
ALL16, ALL32 = 0xFFFF, 0xFFFFFFFF
LOCAL, CENTRAL, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"
END64, LOCATOR64 = b"PK\6\6", b"PK\6\7"
DESCRIBING = ("version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id")


class Refused(RuntimeError):  # noqa: N818 - a file is; what raises it says why
    """A file that is not loaded, since it is not what ``torch.save`` makes of weights and plain values."""


@attrs.frozen
class Record:
    """A piece of the file: where its bytes begin, and how many they are."""

    start: int
    bytes: int


@attrs.frozen
class Archive:
    """The records of a file by name, without the folder that all of them are in."""

    size: int
    records: dict[str, Record]

    def read(self, file: BinaryIO, name: str) -> bytes:
        """The bytes of a record; none if there is no such record."""
        record = self.records.get(name, Record(0, 0))
        file.seek(record.start)
        return _exactly(file, record.bytes)


@attrs.frozen
class _Entry:
    """What the directory says of a record, and where its header is."""

    header: int
    name: bytes
    bytes: int


def read_archive(file: BinaryIO, path: Path) -> Archive:
    """List the records of an open file; takes time and memory in proportion to their number.

    Raises:
        Refused: If it is not an archive as ``torch.save`` writes it.
    """
    size = file.seek(0, 2)
    file.seek(0)
    if file.read(4) != LOCAL:
        raise Refused(_what_it_is_instead(file, size, path))
    try:
        at, length, count = _find_directory(file, size)
        file.seek(at)
        entries = _entries(_exactly(file, length), count)
        return Archive(size, _records(file, entries, at))
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise Refused(f"is cut off or garbled: its directory cannot be read ({error})") from None


def _what_it_is_instead(file: BinaryIO, size: int, path: Path) -> str:
    """What is said of a file that does not begin like a zip archive."""
    file.seek(0)
    start = file.read(16)
    if not start.strip(b"\0"):
        return "is empty" if not size else "holds nothing but zeros"
    if start[:1] == b"\x80" or b"ustar" in _at(file, 257, 5):
        return (
            "was written in torch's old format, which cannot be checked before it is loaded. Write it anew where you "
            f"trust it: torch.save(torch.load({path.name!r}, weights_only=True), {path.name!r})"
        )
    return "is no file of torch.save: it does not begin like a zip archive"


def _at(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(start)
    return file.read(count)


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise Refused(f"is cut off: {count} bytes were to come, {len(data)} are there")
    return data


def _find_directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Where the directory of the archive begins, its bytes, and how many entries it has."""
    start = max(size - 22 - ALL16, 0)
    tail = _at(file, start, 22 + ALL16)
    found = tail.rfind(END)
    if found < 0:
        raise Refused("is cut off: the end of its zip archive is missing")
    end = start + found  # readers look for the last one; only a comment may stand behind it
    disk, first, here, count, length, at, comment = struct.unpack_from("<4H2LH", tail, found + 4)
    if end + 22 + comment != size:
        raise Refused("has an end of archive that does not stand at its end")
    if end >= 20 and (locator := _at(file, end - 20, 20))[:4] == LOCATOR64:
        end = struct.unpack_from("<Q", locator, 8)[0]
        if end + 56 + 20 + 22 + comment != size or (record := _at(file, end, 56))[:4] != END64:
            raise Refused("has a directory of large files (zip64) that is not where it should be")
        disks, firsts, *numbers = struct.unpack_from("<2L4Q", record, 16)
        small = (here, count, length, at)
        stand_ins = (ALL16, ALL16, ALL32, ALL32)
        if any(one not in (other, full) for one, other, full in zip(small, numbers, stand_ins, strict=True)):
            raise Refused("names two different directories")
        here, count, length, at = numbers
        disk, first = disk | disks, first | firsts
    if disk or first or here != count or at + length != end:
        raise Refused("has a directory that does not end where the archive ends")
    if not 0 < count <= min(MOST_RECORDS, length // 46):
        raise Refused(f"says that it has {count} records, which cannot be")
    return at, length, count


def _entries(directory: bytes, count: int) -> list[_Entry]:
    """What the directory lists, in its own order."""
    at, entries = 0, []
    for _ in range(count):
        if directory[at : at + 4] != CENTRAL:
            raise Refused("is garbled: its directory has no entry where one should be")
        flags, method = struct.unpack_from("<2H", directory, at + 8)
        packed, size, named, extra, comment, disk, _, attributes, header = struct.unpack_from(
            "<2L5H2L", directory, at + 20
        )
        name = directory[at + 46 : at + 46 + named]
        after = at + 46 + named
        if ALL32 in (packed, size, header):
            size, packed, header = _large(directory[after : after + extra], size, packed, header)
        if method or packed != size:
            raise Refused("holds compressed data, as torch.save never writes it. Save it anew with torch.save")
        if flags & ~0x808:  # sizes behind the data, and names in UTF-8
            raise Refused("is encrypted or of an unknown kind of zip archive")
        if attributes & IS_FOLDER or name.endswith(b"/"):  # torch would take for its bytes what memory happens to hold
            raise Refused("holds a folder where a record should be")
        if disk:
            raise Refused("is a piece of an archive that was split")
        entries.append(_Entry(header, name, size))
        at = after + extra + comment
    if at != len(directory):
        raise Refused("is garbled: its directory is longer than its entries")
    return entries


def _large(extra: bytes, *numbers: int) -> list[int]:
    """The sizes and the place of a record, those that do not fit 32 bits taken from the zip64 field."""
    found, at = b"", 0
    while at < len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            if found:
                raise Refused("gives the size of a large record twice")
            found = extra[at + 4 : at + 4 + length]
        at += 4 + length
    values = iter(struct.unpack(f"<{len(found) // 8}Q", found[: len(found) // 8 * 8]))
    given = [next(values, None) if number == ALL32 else number for number in numbers]
    if None in given:
        raise Refused("does not give the size of a large record")
    return [number for number in given if number is not None]


def _records(file: BinaryIO, entries: list[_Entry], end: int) -> dict[str, Record]:
    """Follow each entry to its bytes; see that they are where they should be, and nobody else's."""
    folder = entries[0].name.partition(b"/")[0] + b"/"
    records, seen = {}, set()
    free = 0  # bytes before this one belong to records already
    for entry in sorted(entries, key=lambda entry: entry.header):
        name = entry.name
        if not name.startswith(folder) or min(name) < 32:
            raise Refused("holds records outside of its folder")
        if name.lower() in seen:  # torch's reader does not tell cases apart
            raise Refused("holds two records of one name")
        seen.add(name.lower())
        header = _at(file, entry.header, 30) if free <= entry.header <= end else b""
        if header[:4] != LOCAL or header[8:10] != b"\0\0":
            raise Refused("is garbled: a record does not begin where its directory says")
        named, extra = struct.unpack_from("<2H", header, 26)
        start = entry.header + 30 + named + extra
        free = start + entry.bytes
        if free > end or file.read(named) != name:
            raise Refused("is garbled: a record overlaps another one, or is not the one that its directory says")
        records[name[len(folder) :].decode()] = Record(start, entry.bytes)
    for known in DESCRIBING:
        if known in records and records[known].bytes > SMALL:
            raise Refused(f"holds a record {known} that is too large")
    return records
