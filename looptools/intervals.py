"""How often something happens, and which of two results is the better one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import attrs

from .checks import positive, whole
from .state import State


@attrs.frozen(eq=False)
class iterations:
    """Every *n* training iterations; in a workflow's entry, *n* batches of that phase.

    Example:
        >>> [i for i in range(6) if iterations(3)(State(phase="train", iteration=i))]
        [2, 5]
    """

    n: int = attrs.field(validator=whole())

    def __call__(self, state: State) -> bool:
        return state.trains and (state.iteration + 1) % self.n == 0


@attrs.frozen(eq=False)
class epochs:
    """Every *n* training passes, on the last state of the pass.

    Example:
        >>> [e for e in range(4) if epochs(2)(State(phase="train", epoch=e, last=True))]
        [1, 3]
    """

    n: int = attrs.field(validator=whole())

    def __call__(self, state: State) -> bool:
        return state.trains and (state.epoch + 1) % self.n == 0 and state.last


@attrs.frozen(eq=False)
class rounds:
    """Every *n* walks through the whole workflow, on the last state of the walk.

    Example:
        >>> rounds(1)(State(phase="val", last=True, round_last=True))
        True
    """

    n: int = attrs.field(validator=whole())

    def __call__(self, state: State) -> bool:
        done = state.plan.round if state.plan is not None else 0
        return (done + 1) % self.n == 0 and state.round_last


@attrs.frozen(eq=False)
class samples:
    """Every *n* training samples: on the iteration that reaches a multiple of *n*.

    Example:
        >>> samples(1000)
        samples(n=1000)
    """

    n: int = attrs.field(validator=whole())

    def __call__(self, state: State) -> bool:
        if not state.trains or state.run is None:
            return False
        done = state.run.progress.samples
        return (done + state.num_samples) // self.n > done // self.n


@attrs.frozen(eq=False)
class seconds:
    """Every *n* seconds that the run was at work, the user's own code between its states not counted.

    Example:
        >>> seconds(600)
        seconds(n=600)
    """

    n: float = attrs.field(validator=positive("for every iteration, use lt.iterations(1)"))

    def __call__(self, state: State) -> bool:
        if state.run is None:
            return False
        before, now = state.run.began
        return now // self.n > before // self.n


Interval = Callable[[State], bool]


def interval(every: Any) -> Interval:
    """What an option ``every=`` may be: an int (training iterations), an interval or a predicate of the state.

    Raises:
        TypeError: If it is none of these.

    Example:
        >>> interval(50)
        iterations(n=50)
    """
    if isinstance(every, int) and not isinstance(every, bool):
        return iterations(every)
    if not callable(every) or isinstance(every, type):
        raise TypeError(
            f"every must be a number of iterations, lt.epochs(n), lt.rounds(n), lt.iterations(n), lt.seconds(n), "
            f"lt.samples(n) or a function of the state, got {every!r}."
        )
    return every  # type: ignore[no-any-return]


@attrs.frozen(eq=False)
class highest:
    """The best is the highest value that *metric* had in ``run.results``.

    Args:
        metric: A key of ``run.results``, as in ``"val/accuracy"``.

    Example:
        >>> highest("val/accuracy").better(0.9, than=None), highest("val/accuracy").better(0.9, than=0.95)
        (True, False)
    """

    metric: str = attrs.field(validator=attrs.validators.instance_of(str))
    sign: ClassVar[int] = 1

    def better(self, value: float, than: float | None) -> bool:
        """Whether *value* is strictly better; what is not finite never is."""
        return math.isfinite(value) and (than is None or value * self.sign > than * self.sign)


@attrs.frozen(eq=False)
class lowest(highest):
    """The best is the lowest value that *metric* had in ``run.results``; 0 counts.

    Args:
        metric: A key of ``run.results``, as in ``"val/loss"``.

    Example:
        >>> lowest("val/loss").better(0.0, than=0.1)
        True
    """

    sign: ClassVar[int] = -1
