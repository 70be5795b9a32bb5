"""Swap a part, or the step function that one of them calls, between any two parts of any iteration."""

from __future__ import annotations

from typing import Any

import attrs

from ..cursor import Cursor
from ..links import Slot
from ..middleware.forward import forward
from ..pipeline import Chain, check, fresh, name_of
from .names import find_slot


def replace(cursor: Cursor, *what: Any) -> None:
    """Swap parts: (name, part), (old step's name, step), or a function that has the name of the one it replaces.

    A step goes into every ``forward`` that calls a step of its name. A new part of the same class takes over the
    old one's memory.

    Raises:
        LookupError: If nothing has that name.
        TypeError: If it is called with neither.
    """
    if len(what) == 2 and isinstance(what[0], str):
        steps = [slot for slot in cursor.slots if isinstance(slot.part, forward) and _step_of(slot) == what[0]]
        if steps and callable(what[1]):  # the old step's name
            for slot in steps:
                _swap(cursor, slot, attrs.evolve(slot.part, step=what[1]))
            return
        slot = find_slot(cursor, what[0], "replace")
        new = what[1]
        if isinstance(slot.part, forward) and not isinstance(new, forward):
            new = attrs.evolve(slot.part, step=new)
        _swap(cursor, slot, new)
    elif len(what) == 1 and callable(what[0]):
        _replace_by_name(cursor, what[0])
    else:
        raise TypeError(f"replace: give a name and a part, or a function, got {what!r}.")


def _replace_by_name(cursor: Cursor, function: Any) -> None:
    name = name_of(function)
    found = False
    for slot in cursor.slots:
        part: Any = slot.part
        if isinstance(part, forward) and _step_of(slot) == name:
            _swap(cursor, slot, attrs.evolve(part, step=function))
            found = True
        elif not attrs.has(type(part)) and name_of(part) == name:
            _swap(cursor, slot, function)
            found = True
    if not found:
        steps = dict.fromkeys(filter(None, map(_step_of, cursor.slots)))
        raise LookupError(
            f"replace: no step or part is called {name!r}. Steps are {', '.join(steps) or 'none'}; give the old name "
            f"first: run.replace('{next(iter(steps), 'step')}', {name}), or that of any part: "
            "run.replace('clip_grad_norm', part)."
        )


def _step_of(slot: Slot) -> str:
    """The name of the step that a `forward` calls; empty for any other part."""
    step = slot.part.step if isinstance(slot.part, forward) else None
    return "" if step is None else name_of(step)


def _swap(cursor: Cursor, slot: Slot, new: Any) -> None:
    check(new, "replace")
    if isinstance(new, Chain):
        raise TypeError(f"replace: {name_of(new)} is a chain of parts; a part can be replaced by one part only.")
    new, old = fresh(new), slot.part
    if type(new) is type(old):
        carry_memory(old, new)
    if hasattr(new, "on_build"):
        new.on_build(cursor.run)
    cursor.close([slot])
    if hasattr(old, "close"):
        old.close()
    slot.part = new
    cursor.at_boundary[:] = [_of(new, action) if _owner(action) is old else action for action in cursor.at_boundary]


def _owner(action: Any) -> Any:
    return getattr(action, "__self__", None)


def _of(new: Any, action: Any) -> Any:
    """What the new part does in the place of *action*, a method of the old one that waits for the boundary."""
    return getattr(new, action.__name__, lambda run: None)


def carry_memory(old: Any, new: Any) -> None:
    """Give *new* what *old* remembers."""
    if hasattr(new, "carry_over"):
        new.carry_over(old)
    elif attrs.has(type(new)):
        for field in attrs.fields(type(new)):
            if not field.init and not field.name.startswith("_"):
                value = getattr(old, field.name)
                if hasattr(value, "load_state_dict"):
                    getattr(new, field.name).load_state_dict(value.state_dict())
                else:
                    setattr(new, field.name, value)
