"""Schedules: pure functions of (done, total, base).

*done* counts what the schedule is stepped by (updates, iterations or epochs) from 0, *total* is their
number in the whole run, and *base* the value that the param group began with. What each returns is in
force for the step number *done*, as in mmcv 1.x: with ``total`` steps, the last one sees
``done == total - 1``, so that no schedule quite reaches its end value.

Any function of the same three arguments is a schedule too.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable
from typing import ClassVar, Literal

import attrs

from .checks import one_of, positive, whole

Schedule = Callable[[int, int | None, float], float]


@attrs.frozen(eq=False)
class constant:
    """The base value, throughout.

    Example:
        >>> constant()(7, None, 0.1)
        0.1
    """

    needs_total: ClassVar[bool] = False

    def __call__(self, done: int, total: int | None, base: float) -> float:
        return base


def _increasing(schedule: multistep, field: object, value: list[int]) -> None:
    if value != sorted(set(value)) or any(milestone < 1 for milestone in value):
        raise ValueError(f"multistep: milestones must be positive and increasing, got {value!r}.")


@attrs.frozen(eq=False)
class multistep:
    """base · gamma^k, where k is the number of milestones reached.

    Args:
        milestones: Counts at which the value drops, in the unit that the schedule is stepped by.
        gamma: Factor at each milestone.

    Example:
        >>> [multistep([2, 3], gamma=0.5)(done, None, 1.0) for done in range(5)]
        [1.0, 1.0, 0.5, 0.25, 0.25]
    """

    milestones: Iterable[int] = attrs.field(converter=list, validator=_increasing)
    gamma: float = attrs.field(default=0.1, validator=positive("for a constant value, use schedules.constant()"))
    needs_total: ClassVar[bool] = False

    def __call__(self, done: int, total: int | None, base: float) -> float:
        return base * self.gamma ** bisect.bisect_right(self.milestones, done)  # type: ignore[call-overload,no-any-return]


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

    end: float = 0.0
    end_ratio: float | None = attrs.field(default=None, kw_only=True)
    needs_total: ClassVar[bool] = True

    def __attrs_post_init__(self) -> None:
        if self.end and self.end_ratio is not None:
            raise ValueError(f"cosine: give end or end_ratio, got both ({self.end!r} and {self.end_ratio!r}).")

    def __call__(self, done: int, total: int | None, base: float) -> float:
        assert total is not None  # checked when the run is built
        end = self.end if self.end_ratio is None else base * self.end_ratio
        return end + (base - end) * (1 + math.cos(math.pi * min(done / total, 1.0))) / 2


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

    power: float = attrs.field(default=1.0, validator=positive("for a constant value, use schedules.constant()"))
    end: float = 0.0
    needs_total: ClassVar[bool] = True

    def __call__(self, done: int, total: int | None, base: float) -> float:
        assert total is not None  # checked when the run is built
        return self.end + float((base - self.end) * (1 - min(done / total, 1.0)) ** self.power)


@attrs.frozen(eq=False)
class warmup:
    """A factor that grows from *ratio* to 1 over the first *count* steps.

    Linear (Goyal et al., "Accurate, Large Minibatch SGD", section 2.2): 1 - (1 - done/count)(1 - ratio).
    Exponential: ratio^(1 - done/count). Constant: *ratio*. From step *count* on it is 1. The schedule
    under it runs from step 0, unmoved.

    Args:
        count: Steps of warm-up; 0 for none.
        ratio: The factor at step 0, in (0, 1].
        kind: ``"linear"``, ``"exponential"`` or ``"constant"``.

    Example:
        >>> [warmup(2, ratio=0.5)(done) for done in range(4)]
        [0.5, 0.75, 1.0, 1.0]
    """

    count: int = attrs.field(default=0, validator=whole(0))
    ratio: float = attrs.field(default=0.1, validator=positive("to begin near 0, give a small number"))
    kind: Literal["linear", "exponential", "constant"] = attrs.field(
        default="linear", validator=one_of("linear", "exponential", "constant")
    )

    def __call__(self, done: int) -> float:
        if done >= self.count:
            return 1.0
        if self.kind == "constant":
            return self.ratio
        left = 1 - done / self.count
        return 1 - left * (1 - self.ratio) if self.kind == "linear" else float(self.ratio**left)
