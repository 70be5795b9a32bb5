"""Read the pickle inside a ``.pt`` file without doing what it says.

Pickles are programs. `Reading` knows only the instructions that ``torch.save`` writes for weights and plain values,
calls nothing that a file names, and gives an `Outline` where a tensor would be. Each of its bounds answers a small file
that would otherwise take long or much memory, here or in `torch.load`, which does the same steps afterwards.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .archive import Refused
from .bounds import require_small
from .stand_ins import GLOBALS, REFUSED, Call, Kind, Ordered, Outline, Storage, outline, shown, whole, whole_numbers

__all__ = ["Outline", "Reading", "shown"]

SMALL_KEY = 1 << 24  # whole numbers below are spread well over a dictionary; larger ones can be chosen to collide
MOST_UNUSUAL, MOST_ALIKE = 20_000, 64  # keys that are neither text nor small numbers; those of one hash
LONGEST_KEY = 16  # parts of a tuple as key: it is hashed anew at each use
UNFOLDED = 10  # values a byte of the pickle, where those that are shared count at each place


class Reading:
    """One reading of a pickle.

    Args:
        data: Its bytes.
        records: Bytes of each record that may hold a storage, by its name.

    Attributes:
        tensors: Outlines of all tensors, in the order in which they come.
        storages: Records that were asked for, by name: their dtype, and their number of elements.
    """

    def __init__(self, data: bytes, records: Mapping[str, int]) -> None:
        self.data, self.records = data, records
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: list[Any] = []
        self.tensors: list[Outline] = []
        self.storages: dict[str, Storage] = {}
        self._hooks: list[Ordered] = []
        self._copied = self._unusual = 0
        self._alike: Counter[str] = Counter()

    def read(self) -> Any:
        """Go through the pickle once, and return the tree that it makes.

        Raises:
            Refused: If it holds anything but tensors and plain values, or more than its bytes can hold.
        """
        data, steps = self.data, _STEPS
        if data[:2] != b"\x80\x02":
            raise Refused("holds a pickle of another kind than torch.save writes (protocol 2)")
        self.at = 2
        try:
            while (code := data[self.at]) != _STOP:
                self.at += 1
                step = steps.get(code)
                if step is None:
                    raise Refused(
                        f"holds the pickle instruction {code:#04x}, which weights and plain values do not need"
                    )
                step(self)
            (tree,) = self.stack
        except (IndexError, KeyError, ValueError, TypeError, struct.error) as error:
            raise Refused(f"holds a pickle that is cut off or garbled at its byte {self.at} ({shown(error)})") from None
        if self.marks or self.at + 1 != len(data):
            raise Refused("holds a pickle with something left over")
        if any(self._hooks):
            raise Refused("holds tensors with hooks, which are functions")
        require_small(tree, UNFOLDED * len(data) + 100_000)
        return tree

    # What stands in the bytes

    def _take(self, count: int) -> bytes:
        self.at += count
        if self.at > len(self.data):
            raise IndexError("its end is missing")
        return self.data[self.at - count : self.at]

    def _number(self, form: struct.Struct) -> Any:
        at = self.at
        self.at = at + form.size
        return form.unpack_from(self.data, at)[0]

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _line(self) -> bytes:
        end = self.data.index(b"\n", self.at, self.at + 200)
        line, self.at = self.data[self.at : end], end + 1
        return line

    def _text(self) -> None:
        self.stack.append(str(self._take(self._number(_U32)), "utf-8", "surrogatepass"))

    def _long(self) -> None:
        self.stack.append(int.from_bytes(self._take(self._byte()), "little", signed=True))

    def _global(self) -> None:
        module, name = self._line(), self._line()
        if (module, name) not in GLOBALS:
            what = REFUSED.get(shown(name.decode()))
            if what is not None:
                raise Refused(f"holds {what}")
            full = shown(f"{module.decode()}.{name.decode()}")
            raise Refused(
                f"calls for {full}, which is not among the few things that weights and plain values need. Nothing of "
                "it was run. Where you made the file yourself, save plain numbers, strings and tensors instead"
            )
        self.stack.append(GLOBALS[module, name])

    # What was made before

    def _put(self, place: int) -> None:
        if place != len(self.memo):  # they are numbered in order; a place of choice could make a reader fill gigabytes
            raise Refused("holds a pickle that numbers its values out of order")
        self.memo.append(self.stack[-1])

    # Containers

    def _mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _tuple(self, count: int) -> None:
        items = self.stack[-count:]
        if len(items) != count:
            raise IndexError("too few values")
        self.stack[-count:] = [tuple(items)]

    def _add(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError("values for what is no list")
        self.stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, Ordered, Counter) or len(items) % 2:
            raise TypeError("pairs for what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._require_key(key)
            target[key] = value

    def _set_one(self) -> None:
        pair = self.stack[-2:]
        del self.stack[-2:]
        self._set(pair)

    def _require_key(self, key: Any) -> None:
        """See to a key before it is hashed: nested tuples take exponential time, chosen numbers quadratic."""
        kind = type(key)
        if kind is str or (kind is int and -SMALL_KEY < key < SMALL_KEY) or kind is bool or key is None:
            return
        parts: Any = key if kind is tuple else (key,)
        if len(parts) > LONGEST_KEY or any(type(part) not in (str, int, float, bool, type(None)) for part in parts):
            raise Refused("holds a dictionary or set with keys that are neither text, nor numbers, nor short tuples")
        self._unusual += 1
        alike = self._alike[str(hash(key))] = self._alike[str(hash(key))] + 1
        if self._unusual > MOST_UNUSUAL or alike > MOST_ALIKE:
            raise Refused("holds too many keys that are neither text nor small whole numbers")

    def _copy(self, values: Any, kind: Any) -> Any:
        """A container to be copied; all copies together take no more values than the pickle has bytes."""
        if type(values) is not kind:
            raise TypeError(f"no {kind.__name__} where one should be")
        self._copied += len(values)
        if self._copied > len(self.data):
            raise Refused("copies its values over and over")
        return values

    # What is called

    def _reduce(self) -> None:
        args, call = self.stack.pop(), self.stack[-1]
        if type(call) is not Call or type(args) is not tuple:
            raise Refused("calls what is no function")
        self.stack[-1] = getattr(self, f"make_{call.name}")(*args)

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is not Ordered or type(state) is not dict or list(state) != ["_metadata"]:
            raise Refused("sets attributes of what is no state dict")
        if type(state["_metadata"]) not in (dict, Ordered):
            raise Refused("holds a state dict with metadata of an unknown kind")
        target.metadata = state["_metadata"]

    def make_ordered(self) -> Ordered:
        return Ordered()

    def make_counter(self, values: Any) -> Counter[Any]:
        return Counter(self._copy(values, dict))

    def make_set_(self, values: Any) -> set[Any]:
        for value in self._copy(values, list):
            self._require_key(value)
        return set(values)

    def make_size(self, values: Any) -> torch.Size:
        return torch.Size(whole_numbers(self._copy(values, tuple)))

    def make_device(self, kind: Any, index: Any = None) -> torch.device:
        if type(kind) is not str or (index is not None and not 0 <= whole(index) < 128):
            raise TypeError("no device")
        try:
            return torch.device(kind) if index is None else torch.device(kind, index)
        except RuntimeError:
            raise Refused(f"names a device that torch does not know: {shown(kind)}") from None

    def _storage(self) -> None:
        word, kind, key, location, elements = self.stack.pop()
        known = word == "storage" if type(word) is str else False
        if not known or type(kind) is not Kind or type(key) is not str or type(location) is not str:
            raise Refused("asks for something that is no storage")
        there = self.records.get(key, -1)
        if there != whole(elements) * (kind.dtype.itemsize if kind.dtype else 1):
            what = f"{there} bytes" if there >= 0 else "missing"
            raise Refused(f"asks for {shown(elements)} elements of the record data/{shown(key)}, which is {what}")
        storage = self.storages.setdefault(key, Storage(key, kind.dtype, elements))
        if storage.dtype != kind.dtype:
            raise Refused(f"reads the record data/{shown(key)} as two kinds of numbers")
        self.stack.append(storage)

    def make_tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, marks: Any = None
    ) -> Outline:
        return self._outline(grad, hooks, storage, offset, shape, strides, marks, None)

    def make_tensor_of_dtype(
        self, storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, marks: Any = None
    ) -> Outline:
        return self._outline(grad, hooks, storage, offset, shape, strides, marks, dtype)

    def _outline(self, grad: Any, hooks: Any, *rest: Any) -> Outline:
        if type(grad) is not bool or type(hooks) is not Ordered:
            raise TypeError("a tensor with options of an unknown kind")
        self._hooks.append(hooks)  # the file may fill it later
        made = outline(*rest)
        self.tensors.append(made)
        return made

    def make_parameter(self, data: Any, grad: Any, hooks: Any) -> Outline:
        if type(data) is not Outline or type(grad) is not bool or type(hooks) is not Ordered:
            raise TypeError("no parameter")
        self._hooks.append(hooks)
        return data


def _push(value: Any) -> Callable[[Reading], None]:
    return lambda reading: reading.stack.append(value)


def _new(kind: type) -> Callable[[Reading], None]:
    return lambda reading: reading.stack.append(kind())


def _plain(form: str) -> Callable[[Reading], None]:
    number = struct.Struct(form)
    return lambda reading: reading.stack.append(reading._number(number))


def _last_to_list(reading: Reading) -> None:
    item = reading.stack.pop()
    reading._add([item])


def _tuple_since_mark(reading: Reading) -> None:
    items = tuple(reading._since_mark())  # first: it changes which stack is the open one
    reading.stack.append(items)


_STOP, _U32 = ord("."), struct.Struct("<I")
_STEPS: dict[int, Callable[[Reading], None]] = {
    ord(code): step
    for code, step in {
        "N": _push(None),
        "\x88": _push(True),
        "\x89": _push(False),
        ")": _push(()),
        "]": _new(list),
        "}": _new(dict),
        "J": _plain("<i"),
        "K": lambda reading: reading.stack.append(reading._byte()),
        "M": _plain("<H"),
        "G": _plain(">d"),
        "\x8a": Reading._long,
        "X": Reading._text,
        "c": Reading._global,
        "q": lambda reading: reading._put(reading._byte()),
        "r": lambda reading: reading._put(reading._number(_U32)),
        "h": lambda reading: reading.stack.append(reading.memo[reading._byte()]),
        "j": lambda reading: reading.stack.append(reading.memo[reading._number(_U32)]),
        "(": Reading._mark,
        "t": _tuple_since_mark,
        "\x85": lambda reading: reading._tuple(1),
        "\x86": lambda reading: reading._tuple(2),
        "\x87": lambda reading: reading._tuple(3),
        "a": _last_to_list,
        "e": lambda reading: reading._add(reading._since_mark()),
        "s": Reading._set_one,
        "u": lambda reading: reading._set(reading._since_mark()),
        "R": Reading._reduce,
        "b": Reading._build,
        "Q": Reading._storage,
    }.items()
}
