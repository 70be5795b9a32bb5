"""Fill the gradients."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ..checks import is_optimizer, whole
from ..state import State
from .update import MOVED

if TYPE_CHECKING:
    from ..run import Run


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class backward:
    """Call ``backward`` on the loss, over windows of *accumulate* iterations.

    The gradients of the optimizer's parameters are zeroed when a window opens, just before backward, so that
    they can be looked at after the update. Each loss is divided by the number of iterations in its window; the
    last window of a pass may be shorter. Where the pass does not know its length, a short last window's
    gradients are multiplied up instead when it closes. Sets ``state.updates`` where a window closes. If the last
    state of a pass is dropped before it comes here, an open window makes no update, which is said.

    Args:
        optimizer: Its gradients are zeroed.
        accumulate: Iterations whose gradients make one update.
        scaler: ``torch.amp.GradScaler`` for fp16; gradients are unscaled where a window closes.

    Raises:
        TypeError: If the step gave no loss.
        RuntimeError: If the loss has no graph.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor(3.0))
        >>> sgd = torch.optim.SGD([weight], lr=1.0)
        >>> state = next(backward(sgd)([State(phase="train", loss=2 * weight)]))
        >>> weight.grad, state.updates
        (tensor(2.), True)
    """

    optimizer: Optimizer = attrs.field(validator=is_optimizer, repr=lambda optimizer: type(optimizer).__name__)
    accumulate: int = attrs.field(default=1, kw_only=True, validator=whole())
    scaler: GradScaler | None = attrs.field(
        default=None, kw_only=True, repr=lambda s: "None" if s is None else "GradScaler"
    )
    filled: int = attrs.field(default=0, init=False, repr=False)  # iterations in the open window
    share: int = attrs.field(default=1, init=False, repr=False)  # what their losses are divided by
    _closed: State | None = attrs.field(default=None, init=False, repr=False)  # the last one that was unscaled
    redo_from: ClassVar[str] = "forward"  # after a failure here the graph may be gone

    def on_pass(self, run: Run) -> None:
        """A new pass opens a new window."""
        filled, self.filled = self.filled, 0
        if filled:
            warnings.warn(
                f"backward: the gradients of the last {filled} batches made no update: the last state of their pass "
                "was dropped before it came here.",
                stacklevel=2,
            )

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        for state in states:
            loss: Any = state.loss
            if loss is None or not loss.requires_grad:
                self._refuse(state)
            if state.first:  # in a pipe without a run; there, on_pass does it
                self.filled = 0
            closes = self.filled + 1 >= self.accumulate or state.last  # may fetch a batch: before gradients change
            if not self.filled:
                if self._closed is not None:
                    self._forget_dropped(self._closed)
                self.optimizer.zero_grad()
                length = None if state.plan is None else state.plan.length
                self.share = self.accumulate if length is None else min(self.accumulate, length - state.index)
            if self.share != 1:
                loss = loss / self.share
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            self.filled += 1
            state.updates = closes
            if closes and (self.scaler is not None or self.filled != self.share):
                self._even_out()
            if closes:
                self.filled = 0
            if self.scaler is not None and closes:
                self._closed = state
            if self.accumulate > 1:
                state.committed = "its gradients are in the accumulation window already"
            elif self.scaler is not None:
                state.committed = "its gradients are unscaled already"
            yield state

    def _forget_dropped(self, closed: State) -> None:
        """Tell the scaler, if what it unscaled last was dropped before the update."""
        if closed.dropped and closed.committed != MOVED:
            assert self.scaler is not None
            self.scaler.update()
        self._closed = None

    def updates_in(self, length: int) -> int:
        """Windows that close in a pass of *length* iterations."""
        return -(-length // self.accumulate)

    def leaves(self, state: State) -> str:
        """What a failure in the middle of this part can leave behind."""
        return "part of this batch's gradients may be in the open window already" if self.filled else ""

    def _refuse(self, state: State) -> None:
        where = f"iteration {state.iteration} of {state.phase}"
        if state.loss is None:
            keys = ", ".join(map(str, state.outputs or {})) or "nothing"
            raise TypeError(
                f'backward: the step of {where} gave no loss, but {keys}. Return it, or a mapping with "loss".'
            )
        kind = "" if state.trains else " A validation phase has none; leave optimize out of it."
        raise RuntimeError(
            f"backward: the loss of {where} has no graph. Was it detached, or computed under no_grad()?{kind}"
        )

    def _even_out(self) -> None:
        """Before the update: take the scaler's factor out, and make up for a window that was cut short."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.filled != self.share:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(self.share / self.filled)
