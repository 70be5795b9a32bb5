"""Files that should not be loaded, made by hand: pieces of pickles, archives around them, and what they try."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import torch

SENTINEL = "code-has-run"  # the file that would be there, in the working folder

# Pieces of a pickle


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tuple_of(*pieces: bytes) -> bytes:
    return b"(" + b"".join(pieces) + b"t"


def list_of(*pieces: bytes) -> bytes:
    return b"](" + b"".join(pieces) + b"e"


def dict_of(*pieces: bytes) -> bytes:
    """Of keys and values in turn."""
    return b"}(" + b"".join(pieces) + b"u"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + tuple_of(*arguments) + b"R"


ORDERED = call(name("collections", "OrderedDict"))
HOOKS = b"\x89" + ORDERED  # requires no gradient, has no hooks


def storage(key: str = "0", elements: int = 4, kind: str = "FloatStorage") -> bytes:
    return tuple_of(text("storage"), name("torch", kind), text(key), text("cpu"), number(elements)) + b"Q"


def tensor(shape: Any = (4,), strides: Any = (1,), offset: int = 0, *, of: bytes | None = None) -> bytes:
    sizes = [tuple_of(*map(number, values)) for values in (shape, strides)]
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, storage() if of is None else of, number(offset), *sizes, HOOKS)


def pickled(*pieces: bytes) -> bytes:
    return b"\x80\x02" + b"".join(pieces) + b"."


# Archives


def records(data: bytes, **others: bytes) -> dict[str, bytes]:
    """What torch.save writes around a pickle."""
    return {"data.pkl": data, "byteorder": b"little", "data/0": bytes(16), "version": b"3\n", **others}


def archive(
    contents: dict[str, bytes], folder: str = "archive/", method: int = zipfile.ZIP_STORED, comment: bytes = b""
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for key, data in contents.items():
            file.writestr(folder + key, data)
        file.comment = comment
    return buffer.getvalue()


def made(*pieces: bytes) -> bytes:
    """A file around a pickle of these pieces."""
    return archive(records(pickled(*pieces)))


def in_large_form(data: bytes) -> bytes:
    """The same archive, its directory written as if its records were beyond 4 GB."""
    end = data.rfind(b"PK\5\6")
    count, length, at = struct.unpack_from("<HLL", data, end + 10)
    entries, full = b"", b"\xff" * 4
    for _ in range(count):
        packed, size, named = struct.unpack_from("<LLH", data, at + 20)
        where = struct.unpack_from("<L", data, at + 42)[0]
        extra = struct.pack("<HHQQQ", 1, 24, size, packed, where)
        lengths = struct.pack("<HH", named, len(extra))
        entries += data[at : at + 20] + full + full + lengths + data[at + 32 : at + 42] + full
        entries += data[at + 46 : at + 46 + named] + extra
        at += 46 + named
    begin = end - length
    large = b"PK\6\6" + struct.pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, count, count, len(entries), begin)
    locator = b"PK\6\7" + struct.pack("<LQL", 0, begin + len(entries), 1)
    return data[:begin] + entries + large + locator + b"PK\5\6" + b"\0" * 4 + b"\xff" * 12 + b"\0\0"


def sealed(data: bytes) -> bytes:
    """The same archive with a checkpoint's trailer, as if it had been written so; what is none stays as it is."""
    from looptools.archives.trailer import LENGTH, trailer

    if data[-22:-18] != b"PK\5\6":
        return data
    body = data[:-2] + LENGTH.to_bytes(2, "little")
    return body + trailer(len(body), zlib.crc32(body))


def unpacked(data: bytes) -> tuple[str, dict[str, bytes]]:
    """Folder and records of an archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        folder = file.namelist()[0].partition("/")[0] + "/"
        return folder, {key.removeprefix(folder): file.read(key) for key in file.namelist()}


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class SetsState:
    """Would run code when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return SetsState, (), {"x": 1}

    def __setstate__(self, state: Any) -> None:
        open(SENTINEL, "w").close()


def _wrapped(opening: bytes, closing: bytes, depth: int = 100_000) -> bytes:
    return opening * depth + b"N" + closing * depth


def _laughs(depth: int = 60) -> bytes:
    """Lists of two, both the one before."""
    steps = b"".join(b"](h" + bytes([n]) + b"h" + bytes([n]) + b"eq" + bytes([n + 1]) for n in range(depth))
    return b"(]q\0" + steps + b"t"


def _exponential_key(depth: int = 60) -> bytes:
    steps = b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(depth))
    return b"(Nq\0" + steps + b"}h" + bytes([depth]) + b"Nst"


def _flood() -> bytes:
    """Keys that all have the same hash."""
    return dict_of(*(number(n * (2**61 - 1)) + b"N" for n in range(1, 5000)))


def _flood_of_tuples() -> bytes:
    """Keys that are unlike, but so many that they could have been chosen."""
    return dict_of(*(tuple_of(number(n), b"N") + b"N" for n in range(30_000)))


def _copies(kind: bytes) -> bytes:
    """A large container, copied again and again."""
    inner = b"](" + b"".join(b"J" + struct.pack("<i", n) for n in range(2000)) + b"e"
    inner = (
        inner if b"set" in kind else b"}(" + b"".join(b"J" + struct.pack("<i", n) + b"N" for n in range(2000)) + b"u"
    )
    return b"(" + inner + b"q\0" + kind + b"q\1" + b"h\1h\0\x85R" * 20_000 + b"t"


def _two_ends() -> bytes:
    """An archive within the comment of another one: which one is read depends on the reader."""
    return archive(records(pickled(b"N")), comment=b"x" * 5 + archive({"data.pkl": pickled(b"]"), "version": b"3\n"}))


def _patched(data: bytes, where: bytes, at: int, value: bytes, last: bool = True) -> bytes:
    """Other bytes behind a signature of the archive."""
    start = (data.rfind if last else data.find)(where) + at
    return data[:start] + value + data[start + len(value) :]


def _overlapping() -> bytes:
    """Two entries of the directory whose data is the same bytes."""
    data = archive({**records(pickled(tensor())), "data/1": b""})
    directory = data.find(b"PK\1\2")
    second = data.find(b"data/1", directory) - 54
    return data[: second + 20] + struct.pack("<LL", 200, 200) + data[second + 28 :]


def _many_records() -> bytes:
    return _patched(archive(records(pickled(b"N"))), b"PK\5\6", 8, struct.pack("<HH", 65535, 65535))


def _lying_zip64() -> bytes:
    """A directory of large files that says something else than the plain one."""
    data = archive(records(pickled(b"N")))
    end = data.rfind(b"PK\5\6")
    count, length, at = struct.unpack_from("<HLL", data, end + 10)
    large = b"PK\6\6" + struct.pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, count - 1, count - 1, length, at)
    locator = b"PK\6\7" + struct.pack("<LQL", 0, end, 1)
    return data[:end] + large + locator + data[end:]


def _without(key: str) -> bytes:
    contents = records(pickled(tensor()))
    del contents[key]
    return archive(contents)


def _hooks_filled_later() -> bytes:
    """Hooks that are empty when the tensor is made, and functions afterwards."""
    hooks = name("collections", "OrderedDict") + b")Rq\0"
    sizes = tuple_of(number(4)), tuple_of(number(1))
    rebuilt = call(name("torch._utils", "_rebuild_tensor_v2"), storage(), number(0), *sizes, b"\x89h\0")
    return b"(" + hooks + rebuilt + b"h\0(" + text("hook") + name("collections", "Counter") + b"ut"


TOUCH = f"touch {SENTINEL}"
OPEN = f"open({SENTINEL!r}, 'w').close()"
LOUD = "calls for .* which is not among the few things"

# Name: how the file is made, and what the error says.
CORPUS: dict[str, tuple[Callable[[], bytes], str]] = {
    # code that would run
    "os.system": (lambda: made(call(name("posix", "system"), text(TOUCH))), LOUD),
    "os.system, by its other name": (lambda: made(call(name("os", "system"), text(TOUCH))), LOUD),
    "subprocess": (lambda: made(call(name("subprocess", "check_call"), list_of(text("touch"), text(SENTINEL)))), LOUD),
    "eval": (lambda: made(call(name("builtins", "eval"), text(OPEN))), LOUD),
    "exec, as Python 2 calls it": (lambda: made(call(name("__builtin__", "exec"), text(OPEN))), LOUD),
    "getattr": (lambda: made(call(name("__builtin__", "getattr"), name("torch", "Size"), text("__base__"))), LOUD),
    "dotted name": (lambda: made(call(name("torch", "serialization.os.system"), text(TOUCH))), LOUD),
    "runpy": (lambda: made(call(name("runpy", "_run_code"), text(OPEN), b"}")), LOUD),
    "torch.load within": (lambda: made(call(name("torch.serialization", "load"), text("other.pt"))), LOUD),
    "torch.hub": (lambda: made(call(name("torch.hub", "load"), text("someone/else"))), LOUD),
    "old instruction INST": (lambda: made(b"(" + text(TOUCH) + b"iposix\nsystem\n"), "instruction 0x69"),
    "old instruction OBJ": (
        lambda: made(b"(" + name("posix", "system") + text(TOUCH) + b"o"),
        "calls for posix.system",
    ),
    "NEWOBJ": (lambda: made(name("torch", "Size") + b")\x81"), "instruction 0x81"),
    "extension registry": (lambda: made(b"\x82\x01"), "instruction 0x82"),
    "stack global": (lambda: made(text("os") + text("system") + b"\x93"), "instruction 0x93"),
    "__setstate__": (lambda: saved({"x": SetsState()}), LOUD),
    "attributes of a class": (lambda: made(name("torch", "Size") + dict_of(text("x"), b"N") + b"b"), "sets attributes"),
    "attributes of a state dict": (
        lambda: made(ORDERED + dict_of(text("items"), b"N") + b"b"),
        "sets attributes of what is no state dict",
    ),
    "a function as value": (lambda: made(list_of(name("collections", "Counter"))), "a function, class or bare storage"),
    "hooks filled later": (lambda: made(_hooks_filled_later()), "hooks"),
    "pickle of the library itself": (lambda: archive(records(pickle.dumps({"x": 1}, 4))), "protocol 2"),
    "TorchScript": (lambda: archive(records(pickled(b"N"), **{"constants.pkl": b""})), "TorchScript"),
    # what torch.load allows
    "bytearray of 10**12": (lambda: made(call(name("__builtin__", "bytearray"), number(10**12))), LOUD),
    "FloatTensor of 10**12": (lambda: made(call(name("torch", "FloatTensor"), number(10**12))), LOUD),
    "Tensor of 10**12": (lambda: made(call(name("torch", "Tensor"), number(10**12))), LOUD),
    "storage of 10**12": (
        lambda: made(call(name("torch.storage", "UntypedStorage"), number(10**12))),
        "calls what is no function",
    ),
    "set of a memo": (lambda: made(_copies(name("__builtin__", "set"))), "over and over"),
    "Counter of a memo": (lambda: made(_copies(name("collections", "Counter"))), "over and over"),
    "Size of strings": (lambda: made(call(name("torch", "Size"), tuple_of(text("x")))), "garbled"),
    "unknown device": (lambda: made(call(name("torch", "device"), text("\x1b[2J"))), r"does not know: \?\[2J"),
    "sparse": (lambda: saved(torch.eye(3).to_sparse()), "a sparse tensor. Save it dense"),
    "meta": (lambda: saved(torch.empty(3, device="meta")), "on the meta device"),
    "bytes": (lambda: saved({"x": b"abc"}), "holds bytes"),
    # memory and time
    "memo bomb": (lambda: made(b"]r\xff\xff\xff\x7f"), "out of order"),
    "billion laughs": (lambda: made(_laughs()), "unfold"),
    "exponential key": (lambda: made(_exponential_key()), "nor short tuples"),
    "tensor as key": (lambda: made(dict_of(tensor(), b"N")), "nor short tuples"),
    "colliding keys": (lambda: made(_flood()), "too many keys"),
    "many tuples as keys": (lambda: made(_flood_of_tuples()), "too many keys"),
    "lists within lists": (lambda: made(_wrapped(b"](", b"e")), "over 100 deep"),
    "tuples within tuples": (lambda: made(_wrapped(b"", b"\x85")), "over 100 deep"),
    "deep by sharing": (
        lambda: made(b"(]q\0" + b"".join(b"](h" + bytes([n]) + b"eq" + bytes([n + 1]) for n in range(200)) + b"t"),
        "so deep",
    ),
    "list that holds itself": (lambda: made(b"]q\0h\0a"), "holds itself"),
    "LONG4 of 2 GB": (lambda: made(b"\x8b\xff\xff\xff\x7f"), "instruction 0x8b"),
    "text of 4 GB": (lambda: made(b"X\xff\xff\xff\xffabc"), "garbled"),
    "stack without end": (lambda: archive(records(b"\x80\x02" + b"N" * 100_000)), "garbled"),
    "marks without end": (lambda: made(b"(" * 100_000), "garbled"),
    "line without end": (lambda: made(b"c" + b"x" * 100_000), "garbled"),
    "not a byte": (lambda: archive(records(b"")), "protocol 2"),
    "something behind the end": (lambda: archive(records(pickled(b"N") + pickled(b"N"))), "left over"),
    "two values": (lambda: made(b"NN"), "garbled"),
    # tensors
    "stride 0": (lambda: made(tensor((10**12,), (0,))), "declares tensors of 4000000000000 bytes"),
    "stride 0, many times": (
        lambda: made(list_of(*(tensor((10**6,), (0,), of=b"h\0" if n else storage() + b"q\0") for n in range(100)))),
        "declares tensors of 400000000 bytes",
    ),
    "more than its storage": (lambda: made(tensor((5,))), "out of its storage"),
    "offset behind its storage": (lambda: made(tensor((0,), (1,), 5)), "out of its storage"),
    "stride out of its storage": (lambda: made(tensor((2, 2), (3, 1), 1)), "out of its storage"),
    "negative stride": (lambda: made(tensor((4,), (-1,), 3)), "no count: -1"),
    "negative offset": (lambda: made(tensor(offset=-1)), "no count"),
    "negative shape": (lambda: made(tensor((-1,))), "no count"),
    "shape that overflows": (lambda: made(tensor((2**40, 2**40, 0), (1, 1, 1))), "out of its storage"),
    "shape of 2000 bits": (lambda: made(tensor((2**2000,), (0,))), "no count"),
    "65 dimensions": (lambda: made(tensor((1,) * 65, (1,) * 65)), "no shape"),
    "a stride too few": (lambda: made(tensor((2, 2))), "stride"),
    "true as offset": (lambda: made(tensor(offset=77).replace(number(77), b"\x88")), "no count"),
    "elements that are not there": (lambda: made(tensor(of=storage(elements=5))), "which is 16 bytes"),
    "storage that is missing": (lambda: made(tensor(of=storage("7"))), "data/7, which is missing"),
    "storage outside": (lambda: made(tensor(of=storage("../data.pkl"))), "which is missing"),
    "storage of a negative size": (lambda: made(tensor(of=storage(elements=-4))), "no count"),
    "storage of two kinds": (
        lambda: made(list_of(tensor(), tensor(of=storage(kind="IntStorage")))),
        "as two kinds of numbers",
    ),
    "quantized storage": (lambda: made(tensor(of=storage(kind="QInt32Storage"))), LOUD),
    "persistent id that is none": (lambda: made(number(1) + b"Q"), "garbled"),
    # the archive
    "deflated": (lambda: archive(records(pickled(b"N")), method=zipfile.ZIP_DEFLATED), "compressed"),
    "zip bomb": (lambda: archive(records(bytes(50 << 20)), method=zipfile.ZIP_DEFLATED), "compressed"),
    "large pickle": (lambda: archive(records(pickled(b"N" * (64 << 20)))), "besides its tensors"),
    "no data.pkl": (lambda: _without("data.pkl"), "no data.pkl"),
    "no version": (lambda: _without("version"), "no version"),
    "no tensor": (lambda: _without("data/0"), "missing"),
    "another byte order": (lambda: archive(records(pickled(b"N"), byteorder=b"middle")), "neither little nor big"),
    "byte order of a megabyte": (lambda: archive(records(pickled(b"N"), byteorder=b"x" * 10**6)), "too large"),
    "two of a name": (
        lambda: archive(records(pickled(b"N"), **{"DATA.PKL": pickled(b"]")})),
        "two records of one name",
    ),
    "outside of its folder": (lambda: archive(records(pickled(b"N"), **{"../x": b""}), folder=""), "outside"),
    "another archive in its comment": (_two_ends, "does not end where the archive ends"),
    "something before it": (lambda: b"x" * 10 + made(b"N"), "does not begin like a zip"),
    "something behind it": (lambda: made(b"N") + b"x" * 10, "does not stand at its end"),
    "records that overlap": (_overlapping, "overlaps|does not begin"),
    "65535 records": (_many_records, "which cannot be"),
    "zip64 that lies": (_lying_zip64, "two different directories"),
    "record of 4 GB": (
        lambda: _patched(made(b"N"), b"PK\1\2", 20, struct.pack("<LL", 2**32 - 2, 2**32 - 2)),
        "overlaps",
    ),
    "record of zip64 without a size": (
        lambda: _patched(made(b"N"), b"PK\1\2", 20, struct.pack("<LL", 2**32 - 1, 2**32 - 1)),
        "does not give the size",
    ),
    "encrypted": (lambda: _patched(made(b"N"), b"PK\1\2", 8, b"\1\0"), "encrypted"),
    "another name in the directory": (
        lambda: _patched(made(b"N"), b"archive/data.pkl", 8, b"DATA", last=True),
        "not the one that its directory says|no data.pkl",
    ),
    "a folder instead of the pickle": (
        lambda: _patched(made(b"N"), b"PK\1\2", 38, b"\x10", last=False),
        "a folder where a record should be",
    ),
    "on another disk": (lambda: _patched(made(b"N"), b"PK\1\2", 34, b"\1"), "was split"),
    "a directory elsewhere": (lambda: _patched(made(b"N"), b"PK\5\6", 16, b"\0\0\0\0"), "does not end where"),
    # what is no archive
    "nothing": (lambda: b"", "is empty"),
    "zeros": (lambda: bytes(1000), "nothing but zeros"),
    "text": (lambda: b"Hello, world. This is no file of weights.", "does not begin like a zip"),
    "plain pickle": (lambda: pickle.dumps({"x": 1}, 2), "old format"),
    "legacy format": (lambda: _legacy({"x": torch.ones(2)}), r"old format.*torch.save\(torch.load"),
    "the first half": (lambda: made(tensor())[:300], "is cut off"),
}


def _legacy(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()
