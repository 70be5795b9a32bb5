"""Build a run's pipe anew while it runs: all of a change holds, or nothing of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..checkpoints.inventory import inventory, only, require_owners
from ..checkpoints.memory import NOTED, note_parts
from ..cursor import Cursor
from ..interrupts import interrupts
from ..links import Slot, raise_all
from ..middleware.update import update
from ..order import FILL, OWN, doubts, lines, refusals
from ..phases import Phase
from ..warn import warn


@contextmanager
def rebuilt(cursor: Cursor, verb: str) -> Iterator[list[Callable[[], Any]]]:
    """What is done to slots within holds if a run can be built so. If not, the pipe is as before, and works.

    Yields:
        A list for what is to be done once it is built, such as what has new parts begin.
    """
    require_between(cursor, verb)
    before, then = _Before(cursor), list[Callable[[], Any]]()
    try:
        yield then
        _build(cursor, before, verb)
        line_up(cursor)
        for action in then:
            action()
    except BaseException as error:
        before.put_back(cursor)
        if isinstance(error, Exception):
            error.add_note(f"looptools: {verb} has changed nothing.")
        raise


class _Before:
    """A pipe as it was."""

    def __init__(self, cursor: Cursor) -> None:
        self.lines = [(line, list(line)) for line in (*cursor.lines.values(), cursor.run_slots)]
        self.slots = [(slot, slot.part, slot.guard, slot.stream) for slot in cursor.slots]
        self.stand = cursor.line, cursor.at, cursor.failed
        self.noted = dict(vars(cursor).get(NOTED, {}))
        self.optimizer = cursor.run._optimizer
        self.refused, self.doubted, self.filled = refusals(cursor), doubts(cursor), _filled(cursor)

    def put_back(self, cursor: Cursor) -> None:
        old = {id(part) for _, part, _, _ in self.slots}
        new = [slot.part for slot in cursor.slots if id(slot.part) not in old]
        for line, slots in self.lines:
            line[:] = slots
        for slot, part, guard, stream in self.slots:
            slot.part, slot.guard, slot.stream = part, guard, stream
        cursor.line, cursor.at, cursor.failed = self.stand
        vars(cursor)[NOTED], cursor.run._optimizer = self.noted, self.optimizer
        for part in new:
            with contextlib.suppress(Exception):  # what it has opened is let go
                part.close()
        for _, part, *_ in self.slots:
            with contextlib.suppress(Exception):  # they were built so once
                if hasattr(part, "on_build"):
                    part.on_build(cursor.run)


def _build(cursor: Cursor, before: _Before, verb: str) -> None:
    """All that is done when a run is built; what has been said of the pipe before is not said again."""
    for message in (*_unfilled(cursor, before, verb), *refusals(cursor)):
        if message not in before.refused:
            raise ValueError(message)
    require_owners(cursor, verb)
    cursor.run._optimizer = only(inventory(cursor).optimizers)
    note_parts(cursor)
    noted = vars(cursor)[NOTED]
    noted |= {name: old for name, old in before.noted.items() if name in noted and noted[name][0] is old[0]}
    for slot in cursor.slots:
        if hasattr(slot.part, "on_build"):
            slot.part.on_build(cursor.run)
    guarded = {id(slot) for slot, _, guard, _ in before.slots if guard is not None}
    for slot in cursor.slots:
        if slot.guard is not None and slot.stream is not None and id(slot) not in guarded:
            slot.stream = slot.guard(slot.stream, slot.name)
    for message in doubts(cursor):
        if message not in before.doubted:
            warn(message)


def _filled(cursor: Cursor) -> dict[int, Slot]:
    """The updates for which some part fills the gradients, or may."""
    movers = [(line, slot) for line in lines(cursor) for _, slot in line.each({"update"})]
    return {id(slot): slot for line, slot in movers if line.of(FILL, slot) or line.of(OWN)}


def _unfilled(cursor: Cursor, before: _Before, verb: str) -> Iterator[str]:
    now, here = _filled(cursor), set(map(id, cursor.slots))
    for key, slot in before.filled.items():
        if key in here and key not in now and isinstance(slot.part, update):
            yield (
                f"{verb}: nobody would fill the gradients that {slot.name} moves by. Remove that first; to keep the "
                f"weights as they are for a while, run.mute({slot.name!r})."
            )


def begin(cursor: Cursor, slot: Slot) -> None:
    """Tell a new part of what is over: that the run has begun, and the pass that goes through it."""
    if cursor.started and hasattr(slot.part, "on_start"):
        slot.part.on_start(cursor.run)
    if in_pass(cursor, slot) and hasattr(slot.part, "on_pass"):
        slot.part.on_pass(cursor.run)


def in_pass(cursor: Cursor, slot: Slot) -> bool:
    """Whether the pass under way goes through the part."""
    return cursor.passes.phase is not None and slot in cursor.line


def close(cursor: Cursor, slot: Slot, part: Any) -> None:
    """End the generator in *slot*, and close *part*, which is not in the run any more.

    Raises:
        BaseException: What they raise; both are closed all the same.
    """
    errors: list[BaseException] = []
    for action in (lambda: cursor.close([slot]), getattr(part, "close", None)):
        try:
            if action is not None:
                action()
        except BaseException as error:
            errors.append(error)
    raise_all(errors)


# Where the run stands


def require_between(cursor: Cursor, verb: str) -> None:
    """Refuse to change the pipe while a part is at work; a function of the workflow may.

    Raises:
        RuntimeError: If one is.
    """
    within = cursor.state is not None or any(slot.waiting for slot in cursor.slots)
    if within and cursor._working and interrupts.calls(cursor):
        raise RuntimeError(
            f"{verb}: a part is at work. Change the pipe between two iterations, or where run.before(...), "
            "run.after(...) or run.stages() stop."
        )


def line_up(cursor: Cursor, through: Slot | None = None) -> None:
    """After the slots have changed: stand in the new line where it stood in the old one.

    What stands right behind the last part that the open state has gone through comes next; a part that failed stays the
    one that comes next.

    Args:
        cursor: The run's machine.
        through: A part that the state has gone through, though it is not in the old line.
    """
    old, at, failed = cursor.line, cursor.at, cursor.failed
    if not old:
        return
    names, name = cursor.passes.names, cursor.passes.plan.phase
    phase = next(phase for phase in cursor.passes.agenda.phases if names[id(phase)] == name)
    assert isinstance(phase, Phase)
    cursor.line_up(phase)
    line = cursor.line
    if cursor.state is None:
        return
    if cursor._counted or (failed is not None and at >= len(old)):  # complete, but for what failed at its boundary
        cursor.at = len(line)
        return
    where = "" if failed is None else failed.part
    for slot in old[at : at + 1]:
        if slot in line and (slot.name == where or where.endswith("/batches")):
            cursor.at = line.index(slot)
            return
    passed = [number for number, slot in enumerate(line) if slot in old[:at] or slot is through]
    cursor.at = passed[-1] + 1 if passed else 0


def without(cursor: Cursor, slot: Slot) -> None:
    """Nobody waits for the part any more: neither a failure, nor what it wanted done at the boundary."""
    if cursor.failed is not None and cursor.failed.part == slot.name:
        cursor.failed = None
        if cursor.keeper is not None:
            cursor.keeper.go_on()
    cursor.at_boundary[:] = [action for action in cursor.at_boundary if owner(action) is not slot.part]


def owner(action: Any) -> Any:
    """The part whose method an action is."""
    return getattr(action, "__self__", None)
