"""After a failure, or in the middle of an iteration: redo it, or drop it."""

from __future__ import annotations

from ..cursor import Cursor
from ..interrupts import interrupts
from ..scaling import forget_dropped
from ..state import State
from ..warn import warn


def redo(cursor: Cursor) -> None:
    """Take the open iteration back to its batch.

    Raises:
        RuntimeError: If no iteration is open, or it cannot be redone any more.
    """
    state = cursor.state
    if state is None:
        why = "its batch could not be fetched" if cursor.failed is not None else "no iteration is open"
        undo = " run.back(1) undoes the last one." if cursor.keeper is not None and cursor.handed is not None else ""
        raise RuntimeError(f"retry: {why}. " + (undo.strip() if cursor.ended else f"next(run) goes on.{undo}"))
    rolled_back = cursor.keeper is not None and not cursor._counted and cursor.keeper.start_over()
    if not rolled_back and (state.committed or state.dropped or cursor.at >= len(cursor.line)):
        why = state.committed or ("a part has dropped it" if state.dropped else "it is finished")
        with_snapshots = "" if cursor.keeper else " With lt.workflow(..., snapshots=lt.snapshots()) it could be."
        raise RuntimeError(
            f"retry: this iteration cannot be redone: {why}. next(run) goes on where it stopped.{with_snapshots}"
        )
    cursor.overcome(again=True)
    if rolled_back:
        cursor.keeper.go_on()
    else:
        cursor.at = 0
        clear(state)


def clear(state: State) -> None:
    """Leave of an open iteration only its batch."""
    state.outputs = state.loss = state.grad_norm = state.lr = None
    state.updates = False
    state.windows.clear()
    state.metrics.clear()
    state.gauges.clear()


def drop(cursor: Cursor) -> None:
    """Drop the open iteration, or the batch that could not be fetched; the last of a pass still ends it.

    Where the batch's gradients are in an open accumulation window, the window goes with it; a warning says what else is
    in there. If what failed was to be done at the boundary of a complete iteration, that is dropped, and the next
    ``next(run)`` hands the iteration out.

    Raises:
        RuntimeError: If there is nothing to drop.
    """
    failed, state = cursor.failed, cursor.state
    if failed is not None and failed.part.startswith("workflow/"):
        cursor.passes.place.done += 1
    elif failed is not None and failed.part.endswith("/batches") and cursor.passes.phase is not None:
        if cursor.keeper is not None:
            cursor.keeper.pass_over()
        if state is not None:  # it was looked ahead for; the open iteration has its own batch
            cursor.passes.skip_failed()
        else:  # an iteration without a batch, for what the pass's end brings
            cursor.state = cursor.passes.fetch(cursor.run, skip=True)
            _drop(cursor, cursor.state)
    elif state is None:
        raise RuntimeError("skip: no iteration is open; next(run) goes on.")
    elif cursor.at >= len(cursor.line):
        cursor.at_boundary.clear()
        cursor.finish()
        cursor.unseen = None if state.dropped else state
    else:
        _drop(cursor, state)
    cursor.overcome()
    if cursor.keeper is not None:
        cursor.keeper.touched = True  # computed again, it would not be skipped
    if interrupts.pending:
        interrupts.deliver(cursor)


def _drop(cursor: Cursor, state: State) -> None:
    if cursor.keeper is not None and cursor.keeper.start_over():
        cursor.keeper.go_on()
    else:
        _drop_windows(cursor)
    cursor.at += cursor.failed is not None  # past the part that failed; those behind it learn of a pass's end
    cursor.overcome()
    state.dropped = True
    for scaler in {id(s): s for slot in cursor.line if (s := getattr(slot.part, "scaler", None))}.values():
        forget_dropped(scaler, state)  # backward's generator, which would do it, may be closed by now
    if state.last:
        cursor.advance()
    cursor.finish()


def _drop_windows(cursor: Cursor) -> None:
    """A batch whose gradients are in an open window cannot be taken out of it: the window goes with it."""
    for slot in cursor.line[: cursor.at]:
        filled = getattr(slot.part, "filled", 0) if hasattr(slot.part, "drop_window") else 0
        if filled:
            slot.part.drop_window()
        if filled > 1:
            warn(
                f"skip: the gradients of this batch are in the open window of {slot.name} already, so those of "
                f"{filled - 1} before it are dropped too. To keep these, skip before backward."
            )
