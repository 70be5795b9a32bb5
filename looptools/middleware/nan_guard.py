"""Stop at a loss that is not a number, or drop its batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor
from torch.nn import Module

from ..checks import whole
from ..gradients import parameters_of
from ..means import number, read
from ..state import State
from ..warn import warn
from .backward import backward

if TYPE_CHECKING:
    from ..run import Run


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class nan_guard:
    """Stop the run at a loss, or at gradients, that are nan or infinite, before the weights move; or drop the batch.

    Stands before ``update``. Behind the forward it looks at ``state.loss``; behind ``backward``, as in
    ``lt.optimize(optimizer, between=lt.nan_guard())``, at the gradients as well: a finite loss can have gradients that
    are not (of ``sqrt`` at 0). It leaves gradients alone under a GradScaler, which handles them by itself. After the
    error the
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
    _behind: bool = attrs.field(default=False, init=False, repr=False)  # a backward

    def on_build(self, run: Run) -> None:
        """See whether a backward stands before it: then there are gradients to look at."""
        cursor = run.cursor
        if any(slot.part is self for slot in cursor.run_slots):
            raise TypeError("nan_guard: pipe it onto a phase, before optimize; behind whole phases it is too late.")
        for line in cursor.lines.values():
            parts = [slot.part for slot in line]
            at = next((number for number, part in enumerate(parts) if part is self), 0)
            self._behind = self._behind or any(isinstance(part, backward) for part in parts[:at])

    def carry_over(self, old: nan_guard) -> None:
        """Take the place of *old*, and its count of dropped batches."""
        self.skipped, self._behind = old.skipped, old._behind

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
        if not self._behind:
            found = 0.0 if state.loss is None else number(state.loss)
            return "" if math.isfinite(found) else f"loss is {found}"
        values: dict[str, Any] = {"loss": state.loss, "grad_norm": self._grad_norm(state)}
        numbers = read({name: value for name, value in values.items() if value is not None})
        return " and ".join(f"{name} is {found}" for name, found in numbers.items() if not math.isfinite(found))

    def _grad_norm(self, state: State) -> Tensor | None:
        """The norm of the gradients since the last forward; None under a scaler: update skips their step by itself."""
        parts = [part for part in self._parts_before(state) if isinstance(part, backward)]
        if not parts or any(part.scaler is not None for part in parts):
            return None
        if state.grad_norm is not None:
            return state.grad_norm
        gradients = [p.grad for part in parts for p in parameters_of(part.optimizers) if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients) if gradients else None

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
                part.drop_window()  # its gradients are spoilt
        if self.skipped >= self.skip:
            self._refuse(state, f"nan_guard: {bad} ({where}).")
        self.skipped += 1
        warn(f"nan_guard: {bad} ({where}); the batch was dropped, {self.skipped} of at most {self.skip}.")

    def _refuse(self, state: State, what: str) -> None:
        budget = f" Dropped before: {self.skipped}." if self.skipped else ""
        if state.run is None:
            cure = ""
        elif _spoilt(state.model):
            cure = (
                " The weights are not finite already: the gradients of an earlier batch did it, though its loss was. "
                "Look at these too, with lt.optimize(optimizer, between=lt.nan_guard())."
            )
            if state.run.snapshots is not None:
                cure += ' run.back(20); run.until_nonfinite(before="update") goes to where it began.'
        elif state.committed:
            cure = f" Look at run.failed.state.batch. It cannot be redone: {state.committed}."
        else:
            cure = " Look at run.failed.state.batch. Mend the step: run.replace(step), then run.retry()."
        raise FloatingPointError(what + budget + cure)


def _spoilt(model: Any) -> bool:
    """Whether some weight is not finite; the run has stopped anyway, so the device may be waited for."""
    if not isinstance(model, Module):
        return False
    return any(not number(p.detach().isfinite().all()) for p in model.parameters())
