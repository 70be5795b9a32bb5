"""Walk through an iteration part by part, or stop at one of them."""

from __future__ import annotations

from collections.abc import Iterator

from ..cursor import Cursor
from ..interrupts import interrupts
from ..state import State
from .names import find_one, matches


def stages(cursor: Cursor) -> Iterator[tuple[str, State]]:
    """Walk through one iteration, or the rest of the open one.

    Yields:
        The part's full name, and the state as it left it. Between two, the run is not at work.
    """
    unseen, cursor.unseen = cursor.unseen, None
    if unseen is not None:  # Ctrl-C kept it back when it was finished: there is nothing more to walk through
        yield cursor.line[-1].name, unseen
        return
    if cursor.state is not None and cursor.at >= len(cursor.line) and cursor.failed is None:
        cursor.work(lambda: _finish(cursor))  # left behind its last part: seen already
    if cursor.state is None:
        cursor.failed = None
        if not cursor.work(cursor.begin):
            cursor.work(cursor.conclude)
            return
        assert cursor.state is not None
        yield f"{cursor.passes.plan.phase}/batches", cursor.state
    while cursor.state is not None and cursor.at < len(cursor.line):
        if cursor.failed is not None:
            cursor.go_on()
        slot = cursor.line[cursor.at]
        after = cursor.line[cursor.at + 1] if cursor.at + 1 < len(cursor.line) else None
        cursor.work(lambda: cursor.advance(after))  # noqa: B023 (called at once)
        if cursor.state is not None:
            yield slot.name, cursor.state
    if cursor.state is not None:
        cursor.work(lambda: _finish(cursor))


def _finish(cursor: Cursor) -> None:
    cursor.failed = None
    cursor.finish()
    if interrupts.pending:
        interrupts.deliver(cursor)


def after(cursor: Cursor, wanted: str) -> State:
    """Go on until the part *wanted* has seen a state.

    Raises:
        LookupError: If there is no such part, several match, or the run ends first.
    """
    _require(cursor, wanted, "after")
    while not cursor.ended:
        for name, state in stages(cursor):
            if name == find_one(cursor.part_names, wanted, "after"):
                return state
    raise LookupError(f"after: the run ended before {wanted!r} came again ({cursor.ended}).")


def before(cursor: Cursor, wanted: str) -> State:
    """Go on until the part *wanted* comes next; at once, if it does already.

    Raises:
        LookupError: If there is no such part, several match, or the run ends first.
    """
    _require(cursor, wanted, "before")
    if cursor.state is not None and _comes_next(cursor, wanted):
        return cursor.state
    while not cursor.ended:
        for _, state in stages(cursor):
            if _comes_next(cursor, wanted):
                return state
    raise LookupError(f"before: the run ended before {wanted!r} came again ({cursor.ended}).")


def _comes_next(cursor: Cursor, wanted: str) -> bool:
    upcoming = cursor.line[cursor.at].name if cursor.at < len(cursor.line) else None
    return upcoming is not None and upcoming == find_one(cursor.part_names, wanted, "before")


def _require(cursor: Cursor, wanted: str, verb: str) -> None:
    batches = [] if verb == "before" else [f"{name}/batches" for name in cursor.passes.names.values()]
    names = [*batches, *(slot.name for slot in cursor.slots)]
    if not matches(names, wanted):
        raise LookupError(f"{verb}: there is no part {wanted!r}. There are: {', '.join(names)}.")
