"""Stop at a loss that is not a number, or drop its batch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import attrs

from ..checks import whole
from ..means import number, read
from ..state import State
from .backward import backward
from .forward import forward
from .update import update

if TYPE_CHECKING:
    from ..run import Run


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class nan_guard:
    """Stop the run at a loss that is nan or infinite, before it reaches the weights; or drop the batch.

    Stands before ``update``: behind the forward it looks at ``state.loss``, and behind ``clip_grad_norm`` also at
    ``state.grad_norm`` (not under a GradScaler, which handles infinite gradients by itself). After the error the
    iteration is still open: look at ``run.failed.state.batch``, mend the step, and ``run.replace(step)`` and
    ``run.retry()`` go on as if nothing had been, as long as the step has changed nothing but its outputs. BatchNorm
    keeps what it took in.

    A batch that is dropped moves no weights, and is left out of averages. Behind ``backward``, what its accumulation
    window has gathered goes with it. It reads the device once in an iteration that it looks at.

    Args:
        skip: How many batches may be dropped in the whole run, each with a warning; one more stops it.
        every: Look at every *every*-th iteration only. What is not looked at moves the weights.

    Raises:
        FloatingPointError: If loss or gradient norm is not finite, and no more batches may be dropped.

    Example:
        >>> states = [State(phase="train", index=n, loss=torch.tensor(x)) for n, x in enumerate([0.5, float("nan")])]
        >>> for state in nan_guard()(states):
        ...     print(state.loss)
        Traceback (most recent call last):
        ...
        FloatingPointError: nan_guard: loss is nan (iteration 0, epoch 0, batch 1 of train).
    """

    skip: int = attrs.field(default=0, kw_only=True, validator=whole(0))
    every: int = attrs.field(default=1, kw_only=True, validator=whole())
    skipped: int = attrs.field(default=0, init=False, repr=False)

    def on_build(self, run: Run) -> None:
        """See that it stands before the weights are moved."""
        cursor = run.cursor
        if any(slot.part is self for slot in cursor.run_slots):
            raise TypeError("nan_guard: pipe it onto a phase, before optimize; behind whole phases it is too late.")
        for line in cursor.lines.values():
            parts = [slot.part for slot in line]
            if any(part is self for part in parts):
                before = parts[: next(number for number, part in enumerate(parts) if part is self)]
                if isinstance(next(part for part in reversed(before) if isinstance(part, forward | update)), update):
                    raise ValueError(
                        "nan_guard: it stands behind update, where the weights have moved already. Pipe it before "
                        "that: train | lt.nan_guard() | lt.optimize(optimizer)."
                    )

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        for state in states:
            number = state.iteration if state.trains else state.index
            bad = self._look(state) if (number + 1) % self.every == 0 else ""
            if not bad:
                yield state
            else:
                self._drop(state, bad)

    def _look(self, state: State) -> str:
        """What is wrong, in words; empty if nothing is."""
        if state.grad_norm is None and (state.loss is None or math.isfinite(number(state.loss))):
            return ""
        values: dict[str, Any] = {"loss": state.loss, "grad_norm": state.grad_norm}
        numbers = read({name: value for name, value in values.items() if value is not None})
        bad = {name: number for name, number in numbers.items() if not math.isfinite(number)}
        if "grad_norm" in bad and any(getattr(part, "scaler", None) is not None for part in self._parts_before(state)):
            del bad["grad_norm"]  # update skips the step, and the scaler goes down
        return " and ".join(f"{name} is {number}" for name, number in bad.items())

    def _parts_before(self, state: State) -> list[Any]:
        """The parts between the forward that made the loss and this one."""
        found: list[Any] = []
        for slot in state.run.cursor.line if state.run is not None else ():
            if slot.part is self:
                break
            found = [] if slot.part is state.forwarded else [*found, slot.part]
        return found

    def _drop(self, state: State, bad: str) -> None:
        """Count it, say it, and see that nothing of it stays; or raise."""
        where = f"iteration {state.iteration}, epoch {state.epoch}, batch {state.index} of {state.phase}"
        for part in self._parts_before(state):
            if isinstance(part, backward):
                part.filled = 0  # the gradients in its open window are spoilt; the next batch opens a new one
        if self.skipped >= self.skip:
            self._refuse(state, f"nan_guard: {bad} ({where}).")
        self.skipped += 1
        warnings.warn(
            f"nan_guard: {bad} ({where}); the batch was dropped, {self.skipped} of at most {self.skip}.", stacklevel=3
        )

    def _refuse(self, state: State, what: str) -> None:
        budget = f" Dropped before: {self.skipped}." if self.skipped else ""
        if state.run is None:
            cure = ""
        elif state.committed:
            cure = f" Look at run.failed.state.batch; run.skip() drops it. It cannot be redone: {state.committed}."
        else:
            cure = (
                " Look at run.failed.state.batch; mend the step, and run.replace(step) and run.retry() redo this "
                "iteration; or run.skip() drops the batch."
            )
        raise FloatingPointError(what + budget + cure)
