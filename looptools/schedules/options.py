"""What a schedule is, and validators for the options that schedules share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..checks import Validator

if TYPE_CHECKING:
    from ..run import Run

Schedule = Callable[[int, int | None, float], float]


def bind(schedule: Schedule, run: Run, total: int | None) -> Schedule:
    """What *schedule* is within *run*, which has *total* steps: its ``bound(run, total)``, if it has that method.

    Raises:
        ValueError: If the schedule cannot do so many steps.
    """
    bound: Callable[[Run, int | None], Schedule] | None = getattr(schedule, "bound", None)
    return schedule if bound is None else bound(run, total)


def number(part: Any, field: Any, value: Any) -> None:
    """A validator for finite numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{type(part).__name__}: {field.name} must be a number, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"{type(part).__name__}: {field.name} must be finite, got {value!r}.")


def between(low: float, high: float, *, low_too: bool = True, high_too: bool = True) -> Validator:
    """A validator for numbers from *low* to *high*, the two themselves included or not."""

    def validate(part: Any, field: Any, value: Any) -> None:
        number(part, field, value)
        if not (low < value < high or (low_too and value == low) or (high_too and value == high)):
            least = f"{'at least' if low_too else 'above'} {low:g}"
            most = f"{'at most' if high_too else 'below'} {high:g}"
            raise ValueError(f"{type(part).__name__}: {field.name} must be {least} and {most}, got {value!r}.")

    return validate


def instead_of_end(part: Any, field: Any, end_ratio: Any) -> None:
    """A validator for ``end_ratio``, which says as a fraction of base what ``end`` says as a value."""
    if end_ratio is None:
        return
    number(part, field, end_ratio)
    if part.end:
        raise ValueError(f"{type(part).__name__}: give end or end_ratio, got both ({part.end!r} and {end_ratio!r}).")
