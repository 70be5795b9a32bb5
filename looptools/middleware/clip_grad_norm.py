"""Keep gradients within bounds: all of them as one vector."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import attrs
import torch
from torch import Tensor

from ..checks import positive
from ..gradients import are_due, tensors
from ..state import State


def _parameters(params: Iterable[Tensor] | Tensor) -> list[Tensor]:
    return tensors("clip_grad_norm", params)


@attrs.frozen(eq=False)
class clip_grad_norm:
    """Scale all gradients down so that their joint norm is at most *max_norm*.

    Acts on iterations that update, between ``backward`` and ``update``; sets ``state.grad_norm`` to the norm
    before clipping, a tensor of shape ``()`` that stays on its device.

    Args:
        params: Parameters whose gradients count as one vector.
        max_norm: Upper bound, in the units of the gradients; ``inf`` measures without clipping.
        norm_type: Order of the norm, any positive number; ``inf`` for the largest element.

    Raises:
        ValueError: If *max_norm* or *norm_type* is not positive.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor(3.0))
        >>> weight.grad = torch.tensor(6.0)
        >>> state = State(phase="train", updates=True)
        >>> state = next(clip_grad_norm([weight], 1.0)([state]))
        >>> float(state.grad_norm), round(float(weight.grad), 4)
        (6.0, 1.0)
    """

    params: Iterable[Tensor] = attrs.field(converter=_parameters, repr=lambda params: f"<{len(params)} tensors>")
    max_norm: float = attrs.field(validator=positive("to leave gradients as they are, drop this middleware"))
    norm_type: float = attrs.field(default=2.0, kw_only=True, validator=positive("for the largest element, give inf"))

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        for state in states:
            if state.updates and (len(state.windows) < 2 or are_due(state, self.params)):
                state.grad_norm = torch.nn.utils.clip_grad_norm_(self.params, self.max_norm, self.norm_type)
            yield state

    def leaves(self, state: State) -> str:
        """What a failure in the middle of this part can leave behind."""
        return "some of the gradients may be smaller already, and their norm with them" if state.updates else ""
