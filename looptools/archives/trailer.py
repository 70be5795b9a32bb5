"""The last bytes of a checkpoint, by which it proves itself.

A ``.pt`` file is a zip archive, and a zip archive may end with a comment. Ours says how many bytes stand before it and
what their checksum is, so that a file can be checked without its manifest; every zip reader takes it, torch.load too.
"""

from __future__ import annotations

from functools import lru_cache

MAGIC = b"looptools:"
NO_COMMENT = b"PK\x05\x06", b"\0\0"  # how the 22 bytes begin and end that an archive without a comment ends with
END = 22


def trailer(size: int, crc: int) -> bytes:
    """What is to stand behind *size* bytes with the checksum *crc*.

    In hexadecimal words: a checksum that ends with its own bytes would be the same number for every file.

    Example:
        >>> trailer(1000, 0xABCD)
        b'looptools: 00000000000003e8 bytes, crc32 0000abcd'
    """
    return MAGIC + b" %016x bytes, crc32 %08x" % (size, crc)


LENGTH = len(trailer(0, 0))


def announced(end: bytes) -> bytes:
    """The end of an archive without a comment, changed to say that a trailer follows.

    Raises:
        RuntimeError: If it is no such end.
    """
    if len(end) != END or (end[:4], end[-2:]) != NO_COMMENT:
        raise RuntimeError("checkpoint: torch.save has ended the file in a way that is not known here.")
    return end[:-2] + LENGTH.to_bytes(2, "little")


def checksum_in(end: bytes) -> int | None:
    """The checksum that a trailer states, None if it is none."""
    try:
        return int(end[-8:], 16) if end.startswith(MAGIC) and len(end) == LENGTH else None
    except ValueError:
        return None


def join(first: int, second: int, length: int) -> int:
    """The crc32 of two pieces, of which the second has *length* bytes, from those of each.

    zlib's crc32_combine, which Python does not have: a crc32 is a polynomial over bits modulo a fixed one, and bytes
    that follow multiply it by x to the power of their bits.

    Example:
        >>> import zlib
        >>> join(zlib.crc32(b"loop"), zlib.crc32(b"tools"), 5) == zlib.crc32(b"looptools")
        True
    """
    return _times(_shift(length), first) ^ second


@lru_cache(maxsize=4096)  # the tensors of a model have few sizes
def _shift(length: int) -> int:
    """Give x to the power of 8 times *length*; bit 31 is x to the power of 0."""
    result, power = 1 << 31, 1 << 23
    while length:
        if length & 1:
            result = _times(power, result)
        power = _times(power, power)
        length >>= 1
    return result


def _times(left: int, right: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if left >> bit & 1:
            product ^= right
        right = right >> 1 ^ 0xEDB88320 if right & 1 else right >> 1
    return product
