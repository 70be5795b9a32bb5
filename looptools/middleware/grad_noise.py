"""Add noise to the gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..checks import positive
from ..gradients import are_due, optimizers_in, parameters_of, tensors
from ..state import State

if TYPE_CHECKING:
    from ..run import Run


def _parameters(params: Iterable[Tensor] | Tensor) -> list[Tensor]:
    return tensors("grad_noise", params)


def _not_negative(part: Any, field: Any, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"grad_noise: {field.name} must be a number, got {value!r}.")
    if not value >= 0:
        raise ValueError(
            f"grad_noise: {field.name} must not be negative, got {value!r}. With 0 the noise stays as it is."
        )


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class grad_noise:
    """Add Gaussian noise of variance eta / (1 + t) ** gamma to the gradients (Neelakantan et al. 2015, eq. 1).

    Acts on iterations that update, between ``backward`` and ``update``; t is the number of updates done by the
    optimizer that holds the parameters. Draws from torch's generator of the gradients' device, for one parameter after
    the other. In distributed training seed that alike on all ranks, or their weights drift apart.

    Args:
        params: Parameters whose gradients get noise.
        eta: Variance at the first update, in the units of the gradients squared; the paper tries 0.01, 0.3 and 1.
        gamma: How fast it fades.

    Raises:
        ValueError: If *eta* is not positive, *gamma* negative, or no optimizer of the run holds the parameters.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> train = lt.train(model, [torch.ones(1, 1)], lambda model, batch: model(batch).mean())
        >>> state = next(iter(train | lt.backward(sgd) | lt.grad_noise(model.parameters()) | lt.update(sgd)))
        >>> bool(model.bias.grad == 1)
        False
    """

    params: Iterable[Tensor] = attrs.field(converter=_parameters, repr=lambda params: f"<{len(params)} tensors>")
    eta: float = attrs.field(default=0.3, validator=positive("for gradients without noise, drop this part"))
    gamma: float = attrs.field(default=0.55, validator=_not_negative)
    _optimizers: list[Optimizer] = attrs.field(factory=list, init=False, repr=False)

    def on_build(self, run: Run) -> None:
        """Find out whose updates count."""
        mine = set(map(id, self.params))
        known = optimizers_in(run)
        self._optimizers = [one for one in known if not mine.isdisjoint(map(id, parameters_of([one])))]
        if not self._optimizers:
            raise ValueError(
                "grad_noise: no optimizer of the run holds these parameters, so no update uses their gradients. "
                "Give those that lt.update's optimizer moves: grad_noise(model.parameters())."
            )

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        for state in states:
            if are_due(state, self.params):
                if state.run is None or not self._optimizers:
                    raise RuntimeError("grad_noise: these states belong to no run, so nobody counts. Iterate a phase.")
                counts = state.run.progress.updates
                done = max(counts.get(optimizer, 0) for optimizer in self._optimizers)
                deviation = math.sqrt(self.eta / (1 + done) ** self.gamma)
                for parameter in self.params:
                    if parameter.grad is not None:
                        parameter.grad.add_(torch.randn_like(parameter.grad), alpha=deviation)
            yield state

    def leaves(self, state: State) -> str:
        """What a failure in the middle of this part can leave behind."""
        return "some of the gradients may have noise already, and would get more" if state.updates else ""
