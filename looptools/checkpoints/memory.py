"""What a part remembers, and how it gets it back."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import attrs
import torch
from torch import Tensor

from ..cursor import Cursor

Before = tuple[Any, dict[str, Any]]  # a part of a plain class, and its attributes when the run was built

GROWING = (set, bytearray, deque, defaultdict, Counter, OrderedDict)
_BUILT: WeakKeyDictionary[Cursor, dict[str, Before]] = WeakKeyDictionary()


def note_parts(cursor: Cursor) -> None:
    """Look at the parts of plain classes when the run is built: what changes from then on is their memory."""
    plain = [slot for slot in cursor.slots if _is_plain(slot.part)]
    _BUILT[cursor] = {slot.name: (slot.part, _copied(_open(slot.part))) for slot in plain}


def memories(cursor: Cursor) -> dict[str, dict[str, Any]]:
    """What all parts remember, by name.

    Of a part of a plain class that is what has changed of its attributes since the run was built; those with an
    underscore are left out, as for all parts.
    """
    found = {}
    for slot in cursor.slots:
        noted, before = _BUILT.get(cursor, {}).get(slot.name, (None, {}))
        if noted is slot.part:
            found[slot.name] = {k: v for k, v in _open(noted).items() if k not in before or not _same(before[k], v)}
        else:  # else a function, or it was replaced by a part of a plain class
            found[slot.name] = memory(slot.part)
    return found


def memory(part: Any) -> dict[str, Any]:
    """What a part says that it remembers: its ``state_dict()``, or its attrs fields that are neither options nor begin
    with an underscore.
    """
    if hasattr(part, "state_dict"):
        return dict(part.state_dict())
    if not attrs.has(type(part)):
        return {}
    fields = [field.name for field in attrs.fields(type(part)) if not field.init and not field.name.startswith("_")]
    values = {name: getattr(part, name) for name in fields}
    return {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in values.items()}


def remember(part: Any, values: Mapping[str, Any]) -> None:
    """Give a part back what `memory` gave."""
    if hasattr(part, "load_state_dict"):
        part.load_state_dict(values)
        return
    for name, value in values.items():
        held: Any = getattr(part, name, None)
        if hasattr(held, "load_state_dict"):
            held.load_state_dict(value)
        else:
            setattr(part, name, value)


def _is_plain(part: Any) -> bool:
    """Whether a part is neither a function nor of a class that says what its memory is."""
    told = attrs.has(type(part)) or hasattr(part, "state_dict")
    return not (told or inspect.isroutine(part) or isinstance(part, functools.partial))


def _open(part: Any) -> dict[str, Any]:
    return {name: value for name, value in getattr(part, "__dict__", {}).items() if name[0] != "_"}


def _copied(value: Any) -> Any:
    """A copy of what may be changed in place; all else is known by identity."""
    if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
        return value.detach().clone()
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return copy.copy(value) if type(value) in GROWING or hasattr(value, "tobytes") else value


def _same(before: Any, now: Any) -> bool:
    if before is now:
        return True
    if type(before) is not type(now):
        return False
    if isinstance(now, Tensor):
        return before.shape == now.shape and before.dtype == now.dtype and torch.equal(before, now)
    if type(now) is dict:
        return list(before) == list(now) and all(_same(before[key], now[key]) for key in now)
    if type(now) in (list, tuple):
        return len(before) == len(now) and all(map(_same, before, now))
    if hasattr(now, "tobytes"):  # an array of NumPy's
        return bool(before.shape == now.shape and before.tobytes() == now.tobytes())
    return (type(now) in GROWING or type(now) in (str, int, float, bool, complex, bytes)) and bool(before == now)
