"""Swap a part, or the step function that one of them calls, between any two parts of any iteration."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import attrs

from ..checkpoints.changes import code_of, note
from ..checkpoints.memory import NOTED, memories, memory, remember
from ..cursor import Cursor
from ..links import Slot, raise_all
from ..middleware.forward import forward
from ..pipeline import Chain, check, flatten, fresh, name_of
from .names import find_slot, matches
from .rebuilt import begin, close, in_pass, owner, rebuilt
from .swap import described, warn_of_window


def replace(cursor: Cursor, *what: Any) -> None:
    """Swap parts: (name, part), (old step's name, step), or a function or part that has the name of what it replaces.

    A step goes into every `forward` that calls the step of its name; where two phases call different ones of one name,
    the part has to be named. A function in the place of a ``functools.partial`` of its name keeps what that has bound.

    Memory stays with the name if the new part is of the old one's class, also of one that a cell has defined anew. Of
    another class it begins afresh, as an inserted one does.

    Raises:
        LookupError: If nothing has that name, or different things have.
        TypeError: If it is called with neither.
        ValueError: If the pipe's order would not be right then; nothing has changed.
    """
    if len(what) == 2 and isinstance(what[0], str):
        found = _named(cursor, what[0], what[1])
    elif len(what) == 1 and callable(what[0]) and not isinstance(what[0], Chain):
        found = _of_its_name(cursor, what[0])
    else:
        raise TypeError(f"replace: give a name and a part, or a function, got {what!r}.")
    _swap(cursor, [(slot, _single(new)) for slot, new in found])


def _named(cursor: Cursor, name: str, new: Any) -> list[tuple[Slot, Any]]:
    """Where *new* goes, and as what: to the part of that name, or to those that call the step of that name."""
    parts = matches([slot.name for slot in cursor.slots], name)
    steps = [] if name in parts else [slot for slot in cursor.slots if _step_of(slot) == name]
    if steps and not {slot.name for slot in steps}.issuperset(parts):
        both = f"{', '.join(parts)} is a part, {', '.join(slot.name for slot in steps)} calls a step"
        raise LookupError(f"replace: {name!r} can be two things: {both}. Give the full name of the part.")
    if steps and callable(new):
        _require_one(name, steps, [slot.part.step for slot in steps])
        return [(slot, _calling(slot.part, new)) for slot in steps]
    try:
        slot = find_slot(cursor, name, "replace")
    except LookupError as error:
        known = dict.fromkeys(filter(None, map(_step_of, cursor.slots)))
        error.add_note(f"Steps are {', '.join(known) or 'none'}; a lambda is called 'lambda'.")
        raise
    return [(slot, _calling(slot.part, new) if isinstance(slot.part, forward) else new)]


def _of_its_name(cursor: Cursor, new: Any) -> list[tuple[Slot, Any]]:
    name = name_of(new)
    steps = [slot for slot in cursor.slots if _step_of(slot) == name]
    parts = [slot for slot in cursor.slots if not isinstance(slot.part, forward) and name_of(slot.part) == name]
    if steps and parts:
        raise LookupError(
            f"replace: {name!r} is both the step of {steps[0].name} and the part {parts[0].name}. Say which: "
            f"run.replace({parts[0].name!r}, {name})."
        )
    if not steps and not parts:
        known = dict.fromkeys(filter(None, map(_step_of, cursor.slots)))
        raise LookupError(
            f"replace: no step or part is called {name!r}. Steps are {', '.join(known) or 'none'}; give the old name "
            f"first: run.replace('{next(iter(known), 'step')}', {name}), or that of any part: "
            "run.replace('clip_grad_norm', part)."
        )
    old = [slot.part.step for slot in steps] or [slot.part for slot in parts]
    if not isinstance(new, functools.partial):  # the function within one is redefined
        _require_one(name, steps or parts, list(map(_inner, old)))
        bound = [_bound(one, new) for one in old]
    else:
        _require_one(name, steps or parts, old)
        bound = [new for _ in old]
    others = {slot.name: _step_of(slot) for slot in cursor.slots if isinstance(slot.part, forward)}
    if steps and all(one is there for one, there in zip(bound, old, strict=True)) and len(steps) < len(others):
        slot, step = next((slot, step) for slot, step in others.items() if step != name)
        raise LookupError(
            f"replace: {name} runs in {', '.join(slot.name for slot in steps)} already, and {slot} calls {step}. To "
            f"put it there: run.replace({slot!r}, {name})."
        )
    if steps:
        return [(slot, _calling(slot.part, one)) for slot, one in zip(steps, bound, strict=True)]
    return list(zip(parts, bound, strict=True))


def _step_of(slot: Slot) -> str:
    """The name of the step that a `forward` calls; empty for any other part."""
    step = slot.part.step if isinstance(slot.part, forward) else None
    return "" if step is None else name_of(step)


def _calling(part: forward, step: Any) -> forward:
    """The same `forward` with another step; or another one, if that is what was given."""
    return step if isinstance(step, forward) else attrs.evolve(part, step=step)


def _inner(thing: Any) -> Any:
    while isinstance(thing, functools.partial):
        thing = thing.func
    return thing


def _bound(old: Any, new: Any) -> Any:
    """*new* with the arguments that *old* has bound to what it replaces."""
    if not isinstance(old, functools.partial):
        return new
    return functools.partial(_bound(old.func, new), *old.args, **old.keywords)


def _require_one(name: str, slots: Sequence[Slot], old: Sequence[Any]) -> None:
    """See that all of *slots* have the same thing of that name.

    Raises:
        LookupError: If they do not.
    """
    if not all(_is_same(old[0], other) for other in old):
        where = ", ".join(slot.name for slot in slots)
        raise LookupError(
            f"replace: {where} have different things that are called {name!r}. Say which: "
            f"run.replace({slots[0].name!r}, ...)."
        )


def _is_same(one: Any, other: Any) -> bool:
    """Whether two are one function, if need be of two versions."""
    if one is other or (inspect.ismethod(one) and one == other):
        return True
    functions = inspect.isfunction(one) and inspect.isfunction(other) and "<lambda>" not in one.__qualname__
    return functions and (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def _single(new: Any) -> Any:
    """The part that was given; a recipe may have only one.

    Raises:
        TypeError: If it is none.
    """
    check(new, "replace")
    parts = [part for _, part in flatten([new])]
    if len(parts) != 1:
        raise TypeError(
            f"replace: {name_of(new)} is a chain of {len(parts)} parts; a part can be replaced by one part only. "
            "run.remove(...) and run.insert(...) change several."
        )
    return parts[0]


def _swap(cursor: Cursor, found: Sequence[tuple[Slot, Any]]) -> None:
    """Put each part in its slot: all of them, or none."""
    old = [slot.part for slot, _ in found]
    with rebuilt(cursor, "replace") as then:
        for slot, new in found:
            before, slot_memory = slot.part, _memory(cursor, slot)
            slot.part = fresh(new)
            then.append(functools.partial(_take_over, cursor, slot, before, slot_memory))
    errors: list[BaseException] = []
    for (slot, _), part in zip(found, old, strict=True):
        before, after = described(part), described(slot.part)
        what = f"{before}, redefined" if before == after else f"{before} -> {after}"
        note(cursor, "replace", slot.name, what, (code_of(part), code_of(slot.part)))
        same = _is_of_class(slot.part, part)
        cursor.at_boundary[:] = [
            _of(slot.part, action) if owner(action) is part else action
            for action in cursor.at_boundary
            if same or owner(action) is not part
        ]
        if not same:
            warn_of_window(part, slot.name, "replace")
        try:
            close(cursor, slot, part)
        except BaseException as error:
            errors.append(error)
    raise_all(errors)


def _of(new: Any, action: Any) -> Any:
    """What the new part does in the place of *action*, a method of the old one that waits for the boundary."""
    return getattr(new, action.__name__, lambda run: None)


def _is_of_class(new: Any, old: Any) -> bool:
    """Whether two are of one class, if need be of two versions."""
    kinds = [(type(part).__module__, type(part).__qualname__) for part in (new, old)]
    return type(new) is type(old) or kinds[0] == kinds[1]


def _memory(cursor: Cursor, slot: Slot) -> dict[str, Any]:
    """What the part in *slot* remembers, as a checkpoint would keep it."""
    if hasattr(slot.part, "carry_over"):
        return {}
    alone: Any = SimpleNamespace(slots=[slot], **{NOTED: vars(cursor).get(NOTED, {})})
    return memories(alone)[slot.name]


def _take_over(cursor: Cursor, slot: Slot, old: Any, kept: Mapping[str, Any]) -> None:
    """Have the new part go on where *old* stood; as when a run is resumed, a pass begins before its memory comes."""
    new = slot.part
    if not _is_of_class(new, old):
        begin(cursor, slot)
        return
    within = in_pass(cursor, slot) and not hasattr(new, "carry_over")
    if within and hasattr(new, "on_pass") and not hasattr(new, "on_resume"):
        new.on_pass(cursor.run)
    carry_memory(old, new, kept)
    if within and hasattr(new, "on_resume"):
        new.on_resume(cursor.run)


def carry_memory(old: Any, new: Any, kept: Mapping[str, Any] | None = None) -> None:
    """Give *new* what *old* remembers: of another version of the class, what it has fields for.

    Args:
        old: The part that was there.
        new: The one in its place.
        kept: What *old* remembers, where it cannot say so itself.
    """
    if hasattr(new, "carry_over"):
        new.carry_over(old)
        return
    kept = memory(old) if kept is None else kept
    if attrs.has(type(new)) and not hasattr(new, "load_state_dict"):
        known = {field.name for field in attrs.fields(type(new))}
        kept = {name: value for name, value in kept.items() if name in known}
    remember(new, kept)
