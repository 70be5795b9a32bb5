"""Validators for what the part `schedule` is given."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..checks import require_optimizer
from ..intervals import epochs
from ..pipeline import name_of
from .options import Schedule
from .warmup import warmup

UNITS = ("update", "iteration", "epoch")


def is_optimizer(part: Any, field: Any, optimizer: Any) -> None:
    """A validator for optimizers."""
    require_optimizer(f"{part.called}: optimizer", optimizer)


def is_option(part: Any, field: Any, option: Any) -> None:
    """A validator for the option's name: each param group has it, as a number."""
    for group in part.optimizer.param_groups:
        if option not in group and not (option == "momentum" and "betas" in group):
            known = [key for key, value in group.items() if _is_number(value)] + ["momentum"] * ("betas" in group)
            kind = type(part.optimizer).__name__
            raise LookupError(f"{part.called}: {kind} has no option {option!r}; it has {', '.join(sorted(known))}.")
        held = part.held(group)
        if not _is_number(held):
            raise TypeError(f"{part.called}: {option} must be a number to be scheduled, but is {held!r:.60}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Tensor) and not isinstance(value, bool)


def is_schedule(part: Any, field: Any, given: Any) -> None:
    """A validator for one schedule, or a list with one for each param group."""
    many = isinstance(given, list | tuple)
    for one in given if many else [given]:
        _require_schedule(part, one, many)
    if many:
        require_one_each(part.called, given, part.optimizer.param_groups)


def require_one_each(called: str, given: Sequence[Schedule], groups: Sequence[Any]) -> None:
    """Refuse a list that has more or fewer schedules than there are param groups."""
    if len(given) != len(groups):
        counts = f"{len(given)} schedules for {len(groups)} param groups"
        raise ValueError(f"{called}: got {counts}. Give one for all, or one for each.")


def _require_schedule(part: Any, given: Any, many: bool) -> None:
    torchs = isinstance(given, LRScheduler)
    if isinstance(given, ReduceLROnPlateau):
        raise TypeError(
            f"{part.called}: ReduceLROnPlateau waits for a metric, which nobody gives it here. "
            'Write lt.schedules.plateau(lt.lowest("val/loss")), which reads it off the run.'
        )
    if isinstance(given, type) or not (callable(given) or torchs) or (torchs and (many or part.option != "lr")):
        raise TypeError(
            f"{part.called}: schedule must be one of lt.schedules, a torch scheduler (for all learning rates) or a "
            f"function of (done, total, base), got {given!r}. A class needs its options first: lt.schedules.cosine()."
        )
    if not torchs and not _takes_three(given):
        raise TypeError(
            f"{part.called}: {name_of(given)} must take (done, total, base) and return the value, not a factor: "
            "lambda done, total, base: base * 0.9**done."
        )
    if torchs and given.optimizer is not part.optimizer:
        raise ValueError(f"{part.called}: the torch scheduler was made for another optimizer than the one given here.")


def _takes_three(given: Any) -> bool:
    """Whether it can be called with three positions; what does not tell its signature is believed."""
    try:
        inspect.signature(given).bind(0, 1, 1.0)
    except TypeError:
        return False
    except ValueError:
        pass
    return True


def is_warmup(part: Any, field: Any, value: Any) -> None:
    """A validator for what may stand for a warm-up."""
    if isinstance(value, bool) or not isinstance(value, int | epochs | warmup):
        raise TypeError(
            f"{part.called}: warmup must be a count, lt.epochs(n) or lt.schedules.warmup(...), got {value!r}."
        )
    if value and isinstance(part.schedule, LRScheduler):
        raise ValueError(
            f"{part.called}: warmup goes with lt.schedules only. With torch schedulers, put a LinearLR before yours "
            "in torch.optim.lr_scheduler.SequentialLR."
        )


def is_unit(part: Any, field: Any, by: Any) -> None:
    """A validator for what a schedule is stepped by."""
    if by not in UNITS:
        raise ValueError(f"{part.called}: by must be one of {', '.join(map(repr, UNITS))}, got {by!r}.")
