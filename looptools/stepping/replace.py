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
    """Swap parts: (name, part), or a function that has the name of the one it replaces.

    A step goes into every ``forward`` that calls a step of its name. A new part of the same class takes over the
    old one's memory.

    Raises:
        LookupError: If nothing has that name.
        TypeError: If it is called with neither.
    """
    if len(what) == 2 and isinstance(what[0], str):
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
        if isinstance(part, forward) and part.step is not None and name_of(part.step) == name:
            _swap(cursor, slot, attrs.evolve(part, step=function))
            found = True
        elif not attrs.has(type(part)) and name_of(part) == name:
            _swap(cursor, slot, function)
            found = True
    if not found:
        steps = [name_of(s.part.step) for s in cursor.slots if isinstance(s.part, forward) and s.part.step is not None]
        raise LookupError(
            f"replace: no step or part is called {name!r}. Steps are {', '.join(dict.fromkeys(steps)) or 'none'}; "
            "give the part's name first to swap any other: run.replace('clip_grad_norm', part)."
        )


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
