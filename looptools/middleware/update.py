"""Move the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import attrs
import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ..checks import is_optimizer
from ..state import State


def _steps_alone(part: update, field: object, optimizer: Optimizer) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("update: LBFGS evaluates the loss several times a step (a closure), which update does not do.")


MOVED = "update has moved the weights"


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class update:
    """Step the optimizer on iterations that update, and count it in ``run.progress.updates``.

    Sets ``state.lr`` to the learning rate in force, unless a schedule did. A GradScaler skips the step where
    gradients are not finite; then nothing is counted and ``state.updates`` is set to False. (A fused optimizer
    decides that on the device, unseen; its skipped steps are counted. The scaler itself reads the device once.)

    Args:
        optimizer: The optimizer.
        scaler: The same ``torch.amp.GradScaler`` that ``backward`` has.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor(3.0))
        >>> weight.grad = torch.tensor(2.0)
        >>> state = next(update(torch.optim.SGD([weight], lr=0.5))([State(phase="train", updates=True)]))
        >>> weight.tolist(), state.lr
        (2.0, 0.5)
    """

    optimizer: Optimizer = attrs.field(
        validator=[is_optimizer, _steps_alone], repr=lambda optimizer: type(optimizer).__name__
    )
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
                else:
                    state.updates = self._scaled_step(self.scaler)
                if state.updates and state.run is not None:
                    counts = state.run.progress.updates
                    counts[self.optimizer] = counts.get(self.optimizer, 0) + 1
            yield state

    def leaves(self, state: State) -> str:
        """What a failure in the middle of this part can leave behind."""
        return "some of the weights may have moved already, and would move again"

    def _scaled_step(self, scaler: GradScaler) -> bool:
        stepped: list[bool] = []
        handle = self.optimizer.register_step_post_hook(lambda *_: stepped.append(True))
        try:
            scaler.step(self.optimizer)
        finally:
            handle.remove()
        scaler.update()
        return bool(stepped)
