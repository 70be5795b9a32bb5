"""How often something happens, and which of two results is the better one.

Each interval of n things can be asked two questions of a state: called, whether a multiple of n is full with it;
``reached``, whether n are done with it, however many more there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from .checks import known, positive, whole
from .state import State

if TYPE_CHECKING:
    from .run import Run


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

    def reached(self, state: State) -> bool:
        """Whether *n* training iterations are done with *state*."""
        return state.trains and state.iteration + 1 >= self.n


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

    def reached(self, state: State) -> bool:
        """Whether *n* training passes are done with *state*."""
        return state.trains and state.epoch + 1 >= self.n and state.last


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

    def reached(self, state: State) -> bool:
        """Whether *n* walks are done with *state*."""
        done = state.plan.round if state.plan is not None else 0
        return done + 1 >= self.n and state.round_last


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
        return self._with(state) // self.n > done // self.n

    def reached(self, state: State) -> bool:
        """Whether *n* training samples are done with *state*."""
        if not state.trains or state.run is None:
            return False
        return self._with(state) >= self.n

    @staticmethod
    def _with(state: State) -> int:
        """Training samples that are done with *state*; a dropped one counts none."""
        assert state.run is not None
        return state.run.progress.samples + (0 if state.dropped else state.num_samples)


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

    def reached(self, state: State) -> bool:
        """Whether the run has been at work for *n* seconds."""
        return state.run is not None and state.run.seconds >= self.n


@attrs.frozen(eq=False)
class target:
    """On the last state of each pass whose result for *metric* reaches a bound.

    For parts of the run, which see a pass's last state when its results are there.

    Args:
        metric: A key of ``run.results``, as in ``"val/accuracy"``.
        at_least: Due when the result is this or more.
        at_most: Due when the result is this or less. Give one of the two.

    Raises:
        LookupError: When it is asked, if a phase of the workflow has not written its metric after the first round.

    Example:
        >>> target("val/loss", at_most=0.1)
        target(metric='val/loss', at_least=None, at_most=0.1)
    """

    metric: str = attrs.field(validator=attrs.validators.instance_of(str))
    at_least: float | None = attrs.field(default=None, kw_only=True)
    at_most: float | None = attrs.field(default=None, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if (self.at_least is None) is (self.at_most is None):
            raise ValueError(f"target: give either at_least= or at_most= for {self.metric}.")
        bound = self.at_most if self.at_least is None else self.at_least
        if isinstance(bound, bool) or not isinstance(bound, int | float):
            raise TypeError(f"target: the bound of {self.metric} must be a number, got {bound!r}.")

    def __call__(self, state: State) -> bool:
        value = newest("target", self.metric, state) if state.last else None
        if value is None:
            return False
        return value <= self.at_most if self.at_most is not None else value >= self.at_least  # type: ignore[operator]


Interval = Callable[[State], bool]


def interval(every: Any, what: str = "every") -> Interval:
    """What an option ``every=`` may be: an int (training iterations), an interval or a predicate of the state.

    Args:
        every: What was given.
        what: The option's name, for the error.

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
            f"{what} must be a number of iterations, lt.epochs(n), lt.rounds(n), lt.iterations(n), lt.seconds(n), "
            f"lt.samples(n), lt.target(metric, ...) or a function of the state, got {every!r}."
        )
    return every  # type: ignore[no-any-return]


def newest(who: str, metric: str, state: State) -> float | None:
    """What the pass that ends with *state* made of *metric*; None if it was another phase's pass.

    Args:
        who: The name that the user typed, for errors.
        metric: A key of ``run.results``.
        state: The last state of a pass, as the run's parts see it.

    Raises:
        LookupError: If a whole round is done, and its phase has not written *metric*.
        RuntimeError: If the state belongs to no run.
    """
    run = state.run
    if run is None:
        raise RuntimeError(f"{who}: these states belong to no run, so there is no result to look at.")
    if state.round_last:
        require_written(who, metric, run)
    return run.results.get(metric) if metric.partition("/")[0] == state.phase else None


def require_written(who: str, metric: str, run: Run) -> None:
    """Refuse a *metric* that nobody has written yet; asked after a whole round, when the workflow's phases all have.

    One of a phase that is not in the workflow has a round more, since the loop's body may call ``run.validate``; where
    a function in the workflow may do that, it is waited for.

    Raises:
        LookupError: With the known ones.
    """
    phase, _, name = metric.partition("/")
    if metric in run.results or any(row["phase"] == phase and name in row for row in run.history):
        return
    passes = run.cursor.passes
    unheard_of = run.progress.round > 0 and all(entry.passes_data for entry in passes.agenda.entries)
    if unheard_of or phase in passes.names.values():
        raise LookupError(f'{who}: no part writes "{metric}"; {known(metric, run.results)}')


@attrs.frozen(eq=False)
class highest:
    """The best is the highest value that *metric* had in ``run.results``.

    Args:
        metric: A key of ``run.results``, as in ``"val/accuracy"``.
        top: How many of the best `checkpoint` keeps.

    Example:
        >>> highest("val/accuracy").better(0.9, than=None), highest("val/accuracy").better(0.9, than=0.95)
        (True, False)
    """

    metric: str = attrs.field(validator=attrs.validators.instance_of(str))
    top: int = attrs.field(default=1, kw_only=True, validator=whole())
    sign: ClassVar[int] = 1

    def better(self, value: float, than: float | None, by: float = 0.0) -> bool:
        """Whether *value* is better by more than *by*; what is not finite never is."""
        return math.isfinite(value) and (than is None or value * self.sign > than * self.sign + by)


@attrs.frozen(eq=False)
class lowest(highest):
    """The best is the lowest value that *metric* had in ``run.results``; 0 counts.

    Args:
        metric: A key of ``run.results``, as in ``"val/loss"``.
        top: How many of the best `checkpoint` keeps.

    Example:
        >>> lowest("val/loss").better(0.0, than=0.1)
        True
    """

    sign: ClassVar[int] = -1


def is_criterion(part: Any, field: Any, value: Any) -> None:
    """A validator for ``lt.highest(...)`` and ``lt.lowest(...)``."""
    if not isinstance(value, highest):
        name = type(part).__name__
        raise TypeError(f'{name}: {field.name} must be lt.highest("val/accuracy") or lt.lowest(...), got {value!r}.')
