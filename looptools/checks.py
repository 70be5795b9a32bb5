"""Validators that say what is wrong, what was given and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Validator = Callable[[Any, Any, Any], None]


def positive(cure: str) -> Validator:
    """A validator for numbers above 0; *cure* says what to do instead.

    Example:
        >>> import attrs
        >>> @attrs.frozen
        ... class every:
        ...     n: int = attrs.field(validator=positive("to write nothing, drop this part"))
        >>> every(0)
        Traceback (most recent call last):
        ...
        ValueError: every: n must be positive, got 0. To write nothing, drop this part.
    """

    def validate(part: Any, field: Any, value: Any) -> None:
        name = type(part).__name__
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}: {field.name} must be a number, got {value!r}.")
        if not value > 0:
            raise ValueError(f"{name}: {field.name} must be positive, got {value!r}. {cure[0].upper()}{cure[1:]}.")

    return validate


def whole(minimum: int = 1) -> Validator:
    """A validator for whole numbers of at least *minimum*."""

    def validate(part: Any, field: Any, value: Any) -> None:
        whole_number(f"{type(part).__name__}: {field.name}", value, minimum)

    return validate


def whole_number(what: str, value: Any, minimum: int = 1) -> int:
    """Refuse what is not a whole number of at least *minimum*; return it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be a whole number, got {value!r}.")
    if value < minimum:
        raise ValueError(f"{what} must be at least {minimum}, got {value!r}.")
    return value


def is_optimizer(part: Any, field: Any, value: Any) -> None:
    """A validator for optimizers."""
    require_optimizer(f"{type(part).__name__}: {field.name}", value)


def require_optimizer(what: str, value: Any) -> None:
    """Refuse what is not an optimizer."""
    if isinstance(value, list | tuple) and value and all(isinstance(one, Optimizer) for one in value):
        raise TypeError(f"{what} must be one optimizer, got {len(value)}. Pipe on one for each.")
    if not isinstance(value, Optimizer):
        raise TypeError(
            f"{what} must be a torch.optim.Optimizer, got {value!r}. "
            "Make one first: torch.optim.SGD(model.parameters(), lr=0.1)."
        )


def known(wanted: str, metrics: Iterable[str]) -> str:
    """The end of an error about a metric that is not there: those that are, and what may have been meant.

    Example:
        >>> known("val/acuracy", ["val/loss", "val/accuracy"])
        "known are val/loss, val/accuracy. Did you mean 'val/accuracy'?"
    """
    names = list(metrics)
    close = difflib.get_close_matches(wanted, names, cutoff=0.5)
    meant = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"known are {', '.join(names) or 'none yet; they are written at the end of each pass'}.{meant}"


def made_middleware_by(thing: Any) -> str:
    """What makes a part of a pipe of *thing*, which is none itself; empty if nothing does."""
    if isinstance(thing, Optimizer):
        return " Write lt.optimize(optimizer)."
    if isinstance(thing, LRScheduler):
        return " Write lt.schedule_lr(optimizer, scheduler)."
    if hasattr(thing, "middlewares"):
        return " Phases stand beside each other: lt.workflow([(train, 1), (val, 1)], max_epochs=...)."
    return ""


def one_of(*choices: str) -> Validator:
    """A validator for words from a list."""

    def validate(part: Any, field: Any, value: Any) -> None:
        if value not in choices:
            known = ", ".join(map(repr, choices))
            raise ValueError(f"{type(part).__name__}: {field.name} must be one of {known}, got {value!r}.")

    return validate
