"""Values that go to an end over the whole run, or over each of several periods."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from ..checks import positive, whole_number
from .options import Schedule, between, instead_of_end, number
from .steps import CONSTANT

if TYPE_CHECKING:
    from ..run import Run


def half_cosine(start: float, end: float, x: float) -> float:
    """From *start* (x = 0) to *end* (x = 1) along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * x)) / 2


def straight(start: float, end: float, x: float) -> float:
    """From *start* (x = 0) to *end* (x = 1) along a line."""
    return start + (end - start) * x


@attrs.frozen(eq=False)
class cosine:
    """Half a cosine from base down to *end*: end + (base - end)(1 + cos(π · done / total)) / 2.

    Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", equation 5.

    Args:
        end: The value that it approaches.
        end_ratio: The same as a fraction of base, instead of *end*.

    Raises:
        ValueError: If both are given.

    Example:
        >>> [round(cosine()(done, 4, 1.0), 3) for done in range(4)]
        [1.0, 0.854, 0.5, 0.146]
    """

    end: float = attrs.field(default=0.0, kw_only=True, validator=number)
    end_ratio: float | None = attrs.field(default=None, kw_only=True, validator=instead_of_end)
    needs_total: ClassVar[bool] = True

    def __call__(self, done: int, total: int | None, base: float) -> float:
        assert total is not None  # checked when the run is built
        end = self.end if self.end_ratio is None else base * self.end_ratio
        return end + (base - end) * (1 + math.cos(math.pi * min(done / total, 1.0))) / 2


@attrs.frozen(eq=False)
class linear:
    """A straight line from base to *end*: base + (end - base) · done / total.

    Source: Devlin et al., "BERT", appendix A.2 (linear decay after a warm-up).

    Args:
        end: As for `cosine`.
        end_ratio: As for `cosine`.

    Raises:
        ValueError: If both are given.

    Example:
        >>> [linear(end_ratio=0.5)(done, 4, 1.0) for done in range(4)]
        [1.0, 0.875, 0.75, 0.625]
    """

    end: float = attrs.field(default=0.0, kw_only=True, validator=number)
    end_ratio: float | None = attrs.field(default=None, kw_only=True, validator=instead_of_end)
    needs_total: ClassVar[bool] = True

    def __call__(self, done: int, total: int | None, base: float) -> float:
        assert total is not None  # checked when the run is built
        return straight(base, _end(self, base), min(done / total, 1.0))


@attrs.frozen(eq=False)
class poly:
    """Polynomial decay to *end*: end + (base - end)(1 - done / total)^power.

    Source: Liu, Rabinovich and Berg, "ParseNet", section 3.3; power 0.9 is usual in segmentation.

    Args:
        power: Exponent; 1 is a straight line.
        end: The value that it approaches.

    Example:
        >>> [poly(power=2)(done, 4, 1.0) for done in range(4)]
        [1.0, 0.5625, 0.25, 0.0625]
    """

    power: float = attrs.field(default=1.0, validator=positive(CONSTANT))
    end: float = attrs.field(default=0.0, kw_only=True, validator=number)
    needs_total: ClassVar[bool] = True

    def __call__(self, done: int, total: int | None, base: float) -> float:
        assert total is not None  # checked when the run is built
        return self.end + float((base - self.end) * (1 - min(done / total, 1.0)) ** self.power)


@attrs.frozen(eq=False)
class flat_cosine:
    """The base value for a while, then half a cosine down to *end*.

    With s = round(start · total) (halves to even): base before step s, then `cosine` at (done - s) / (total - s).
    Source: ``fit_flat_cos`` of fastai, where it goes with the Ranger optimizer.

    Args:
        start: Fraction of the run after which it begins to fall.
        end: As for `cosine`.
        end_ratio: As for `cosine`.

    Raises:
        ValueError: If *start* is no fraction, or both ends are given.

    Example:
        >>> [flat_cosine(0.5)(done, 4, 1.0) for done in range(4)]
        [1.0, 1.0, 1.0, 0.5]
    """

    start: float = attrs.field(default=0.75, validator=between(0, 1))
    end: float = attrs.field(default=0.0, kw_only=True, validator=number)
    end_ratio: float | None = attrs.field(default=None, kw_only=True, validator=instead_of_end)
    needs_total: ClassVar[bool] = True

    def __call__(self, done: int, total: int | None, base: float) -> float:
        assert total is not None  # checked when the run is built
        start = round(total * self.start)
        if done < start or start == total:
            return base
        return half_cosine(base, _end(self, base), min((done - start) / (total - start), 1.0))


def _whole_periods(schedule: cosine_restarts, field: object, periods: list[int]) -> None:
    for period in periods:
        whole_number("cosine_restarts: a period", period)
    if not periods:
        raise ValueError("cosine_restarts: periods must not be empty. Give the steps of each: [10, 20].")


def _one_each(schedule: cosine_restarts, field: object, weights: list[float] | None) -> None:
    periods: Any = schedule.periods
    if weights is not None and len(weights) != len(periods):
        raise ValueError(f"cosine_restarts: give a weight for each of the {len(periods)} periods, got {weights!r}.")


@attrs.frozen(eq=False)
class cosine_restarts:
    """Half a cosine in each of several periods: end + weight · (base - end)(1 + cos(π · x)) / 2.

    x is the fraction of the period that is done. Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent
    with Warm Restarts", equation 5; the weights are mmcv's.

    Args:
        periods: Steps of each period. A run that has more steps than all together is refused when it is built.
        weights: Height of each period; 1 by default.
        end: As for `cosine`.
        end_ratio: As for `cosine`.

    Raises:
        ValueError: If there is not one weight for each period, or a step is asked for that is past the last one.

    Example:
        >>> [cosine_restarts([2, 2], [1, 0.5])(done, None, 1.0) for done in range(4)]
        [1.0, 0.5, 0.5, 0.25]
    """

    periods: Iterable[int] = attrs.field(converter=list, validator=_whole_periods)
    weights: Iterable[float] | None = attrs.field(
        default=None, converter=attrs.converters.optional(list), validator=_one_each
    )
    end: float = attrs.field(default=0.0, kw_only=True, validator=number)
    end_ratio: float | None = attrs.field(default=None, kw_only=True, validator=instead_of_end)
    needs_total: ClassVar[bool] = False

    def bound(self, run: Run, total: int | None) -> Schedule:
        """Itself, if the periods reach to the end of the run."""
        if total is not None and total > sum(self.periods):
            self._refuse(f"the run has {total}")
        return self

    def __call__(self, done: int, total: int | None, base: float) -> float:
        end, begins = _end(self, base), 0
        for n, period in enumerate(self.periods):
            if done < begins + period:
                weight = 1 if self.weights is None else self.weights[n]  # type: ignore[index]
                return half_cosine(end + weight * (base - end), end, (done - begins) / period)
            begins += period
        self._refuse(f"step {done} was asked for")
        raise AssertionError

    def _refuse(self, what: str) -> None:
        raise ValueError(
            f"cosine_restarts: the periods {self.periods!r} are {sum(self.periods)} steps, but {what}. "
            "Add periods, or make the last one longer."
        )


def _end(schedule: cosine | linear | flat_cosine | cosine_restarts, base: float) -> float:
    return schedule.end if schedule.end_ratio is None else base * schedule.end_ratio
