"""Values that a checkpoint can hold as they are: plain ones and tensors."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import torch
from torch import Tensor

PLAIN = {str, int, float, bool, type(None), torch.Size, torch.dtype, torch.device}
CONTAINERS = {dict, OrderedDict, Counter, list, tuple, set}
KEYS = {str, int, float, bool, type(None)}
MOST_PARTS, MOST_BITS = 16, 255 * 8 - 1


def is_plain(value: Any) -> bool:
    """Whether `require_plain` lets it pass.

    Example:
        >>> is_plain({"images": torch.zeros(2), "names": ["a", "b"]}), is_plain([print])
        (True, False)
    """
    try:
        require_plain(value, "")
    except TypeError:
        return False
    return True


def require_plain(value: Any, where: str) -> None:
    """Refuse what ``torch.load(weights_only=True)`` would not load, or `read_contents` not let through.

    Raises:
        TypeError: With the place of the value.
    """
    if isinstance(value, Tensor):
        _require_dense(value, where)
    elif type(value) is int and value.bit_length() > MOST_BITS:
        raise TypeError(f"{where} is a whole number of more than 255 bytes, which torch does not load.")
    elif isinstance(value, dict) and type(value) in CONTAINERS:
        for key, item in value.items():
            _require_key(key, where)
            require_plain(item, f"{where}/{key}")
    elif type(value) is set:
        for key in value:
            _require_key(key, where)
    elif type(value) in CONTAINERS:
        for number, item in enumerate(value):
            require_plain(item, f"{where}[{number}]")
    elif type(value) not in PLAIN:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(
            f"{where} is a {kind}, which could not be loaded safely. Keep plain numbers, strings, lists, dictionaries "
            "and tensors, or begin the field's name with _ if it need not be saved."
        )


def _require_dense(tensor: Tensor, where: str) -> None:
    odd = tensor.is_quantized or tensor.is_meta or tensor.is_nested or tensor.layout is not torch.strided
    if odd or type(tensor) not in (Tensor, torch.nn.Parameter):
        raise TypeError(
            f"{where} is a tensor ({type(tensor).__name__}) that is sparse, quantized, without values or of a class of "
            "its own, which could not be loaded safely. Keep it as a plain dense one."
        )


def _require_key(key: Any, where: str) -> None:
    parts = key if type(key) is tuple else (key,)
    if len(parts) > MOST_PARTS or any(type(part) not in KEYS for part in parts):
        raise TypeError(
            f"{where}: the key {key!r:.80} cannot be saved; keys must be strings, numbers or short tuples of them."
        )


def device_of(value: Any) -> str | None:
    """Where the tensors of a plain value are, if not on the CPU, and all at one place.

    Example:
        >>> device_of([torch.zeros(2, device="meta"), "a"])
        'meta'
    """
    found, waiting = set(), [value]
    for inner in waiting:
        if isinstance(inner, Tensor):
            found.add(str(inner.device))
        elif isinstance(inner, list | tuple):
            waiting += inner
        elif isinstance(inner, dict):
            waiting += inner.values()
    return found.pop() if len(found) == 1 and found != {"cpu"} else None
