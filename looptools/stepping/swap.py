"""Change a run's pipe while it runs: put parts in, take them out, or have states pass them by."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import ref

import attrs

from ..checkpoints.changes import Made, changes_of, note, this_pass
from ..cursor import Cursor
from ..links import Slot
from ..middleware.average import average
from ..middleware.backward import backward
from ..middleware.forward import forward
from ..middleware.update import update
from ..options import given
from ..order import doubts, refusals
from ..pipeline import Middleware, check, flatten, fresh, name_of
from ..warn import warn
from .names import find_slot
from .rebuilt import begin, close, line_up, rebuilt, require_between, without


def insert(cursor: Cursor, part: Middleware, *, before: str | None, after: str | None) -> None:
    """Put *part* in, next to the one that is named; a chain's parts one after the other.

    In an open iteration it still sees the state if that has not come past its place. It is called as when it is piped
    on, and its ``on_build``, ``on_start`` and ``on_pass`` are called if these are over.

    Raises:
        TypeError: If not exactly one of *before* and *after* is given, or *part* is no middleware.
        LookupError: If there is no such part, or several match.
        ValueError: If the pipe's order would not be right then; nothing has changed.
    """
    if (before is None) is (after is None):
        raise TypeError(
            'insert: give one of before= and after=, the name of a part: run.insert(part, before="update").'
        )
    check(part, "insert")
    named = _find(cursor, before if after is None else after, "insert")
    line = _scope(cursor, named)
    if after is not None and isinstance(named.part, average) and named is line[-1]:
        raise ValueError(
            f"insert: {named.name} comes last, so that it averages what all others write. "
            f"Put it before: run.insert({name_of(part)}, before={named.name!r}); behind it, parts of the run follow."
        )
    slots = list(_slots(cursor, named, line, part))
    with rebuilt(cursor, "insert") as then:
        at = line.index(named) + (after is not None)
        line[at:at] = slots
        then += [functools.partial(begin, cursor, slot) for slot in slots]
    where = f"before {named.name}" if after is None else f"after {named.name}"
    for slot in slots:
        note(cursor, "insert", slot.name, f"{described(slot.part)}, {where}")


def _slots(cursor: Cursor, named: Slot, line: list[Slot], part: Middleware) -> Iterator[Slot]:
    """A place for each new part, under names that are free: those that are taken stay."""
    taken = {slot.name for slot in line}
    for word, one in flatten([part]):
        name = plain = f"{named.name.partition('/')[0]}/{word}"
        number = 1
        while name in taken:
            number += 1
            name = f"{plain}#{number}"
        taken.add(name)
        yield Slot(name, fresh(one), cursor._refill, named.of_run)


def remove(cursor: Cursor, name: str) -> None:
    """Take a part out, and close it; in an open iteration the one behind it comes next, also where it failed.

    Raises:
        LookupError: If there is no such part, or several match.
        ValueError: If a phase cannot do without it, or the pipe's order would not be right then; nothing has changed.
    """
    slot = _find(cursor, name, "remove")
    if isinstance(slot.part, average):
        raise ValueError(f"remove: {slot.name} writes run.results and run.history, which others read, so it stays.")
    if _is_only_forward(cursor, slot):
        raise ValueError(
            f"remove: {slot.name} calls the step, which is what the phase is for. Another step: "
            f"run.replace({slot.name!r}, step)."
        )
    what = described(slot.part)
    with rebuilt(cursor, "remove"):
        _scope(cursor, slot).remove(slot)
        for other in cursor.slots:  # what it has put around others, as leak_guard does
            guard = getattr(other.guard, "func", other.guard)
            if guard is not None and guard.__module__ == type(slot.part).__module__:
                other.guard = None
    note(cursor, "remove", slot.name, what)
    warn_of_window(slot.part, slot.name, "remove")
    without(cursor, slot)
    if hasattr(slot.part, "on_remove"):
        slot.part.on_remove(cursor.run)
    close(cursor, slot, slot.part)


def mute(cursor: Cursor, name: str, on: bool = True) -> None:
    """Have states pass a part by from now on, or let them in again. It keeps its memory, and its generator in a pass.

    It sees no pass end meanwhile: what it does on a pass's last state is left out. A pass that began without it begins
    for it when it hears again. Muting ``update`` keeps the weights as they are.

    Raises:
        LookupError: If there is no such part, or several match.
        ValueError: If a phase cannot do without it; or if what was changed meanwhile does not go with it.
    """
    slot = _find(cursor, name, "mute")
    if slot.muted is bool(on):
        return
    require_between(cursor, "mute")
    if on:
        _require_mutable(cursor, slot)
        _mute(cursor, slot)
    else:
        _unmute(cursor, slot)
    note(cursor, "mute" if on else "unmute", slot.name, described(slot.part))


def _require_mutable(cursor: Cursor, slot: Slot) -> None:
    if isinstance(slot.part, average):
        raise ValueError(f"mute: {slot.name} writes run.results and run.history, which others read, so it stays.")
    if _is_only_forward(cursor, slot):
        raise ValueError(f"mute: {slot.name} calls the step; without it the phase has no loss and no metrics.")
    scaler = slot.part.scaler if isinstance(slot.part, update) else None
    if scaler is not None:
        fills = [s for s in _scope(cursor, slot) if isinstance(s.part, backward) and s.part.scaler is scaler]
        if not all(s.muted for s in fills):
            raise ValueError(
                f"mute: {slot.name} has a GradScaler, which waits for each update of what backward has scaled. To keep "
                f"the weights as they are, mute {fills[0].name}: then there is nothing to update by."
            )


def _mute(cursor: Cursor, slot: Slot) -> None:
    known, state = changes_of(cursor), cursor.state
    if slot in cursor.line:
        known.seen[slot.name] = this_pass(cursor)
        if state is not None and slot in cursor.line[: cursor.at]:
            known.through[slot.name] = ref(state)
    if not cursor.started:
        known.unstarted.add(slot.name)
    slot.muted = True
    line_up(cursor)
    without(cursor, slot)


def _unmute(cursor: Cursor, slot: Slot) -> None:
    known, here, refused, doubted = changes_of(cursor), this_pass(cursor), refusals(cursor), doubts(cursor)
    was_there = here is not None and known.seen.get(slot.name) == here
    line, at = cursor.line, cursor.at
    if not slot.of_run and not was_there:
        cursor.close([slot])  # its generator is one of a pass that is over
    slot.muted = False
    try:
        for message in refusals(cursor):
            if message not in refused:
                raise ValueError(message)
        for message in doubts(cursor):
            if message not in doubted:
                warn(message)
        if cursor.started and slot.name in known.unstarted and hasattr(slot.part, "on_start"):
            slot.part.on_start(cursor.run)
        known.unstarted.discard(slot.name)
        through = known.through.pop(slot.name, None)
        line_up(cursor, slot if through is not None and through() is cursor.state else None)
        if here is not None and not was_there and slot in cursor.line and hasattr(slot.part, "on_pass"):
            slot.part.on_pass(cursor.run)
    except BaseException:
        slot.muted, cursor.line, cursor.at = True, line, at
        raise
    known.seen.pop(slot.name, None)


def changes(cursor: Cursor) -> Made:
    """All that was changed by hand, oldest first: iteration, epoch and phase at the time, verb, part, and what."""
    made = changes_of(cursor).made
    return Made({key: value for key, value in change.items() if key != "code"} for change in made)


def described(part: Any) -> str:
    """A part with the options that it was given."""
    return f"{name_of(part)}({given(part)})" if attrs.has(type(part)) else name_of(part)


# Finding, refusing


def warn_of_window(part: Any, name: str, verb: str) -> None:
    """Say that gradients go with a part that is taken out."""
    filled = getattr(part, "filled", 0) if hasattr(part, "drop_window") else 0
    if filled:
        warn(f"{verb}: the gradients of {filled} batches are in the open window of {name}, and go with it.")


def _find(cursor: Cursor, name: Any, verb: str) -> Slot:
    if isinstance(name, str) and name.rpartition("/")[2] == "batches":
        raise LookupError(f"{verb}: {name} is no part, but the phase's source. It comes first, and stays.")
    return find_slot(cursor, name, verb)


def _scope(cursor: Cursor, slot: Slot) -> list[Slot]:
    """The list of slots that one is in: a phase's, or the run's."""
    return next(line for line in (*cursor.lines.values(), cursor.run_slots) if slot in line)


def _is_only_forward(cursor: Cursor, slot: Slot) -> bool:
    others: Iterable[Slot] = (other for other in _scope(cursor, slot) if other is not slot and not other.muted)
    return isinstance(slot.part, forward) and not any(isinstance(other.part, forward) for other in others)
