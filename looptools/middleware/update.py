"""Move the weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ..checks import require_optimizer
from ..gradients import CLOSED, MOVED, OPEN, SKIPPED
from ..scaling import forget_dropped, settle, step
from ..state import State

if TYPE_CHECKING:
    from ..run import Run

HAS_MOVED = "update has moved the weights"


def count_update(state: State, optimizer: Optimizer) -> None:
    """Count a move of *optimizer* in the run's progress."""
    if state.run is not None:
        counts = state.run.progress.updates
        counts[optimizer] = counts.get(optimizer, 0) + 1


def _needs_closure(optimizer: Optimizer) -> bool:
    """Whether its step asks for a closure, as SAM's does."""
    try:
        closure = inspect.signature(optimizer.step).parameters.get("closure")
    except ValueError:
        return False
    return closure is not None and closure.default is inspect.Parameter.empty


def _steps_alone(part: update, field: object, optimizer: Any) -> None:
    if isinstance(optimizer, list | tuple):
        raise TypeError(
            "update: it moves one optimizer. Pipe one on for each, lt.update(first) | lt.update(second), or write "
            "lt.optimize([first, second])."
        )
    require_optimizer("update: optimizer", optimizer)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "update: LBFGS evaluates the loss several times a step (a closure), which update does not do. "
            "Write lt.optimize(lbfgs), or lt.update_by_closure(lbfgs) in place of backward and update."
        )
    if _needs_closure(optimizer):
        kind = type(optimizer).__name__
        raise TypeError(
            f"update: the step of {kind} asks for a closure. Write lt.update_by_closure(optimizer) in place of "
            "backward and update; with gradients_first=True if step wants gradients to be there, as SAM's does."
        )


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class update:
    """Step the optimizer on iterations that update, and count it in ``run.progress.updates``.

    Sets ``state.lr`` to the learning rate in force, unless a schedule did. A GradScaler skips the step where
    gradients are not finite; then nothing is counted and ``state.updates`` is set to False, so that whatever counts
    updates stands still too. (A fused optimizer decides that on the device, unseen; its skipped steps are counted.
    The scaler itself reads the device once.)

    Where one ``backward`` fills the gradients of several optimizers, each has an update of its own. With a scaler one
    may move while another's step is skipped, as in torch's own recipe: each move is counted for itself, the scale
    changes behind the last of them, and ``state.updates`` is then whether any has moved (until then it stays True).
    Where several losses share a scaler (a GAN's), it changes once an iteration too, behind the pipe's last update.

    Args:
        optimizer: The optimizer.
        scaler: The same ``torch.amp.GradScaler`` that ``backward`` has.

    Raises:
        TypeError: If the optimizer cannot step without a closure.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor(3.0))
        >>> weight.grad = torch.tensor(2.0)
        >>> state = next(update(torch.optim.SGD([weight], lr=0.5))([State(phase="train", updates=True)]))
        >>> weight.tolist(), state.lr
        (2.0, 0.5)
    """

    optimizer: Optimizer = attrs.field(validator=_steps_alone, repr=lambda optimizer: type(optimizer).__name__)
    scaler: GradScaler | None = attrs.field(
        default=None, kw_only=True, repr=lambda s: "None" if s is None else "GradScaler"
    )

    _settles: bool = attrs.field(default=True, init=False, repr=False)  # no update behind it shares the scaler
    closes_pass: ClassVar[bool] = True  # the scale changes before a checkpoint at the pass's end

    def on_build(self, run: Run) -> None:
        """Look for other updates with the same scaler: the last one in the pipe has the scale change."""
        for line in run.cursor.lines.values():
            parts = [slot.part for slot in line]
            at = next((number for number, part in enumerate(parts) if part is self), None)
            if at is not None:
                self._settles = not any(isinstance(p, update) and p.scaler is self.scaler for p in parts[at + 1 :])

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        for state in states:
            if state.dropped:
                if self.scaler is not None:
                    forget_dropped(self.scaler, state)
                yield state
                continue
            if state.lr is None:
                state.lr = self.optimizer.param_groups[0]["lr"]
            if state.updates and state.windows.get(self.optimizer) != OPEN:  # another one's may have closed
                state.committed = HAS_MOVED
                if self.scaler is None:
                    self.optimizer.step()
                    count_update(state, self.optimizer)
                    state.windows[self.optimizer] = MOVED
                else:
                    self._scaled_step(self.scaler, state)
            yield state

    def _scaled_step(self, scaler: GradScaler, state: State) -> None:
        """Step unless gradients are not finite; the state updates if one that closed with it has moved, or may."""
        moved = step(scaler, self.optimizer)
        if moved:
            count_update(state, self.optimizer)
        state.windows[self.optimizer] = MOVED if moved else SKIPPED
        windows = state.windows.values()
        state.updates = CLOSED in windows or MOVED in windows
        settle(scaler, self.optimizer, self._settles)

    def leaves(self, state: State) -> str:
        """What a failure in the middle of this part can leave behind."""
        return "some of the weights may have moved already, and would move again" if state.updates else ""
