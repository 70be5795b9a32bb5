"""What stands for the things that a ``.pt`` file names, while its pickle is read: nothing here does anything."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from .archive import Refused

LARGEST = 1 << 48  # elements of a tensor, or of a step through it
MOST_DIMENSIONS = 64

_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
}
_SIMPLE = r"float|bfloat|complex|int|uint|bool"  # what a dtype's name begins with; others are quantized or raw bits
REFUSED = {
    "_rebuild_sparse_tensor": "a sparse tensor. Save it dense: tensor.to_dense()",
    "_rebuild_qtensor": "a quantized tensor. Save it dequantized: tensor.dequantize()",
    "_rebuild_meta_tensor_no_storage": "a tensor on the meta device, which has no values",
    "_rebuild_nested_tensor": "a nested tensor. Save the list of its tensors: tensor.unbind()",
    "_rebuild_wrapper_subclass": "a tensor of a class of its own. Save it as a plain tensor",
    "_rebuild_from_type_v2": "a tensor of a class of its own, or with attributes. Save it as a plain tensor",
    "_rebuild_parameter_with_state": "a parameter with attributes. Save its data as a plain tensor",
    "_reconstruct": "a NumPy array. Save it as a tensor: torch.as_tensor(array)",
    "scalar": "a NumPy number. Save it as a plain one: value.item()",
    "encode": "bytes. Save them as a tensor: torch.tensor(list(data), dtype=torch.uint8)",
}


@attrs.frozen
class Outline:
    """What a file says of one of its tensors.

    Args:
        dtype: Kind of its elements.
        shape: Its shape.
        bytes: Of its elements, all of them counted.
        storage: Name of the record that holds them; several tensors may share one.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    bytes: int
    storage: str


class Ordered(dict[Any, Any]):
    """Stands for an ``OrderedDict``; a state dict carries its modules' versions as an attribute."""

    metadata: Any = None


@attrs.frozen
class Call:
    """Stands for a function or class that the file names: `Reading` has a method of this name."""

    name: str


@attrs.frozen
class Kind:
    """Stands for a class of storages; None for untyped bytes."""

    dtype: torch.dtype | None


@attrs.frozen
class Storage:
    """Stands for a storage: the elements of a record."""

    key: str
    dtype: torch.dtype | None
    elements: int


def shown(text: object, most: int = 60) -> str:
    r"""Text out of a file, as it can be printed: on one line, with no control characters, not longer than *most*.

    Example:
        >>> shown("loss\x1b[2J" + "!" * 100, 16)
        'loss?[2J!!!!!...'
    """
    line = "".join(letter if letter.isprintable() else "?" for letter in str(text)[: most + 1])
    return line if len(line) <= most else line[: most - 3] + "..."


def _globals() -> dict[tuple[bytes, bytes], Any]:
    """What a file may name, and what stands for it."""
    names: dict[str, Any] = {
        "collections OrderedDict": Call("ordered"),
        "collections Counter": Call("counter"),
        "__builtin__ set": Call("set_"),
        "builtins set": Call("set_"),
        "torch Size": Call("size"),
        "torch device": Call("device"),
        "torch._utils _rebuild_tensor_v2": Call("tensor"),
        "torch._utils _rebuild_tensor_v3": Call("tensor_of_dtype"),
        "torch._utils _rebuild_parameter": Call("parameter"),
        "torch.storage UntypedStorage": Kind(None),
    }
    names |= {f"torch {name}Storage": Kind(dtype) for name, dtype in _STORAGES.items()}
    for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
        name = str(dtype).removeprefix("torch.")
        if name.startswith(tuple(_SIMPLE.split("|"))):
            names[f"torch {name}"] = dtype
    return {(m.encode(), n.encode()): value for m, n, value in ([*key.split(), v] for key, v in names.items())}


GLOBALS = _globals()


def whole(value: Any) -> int:
    """A count out of a file."""
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise TypeError(f"no count: {shown(value) if isinstance(value, int | str) else type(value).__name__}")
    return value


def whole_numbers(values: Any) -> tuple[int, ...]:
    """A shape out of a file."""
    if type(values) is not tuple or len(values) > MOST_DIMENSIONS:
        raise TypeError("no shape")
    return tuple(map(whole, values))


def _require_marks(marks: Any, dtype: torch.dtype) -> None:
    """See that a tensor bears no mark but those of a lazy conjugation or negation."""
    if marks is None or marks == {}:
        return
    fits = {"conj": dtype.is_complex, "neg": dtype.is_complex or dtype.is_floating_point}
    if type(marks) is not dict or any(type(value) is not bool or not fits.get(key) for key, value in marks.items()):
        raise Refused("holds a tensor with metadata of an unknown kind")


def outline(storage: Any, offset: Any, shape: Any, strides: Any, marks: Any, given: Any) -> Outline:
    """What a tensor would be, if it stays within its storage.

    Args:
        storage: A `Storage`.
        offset: Elements of the storage before its first one.
        shape: Its shape.
        strides: Elements of the storage from one to the next, in each dimension.
        marks: What torch keeps of lazy operations.
        given: Its dtype, if the storage has none.
    """
    if type(storage) is not Storage or (storage.dtype is None) != (type(given) is torch.dtype):
        raise TypeError("a tensor without a storage of its kind")
    dtype: Any = storage.dtype if given is None else given
    _require_marks(marks, dtype)
    shape, strides = whole_numbers(shape), whole_numbers(strides)
    if len(shape) != len(strides):
        raise TypeError("a tensor with a stride too many or too few")
    elements, span, last = 1, 1, whole(offset)
    for length, stride in zip(shape, strides, strict=True):
        elements, span = elements * length, span * (length or 1)
        last += (length - 1) * stride
    there = storage.elements // (dtype.itemsize if storage.dtype is None else 1)
    if (last >= there if elements else offset > there) or span > LARGEST:
        raise Refused(f"holds a tensor of shape {shown(shape)} that reaches out of its storage")
    return Outline(dtype, shape, elements * dtype.itemsize, storage.key)
