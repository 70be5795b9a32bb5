"""Walk through an iteration part by part, or stop at one of them."""

from __future__ import annotations

from collections.abc import Iterator

from ..cursor import Cursor
from ..interrupts import interrupts
from ..links import Slot
from ..state import State
from ..tracebacks import short
from .names import find_one, matches


@short
def stages(cursor: Cursor) -> Iterator[tuple[str, State]]:
    """Walk through one iteration, or the rest of the open one; it ends early if another verb has finished that.

    A part that drops its state is brought the next one at once, since it waits for it in the middle of its loop. What
    that one has gone through on its way is told afterwards: no part of it is left out.

    Yields:
        The part's full name, and the state as it left it. Between two, the run is not at work.
    """
    unseen, cursor.unseen = cursor.unseen, None
    if unseen is not None:  # Ctrl-C kept it back when it was finished: there is nothing more to walk through
        yield cursor.part_names[-1], unseen
        return
    if cursor.state is not None and cursor.at >= len(cursor.line) and cursor.failed is None:
        cursor.work(lambda: _finish(cursor))  # left behind its last part: seen already
    if cursor.state is None:
        if not cursor.work(lambda: _begin(cursor)):
            return
        state = cursor.state
        assert state is not None
        yield cursor.part_names[0], state
        if cursor.state is not state:
            return
    while cursor.state is not None and cursor.at < len(cursor.line):
        for name, state in cursor.work(lambda: _one_part(cursor)):
            yield name, state
            if cursor.state is not state:
                return
    if cursor.state is not None:
        cursor.work(lambda: _finish(cursor))


def _begin(cursor: Cursor) -> bool:
    if cursor.failed is not None:
        cursor.go_on()
    if cursor.begin():
        return True
    cursor.conclude()
    return False


def _one_part(cursor: Cursor) -> list[tuple[str, State]]:
    """Have the part that comes next do its turn: returns which parts have seen which state by that."""
    if cursor.failed is not None:
        cursor.go_on()
    before, slot = cursor.state, cursor.line[cursor.at]
    after = cursor.line[cursor.at + 1] if cursor.at + 1 < len(cursor.line) else None
    passes_by = before is not None and before.dropped and not slot.closes
    cursor.advance(after)
    state = cursor.state
    if state is None or passes_by:
        return []
    brought = state is not before and not state.dropped
    return [(name, state) for name in (cursor.part_names[: cursor.at + 1] if brought else [slot.name])]


def _finish(cursor: Cursor) -> None:
    if cursor.failed is not None:
        cursor.go_on()
    cursor.finish()
    if interrupts.pending:
        interrupts.deliver(cursor)


def hear() -> None:
    """Raise the KeyboardInterrupt of a Ctrl-C that came meanwhile: the prompt comes back, the boundary may be far."""
    if interrupts.pending and not interrupts.depth():  # else it is for the run that this one is inside of
        interrupts.deliver()


def after(cursor: Cursor, wanted: str) -> State:
    """Go on until the part *wanted* has seen a state.

    Raises:
        LookupError: If there is no such part, several match, it is muted, or the run ends first.
    """
    require_part(cursor, wanted, "after")
    cursor.unseen = None
    while not cursor.ended:
        for name, state in stages(cursor):
            if not state.dropped and name == find_one(cursor.part_names, wanted, "after"):
                hear()
                return state
    raise LookupError(f"after: the run ended before {wanted!r} came again ({cursor.ended}).")


def before(cursor: Cursor, wanted: str) -> State:
    """Go on until the part *wanted* comes next; at once, if it does already.

    Raises:
        LookupError: As for `after`.
    """
    require_part(cursor, wanted, "before")
    for state in in_front_of(cursor, wanted, "before"):
        hear()
        return state
    raise LookupError(f"before: the run ended before {wanted!r} came again ({cursor.ended}).")


def in_front_of(cursor: Cursor, wanted: str, verb: str) -> Iterator[State]:
    """Go on to the run's end: yields the open state each time that the part *wanted* comes next, now included."""
    cursor.unseen = None
    if cursor.failed is not None and cursor.state is not None:
        cursor.work(cursor.go_on)
    if comes_next(cursor, wanted, verb) and cursor.state is not None:
        yield cursor.state
    while not cursor.ended:
        for _, state in stages(cursor):
            if comes_next(cursor, wanted, verb):
                yield state


def comes_next(cursor: Cursor, wanted: str, verb: str) -> bool:
    """Whether an iteration is open, and the part *wanted* is the next to see it."""
    if cursor.state is None or cursor.state.dropped or cursor.at >= len(cursor.line):
        return False
    return cursor.line[cursor.at].name == find_one(cursor.part_names, wanted, verb)


def require_part(cursor: Cursor, wanted: str, verb: str) -> None:
    """Refuse to wait for a part that no state can come to.

    Raises:
        LookupError: If nothing has that name, or all that have it are muted; or if in every pass several have it.
    """
    first = {} if verb != "after" else {f"{name}/batches": None for name in cursor.passes.names.values()}
    slots: dict[str, Slot | None] = {**first, **{slot.name: slot for slot in cursor.slots}}
    found = matches(slots, wanted)
    if not found:
        raise LookupError(f"{verb}: there is no part {wanted!r}. There are: {', '.join(slots)}.")
    heard = [name for name in found if (slot := slots[name]) is None or not slot.muted]
    if not heard:
        raise LookupError(
            f"{verb}: {found[0]} is muted, so no state comes to it. run.mute({found[0]!r}, False) lets them in again."
        )
    lines = [[slot.name for slot in (*line, *cursor.run_slots) if slot.name in heard] for line in cursor.lines.values()]
    several = [line for line in lines if len(line) > 1]
    if several and not any(len(line) == 1 for line in lines) and len(heard) == len(found):
        find_one(several[0], wanted, verb)
