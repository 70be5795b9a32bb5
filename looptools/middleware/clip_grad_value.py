"""Keep gradients within bounds: each element for itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import attrs
import torch
from torch import Tensor

from ..checks import positive
from ..gradients import are_due, tensors
from ..state import State


def _parameters(params: Iterable[Tensor] | Tensor) -> list[Tensor]:
    return tensors("clip_grad_value", params)


@attrs.frozen(eq=False)
class clip_grad_value:
    """Clamp every element of the gradients to the range from -*max_value* to *max_value*.

    Acts on iterations that update, between ``backward`` and ``update``. It turns the direction of the gradient, which
    ``clip_grad_norm`` keeps. With both, this one comes first, and ``state.grad_norm`` is the norm of what it left.

    Args:
        params: Parameters whose gradients are clamped.
        max_value: Upper bound of an element's size, in the units of the gradients.

    Raises:
        ValueError: If *max_value* is not positive.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([6.0, -0.5])
        >>> state = next(clip_grad_value([weight], 1.0)([State(phase="train", updates=True)]))
        >>> weight.grad.tolist()
        [1.0, -0.5]
    """

    params: Iterable[Tensor] = attrs.field(converter=_parameters, repr=lambda params: f"<{len(params)} tensors>")
    max_value: float = attrs.field(validator=positive("to leave gradients as they are, drop this middleware"))

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        for state in states:
            if are_due(state, self.params):
                torch.nn.utils.clip_grad_value_(self.params, self.max_value)
            yield state
