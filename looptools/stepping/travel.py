"""Go back to an earlier iteration, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs

from ..checkpoints.background import Buffers
from ..checkpoints.inventory import inventory
from ..checkpoints.memory import forget_changes, memory, remember
from ..checkpoints.tree import apply
from ..checks import whole_number
from ..cursor import Cursor
from ..generators import set_generators
from ..interrupts import interrupts
from ..pipeline import fresh
from ..scaling import forget
from .horizon import stretch
from .keeper import Keeper
from .snapshots import Pipe, Snapshot

if TYPE_CHECKING:
    from ..run import Run


def back(run: Run, n: int) -> None:
    """Go *n* states back.

    Raises:
        RuntimeError: If no snapshots are kept.
        LookupError: If none is old enough.
    """
    whole_number("back: n", n, 0)
    keeper = _keeper(run, "back")
    wanted = keeper.count_handed() - n
    if n == 0 and run.cursor.state is None and keeper.ring:
        return  # it stands there, and what was done by hand since is not computed away
    found = [one for one in keeper.ring if one.count <= wanted]
    if not found:
        reach = keeper.count - keeper.ring[0].count if keeper.ring else 0
        raise LookupError(
            f"back: {n} iterations are too many; the oldest snapshot is {reach} back. To reach further, keep more: "
            "lt.snapshots(every=..., keep=...)."
        )
    _travel(run, keeper, found[-1], lambda: keeper.count >= wanted, "back")


def replay(run: Run, iteration: int) -> None:
    """Go back to just before a training iteration.

    Raises:
        RuntimeError: If no snapshots are kept.
        LookupError: If none is old enough, or the iteration is still to come.
    """
    whole_number("replay: iteration", iteration, 0)
    keeper = _keeper(run, "replay")
    cursor = run.cursor
    last = keeper.count_handed()
    if iteration > cursor.progress.iteration or (not keeper.ring and not cursor.started):
        raise LookupError(
            f"replay: iteration {iteration} is still to come; {cursor.progress.iteration} are done. "
            f"run.until(iteration={iteration}) goes there."
        )
    if iteration == cursor.progress.iteration and cursor.state is None and keeper.ring:
        return
    found = [one for one in keeper.ring if one.iteration <= iteration]
    if not found:
        oldest = f"before iteration {keeper.ring[0].iteration}" if keeper.ring else "none"
        raise LookupError(
            f"replay: iteration {iteration} is too far back; the oldest snapshot is {oldest}. To reach further, keep "
            "more: lt.snapshots(every=..., keep=...)."
        )
    _travel(
        run, keeper, found[-1], lambda: _comes_next(cursor, iteration) or keeper.count >= last, f"replay({iteration})"
    )


def _comes_next(cursor: Cursor, iteration: int) -> bool:
    """Whether the training iteration of that number is the next one."""
    passes = cursor.passes
    if cursor.progress.iteration != iteration:
        return cursor.progress.iteration > iteration  # it was dropped, within another one
    if passes.phase is not None:
        return passes.plan.trains
    done = cursor.progress
    entry = passes.agenda.upcoming(attrs.evolve(passes.place), done.epoch, done.iteration, done.round)
    return entry is None or entry.trains


def _keeper(run: Run, verb: str) -> Keeper:
    cursor = run.cursor
    cursor.require_rest(verb)
    if cursor.keeper is None or cursor.keeper.options is None:
        raise RuntimeError(
            f"{verb}: this run keeps no snapshots. Switch them on: "
            "lt.workflow(..., snapshots=lt.snapshots(every=50, keep=4)), and run.resume() if it has a checkpoint."
        )
    return cursor.keeper  # type: ignore[no-any-return]


def _travel(run: Run, keeper: Keeper, snapshot: Snapshot, arrived: Callable[[], bool], verb: str) -> None:
    """Stand at *snapshot*, and from there compute again what was computed then, by the parts that were there."""
    cursor, now = run.cursor, Pipe.of(run.cursor)
    _require_sources(cursor, snapshot, verb)
    cursor.rest()
    _set_pipe(run, snapshot.pipe)
    try:
        try:
            _depart(run, keeper, snapshot)
            keeper.replaying = True
            cursor.work(lambda: _recompute(keeper, arrived))
        except BaseException as error:
            keeper.replaying = False
            cursor.rest()
            _depart(run, keeper, snapshot)  # nothing stays half loaded or half done
            error.add_note(
                f"{verb}: given up on the way; the run stands at the snapshot before iteration {snapshot.iteration}."
            )
            raise
    finally:
        keeper.replaying = False
        _arrive(run, keeper, now)


def _depart(run: Run, keeper: Keeper, snapshot: Snapshot) -> None:
    _stand(run, snapshot)
    while keeper.ring[-1] is not snapshot:
        keeper.ring.pop()  # of a future that may not come; where iterations were skipped, of the same count
    keeper.stand_at(snapshot.count)


def _require_sources(cursor: Cursor, snapshot: Snapshot, verb: str) -> None:
    """Refuse to go back over batches that cannot come again."""
    for key, source in cursor.passes.sources.items():
        name = cursor.passes.names[key]
        then = snapshot.tree["sources"].get(name, {})
        if source.goes_once and (source.begun, source.taken) != (then.get("begun", 0), then.get("taken", 0)):
            raise RuntimeError(
                f"{verb}: the source of {name} is a {type(source.given).__name__}, whose batches come once only. Give "
                "a function that makes it anew (lambda: ...), or a list. Nothing was changed."
            )


def _recompute(keeper: Keeper, arrived: Callable[[], bool]) -> None:
    cursor = keeper.cursor
    while not arrived() and cursor.begin():  # behind a pass whose last state is dropped it can stand, too
        cursor.advance()
        if cursor.state is not None:
            cursor.finish()
        keeper.count_handed()
        if interrupts.pending:
            interrupts.deliver(cursor)


def _stand(run: Run, snapshot: Snapshot) -> None:
    cursor = run.cursor
    cursor.state = cursor.unseen = cursor.failed = cursor.handed = None
    cursor.at, cursor.ended = 0, ""
    cursor.at_boundary.clear()
    forget_changes(cursor)
    for scaler in inventory(cursor).scalers.values():
        forget(scaler)
    for slot in cursor.slots:
        if hasattr(slot.part, "on_pass") and attrs.has(type(slot.part)):  # it would be asked to end what is open
            remember(slot.part, memory(fresh(slot.part)))
    for module in inventory(cursor).modules.values():
        for parameter in module.parameters():
            parameter.grad = None  # of an iteration that is still to come; those of an open window are in the tree
    snapshot.beyond.put_back()
    apply(run, Buffers().copy(snapshot.tree))
    snapshot.beyond.put_back()
    for slot in cursor.slots:
        if hasattr(slot.part, "on_back"):
            slot.part.on_back(run)


def _arrive(run: Run, keeper: Keeper, now: Pipe) -> None:
    """From here on everything is as it was, but for the pipe, which is that of today."""
    cursor = run.cursor
    place = keeper.trail.get(keeper.key())
    if cursor.state is None and place is not None:
        set_generators(place[1])
        for slot in cursor.slots:
            if slot.name in place[2]:
                slot.part.rewind(place[2][slot.name])
    _set_pipe(run, now)
    keeper.trail = {key: place for key, place in keeper.trail.items() if place[0] <= keeper.count}
    keeper.stand_at(keeper.count)


def _set_pipe(run: Run, pipe: Pipe) -> None:
    """Have the parts of *pipe* in the run, with the memory of those that they take the place of."""
    cursor = run.cursor
    if pipe.is_that_of(cursor):
        return
    before = {slot.name: slot.part for slot in cursor.slots}
    agenda, phase = cursor.passes.agenda, cursor.passes.phase
    then = {id(slot): part for slot, part, _ in pipe.parts}
    cursor.close([slot for slot in cursor.slots if then.get(id(slot)) is not slot.part])  # generators of other parts
    pipe.put_back(cursor)
    for slot in cursor.slots:
        old: Any = before.get(slot.name)
        if old is None or old is slot.part or type(old) is not type(slot.part):
            continue
        if hasattr(slot.part, "carry_over"):
            slot.part.carry_over(old)
        else:
            remember(slot.part, memory(old))
    if phase is not None:
        cursor.line_up(phase)
    if pipe.agenda is not agenda:
        stretch(run, cursor, pipe.agenda)
