"""After a failure, or in the middle of an iteration: redo it, or drop it."""

from __future__ import annotations

from ..cursor import Cursor
from ..interrupts import interrupts
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
        raise RuntimeError(f"retry: {why}. next(run) goes on.")
    if state.committed or cursor.at >= len(cursor.line):
        why = state.committed or "it is finished"
        raise RuntimeError(f"retry: this iteration cannot be redone: {why}. next(run) goes on where it stopped.")
    cursor.failed = None
    cursor.at = 0
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
        cursor.unseen = state
    else:
        _drop(cursor, state)
    cursor.failed = None
    if interrupts.pending:
        interrupts.deliver(cursor)


def _drop(cursor: Cursor, state: State) -> None:
    _drop_windows(cursor)
    cursor.at += cursor.failed is not None  # past the part that failed; those behind it learn of a pass's end
    cursor.failed = None
    state.dropped = True
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
