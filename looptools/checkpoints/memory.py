"""What a part remembers, and how it gets it back."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..cursor import Cursor
from ..middleware.forward import forward

Before = tuple[Any, dict[str, Any]]  # a part of a plain class, and its attributes when the run was built

LIBRARY = __name__.partition(".")[0]
SCALARS = (str, int, float, bool, type(None))
GROWING = (set, bytearray, deque, defaultdict, Counter, OrderedDict)
NOTED = "noted by checkpoints"


def note_parts(cursor: Cursor) -> None:
    """Look at the parts of plain classes when the run is built: what changes from then on is their memory."""
    plain = {slot.name: slot.part for slot in cursor.slots if _is_plain(slot.part)}
    noted = {name: (thing, _copied(_open(thing))) for name, thing in {**plain, **_held(cursor)}.items()}
    vars(cursor)[NOTED] = noted  # there, and not under a weak key: a part may hold the run, which would never go then


def _noted(cursor: Cursor, name: str) -> Before:
    """The object called so when the run was built, and its attributes then."""
    noted: dict[str, Before] = vars(cursor).get(NOTED, {})
    return noted.get(name, (None, {}))


def _held(cursor: Cursor) -> dict[str, Any]:
    """Objects of the user's own that are no parts, but may remember something: steps and the models' modules."""
    held: dict[str, Any] = {}
    for slot in cursor.slots:
        if isinstance(slot.part, forward):
            step = getattr(slot.part.step, "__self__", slot.part.step)
            if step is not None and not isinstance(step, Module) and _is_plain(step):
                held[f"{slot.name}/step"] = step
        elif attrs.has(type(slot.part)) and type(slot.part).__module__.partition(".")[0] != LIBRARY:
            held[f"{slot.name}/options"] = slot.part
    for phase in cursor.passes.agenda.phases:
        modules = phase.model.named_modules() if isinstance(phase.model, Module) else ()
        held |= {f"{cursor.passes.names[id(phase)]}/model/{path}": module for path, module in modules}
    return held


def held_memories(cursor: Cursor) -> dict[str, dict[str, Any]]:
    """What has changed since the run was built: attributes of steps and modules, options of the user's parts."""
    found = {}
    for name, thing in _held(cursor).items():
        noted, before = _noted(cursor, name)
        if noted is thing:
            changed = {k: v for k, v in _open(thing).items() if k not in before or not _same(before[k], v)}
            if changed:
                found[name] = changed
    return found


def remember_held(cursor: Cursor, held: Mapping[str, Mapping[str, Any]]) -> None:
    """Give back what `held_memories` gave."""
    here = _held(cursor)
    for name in held.keys() & here.keys():
        for key, value in held[name].items():
            setattr(here[name], key, value)


def memories(cursor: Cursor) -> dict[str, dict[str, Any]]:
    """What all parts remember, by name.

    Of a part of a plain class that is what has changed of its attributes since the run was built; those with an
    underscore are left out, as for all parts.
    """
    found = {}
    for slot in cursor.slots:
        noted, before = _noted(cursor, slot.name)
        if noted is slot.part:
            found[slot.name] = {k: v for k, v in _open(noted).items() if k not in before or not _same(before[k], v)}
        else:  # else a function, or it was replaced by a part of a plain class
            found[slot.name] = memory(slot.part)
    return found


def forget_changes(cursor: Cursor) -> None:
    """Give all objects of plain classes the attributes that they had when the run was built."""
    noted: dict[str, Before] = vars(cursor).get(NOTED, {})
    for thing, before in noted.values():
        for name, value in _open(thing).items():
            if name not in before:
                delattr(thing, name)
            elif not _same(before[name], value):
                setattr(thing, name, _as_it_was(before[name]))


def _as_it_was(before: Any) -> Any:
    if isinstance(before, _Seen):
        vars(before.thing).update(before.plain)
        return before.thing
    if type(before) is dict:
        return {key: _as_it_was(item) for key, item in before.items()}
    if type(before) in (list, tuple):
        return type(before)(map(_as_it_was, before))
    return _copied(before)


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


def _open(thing: Any) -> dict[str, Any]:
    """Attributes without an underscore: of a module plain values, of an attrs part its options, of all else any."""
    if attrs.has(type(thing)):
        names = [field.name for field in attrs.fields(type(thing)) if field.init and not field.name.startswith("_")]
        held = {name: getattr(thing, name, None) for name in names}
        return {name: value for name, value in held.items() if type(value) in SCALARS}
    held = {name: value for name, value in getattr(thing, "__dict__", {}).items() if name[0] != "_"}
    if isinstance(thing, Module):
        return {name: value for name, value in held.items() if type(value) in SCALARS and name != "training"}
    return held


def _copied(value: Any) -> Any:
    """A copy of what may be changed in place; all else is known by identity."""
    if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
        return value.detach().clone()
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    if type(value) in GROWING or hasattr(value, "tobytes"):
        return copy.copy(value)
    return _Seen(value) if _is_own(value) else value


class _Seen:
    """An object of a user's class, and its plain attributes when it was looked at."""

    def __init__(self, thing: Any) -> None:
        self.thing, self.plain = thing, _scalars(thing)


def _scalars(thing: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(thing).items() if type(value) in SCALARS}


def _is_own(value: Any) -> bool:
    """Whether it is an object of a class of the user's, which may change in place."""
    kind = type(value)
    known = (Module, Optimizer, type, GradScaler, LRScheduler)
    home = kind.__module__.partition(".")[0]
    return hasattr(value, "__dict__") and home not in (LIBRARY, "torch", "builtins") and not isinstance(value, known)


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, _Seen):
        return before.thing is now and before.plain == _scalars(now)
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
