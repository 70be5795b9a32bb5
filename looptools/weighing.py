"""What an iteration counts in an accumulation window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from .state import State

Weigh = Literal["batches", "samples"] | Callable[[State], Any]


def is_weigh(part: Any, field: Any, weigh: Any) -> None:
    """A validator for options ``weigh``."""
    if isinstance(weigh, type) or not (callable(weigh) or weigh in ("batches", "samples")):
        raise ValueError(
            f"backward: weigh must be 'batches', 'samples' or a function of the state, got {weigh!r}. "
            "By tokens: weigh=lambda state: (state.batch[1] != padding).sum()."
        )


def weight_of(state: State, weigh: Weigh) -> Any:
    """The weight of an iteration by samples or by a function: a number, or a tensor that stays on its device.

    Raises:
        TypeError: If the function gives neither a number nor a tensor of shape ``()``.
        ValueError: If the number is negative or not finite.

    Example:
        >>> weight_of(State(phase="train", num_samples=4), "samples")
        4
    """
    if not callable(weigh):
        return state.num_samples
    weight: Any = weigh(state)
    if isinstance(weight, Tensor):
        if weight.ndim:
            raise TypeError(
                f"backward: weigh must give a number or a tensor of shape (), got shape {tuple(weight.shape)} in "
                f"iteration {state.iteration} of {state.phase}. Add it up with .sum()."
            )
        return weight.detach()
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise TypeError(f"backward: weigh must give a number or a tensor of shape (), got {weight!r}.")
    if not 0 <= weight < float("inf"):
        raise ValueError(f"backward: weigh must give a number of at least 0, got {weight!r}.")
    return weight
