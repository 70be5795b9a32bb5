"""Values that drop by a factor: never, at milestones, every so often, or at each step."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import Any, ClassVar

import attrs

from ..checks import positive, whole, whole_number
from .options import number

CONSTANT = "for a constant value, use schedules.constant()"


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
    for milestone in value:
        whole_number("multistep: a milestone", milestone)
    if value != sorted(set(value)):
        raise ValueError(f"multistep: milestones must be positive and increasing, got {value!r}.")


@attrs.frozen(eq=False)
class multistep:
    """base · gamma^k, where k is the number of milestones reached; never below *floor*.

    Source: He et al., "Deep Residual Learning for Image Recognition", section 4.2 (by 10 at 32k and 48k iterations).

    Args:
        milestones: Counts at which the value drops, in the unit that the schedule is stepped by.
        gamma: Factor at each milestone.
        floor: What the value does not fall below. A base below it is *raised* to it, as mmcv's ``min_lr`` did.

    Example:
        >>> [multistep([2, 3], gamma=0.5)(done, None, 1.0) for done in range(5)]
        [1.0, 1.0, 0.5, 0.25, 0.25]
    """

    milestones: Iterable[int] = attrs.field(converter=list, validator=_increasing)
    gamma: float = attrs.field(default=0.1, validator=positive(CONSTANT))
    floor: float | None = attrs.field(default=None, kw_only=True, validator=attrs.validators.optional(number))
    needs_total: ClassVar[bool] = False

    def __call__(self, done: int, total: int | None, base: float) -> float:
        milestones: Any = self.milestones
        value = base * self.gamma ** bisect.bisect_right(milestones, done)
        return value if self.floor is None else max(value, self.floor)


@attrs.frozen(eq=False)
class step:
    """base · gamma^floor(done / every); never below *floor*.

    Source: Szegedy et al., "Going Deeper with Convolutions", section 6 (by 4% every 8 epochs).

    Args:
        every: Steps from one drop to the next.
        gamma: Factor at each drop.
        floor: As for `multistep`.

    Example:
        >>> [step(2, gamma=0.5, floor=0.3)(done, None, 1.0) for done in range(6)]
        [1.0, 1.0, 0.5, 0.5, 0.3, 0.3]
    """

    every: int = attrs.field(validator=whole())
    gamma: float = attrs.field(default=0.1, validator=positive(CONSTANT))
    floor: float | None = attrs.field(default=None, kw_only=True, validator=attrs.validators.optional(number))
    needs_total: ClassVar[bool] = False

    def __call__(self, done: int, total: int | None, base: float) -> float:
        value = float(base * self.gamma ** (done // self.every))
        return value if self.floor is None else max(value, self.floor)


@attrs.frozen(eq=False)
class exponential:
    """base · gamma^done.

    Source: Tan and Le, "EfficientNet", section 5.2 (0.97 every 2.4 epochs).

    Args:
        gamma: Factor at each step.

    Example:
        >>> [exponential(0.5)(done, None, 1.0) for done in range(4)]
        [1.0, 0.5, 0.25, 0.125]
    """

    gamma: float = attrs.field(validator=positive(CONSTANT))
    needs_total: ClassVar[bool] = False

    def __call__(self, done: int, total: int | None, base: float) -> float:
        return float(base * self.gamma**done)


@attrs.frozen(eq=False)
class inverse:
    """base · (1 + gamma · done)^(-power).

    Source: the "inv" policy of Caffe's solver; power 1 is Robbins and Monro's rate of 1951.

    Args:
        gamma: How fast it falls.
        power: How far it falls.

    Example:
        >>> [inverse(1.0)(done, None, 1.0) for done in (0, 1, 3)]
        [1.0, 0.5, 0.25]
    """

    gamma: float = attrs.field(validator=positive(CONSTANT))
    power: float = attrs.field(default=1.0, validator=positive(CONSTANT))
    needs_total: ClassVar[bool] = False

    def __call__(self, done: int, total: int | None, base: float) -> float:
        return float(base * (1 + self.gamma * done) ** (-self.power))
