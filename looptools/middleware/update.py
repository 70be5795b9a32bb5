"""Move the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import attrs
import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ..checks import require_optimizer
from ..scaling import settle, step
from ..state import State

MOVED = "update has moved the weights"


def count_update(state: State, optimizer: Optimizer) -> None:
    """Count a move of *optimizer* in the run's progress."""
    if state.run is not None:
        counts = state.run.progress.updates
        counts[optimizer] = counts.get(optimizer, 0) + 1


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

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        for state in states:
            if state.lr is None:
                state.lr = self.optimizer.param_groups[0]["lr"]
            if state.updates:
                state.committed = MOVED
                if self.scaler is None:
                    self.optimizer.step()
                    count_update(state, self.optimizer)
                else:
                    moved = step(self.scaler, self.optimizer)
                    if moved:
                        count_update(state, self.optimizer)
                    state.updates = settle(self.scaler, self.optimizer, moved)
            yield state

    def leaves(self, state: State) -> str:
        """What a failure in the middle of this part can leave behind."""
        return "some of the weights may have moved already, and would move again"
