"""Values that rise and fall again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import attrs

from ..checks import one_of, positive, whole
from .annealing import half_cosine, straight
from .options import Schedule, between, number
from .steps import CONSTANT

if TYPE_CHECKING:
    from ..run import Run

Anneal = Literal["cosine", "linear"]
CURVES = {"cosine": half_cosine, "linear": straight}


def _room_for_three(part: Any, field: Any, three_phase: Any) -> None:
    if not isinstance(three_phase, bool):
        raise TypeError(f"{type(part).__name__}: three_phase must be True or False, got {three_phase!r}.")
    if three_phase and part.rising > 0.5:
        raise ValueError(
            f"{type(part).__name__}: with three_phase, rising must be at most 0.5, got {part.rising!r}: "
            "the fall takes as long as the rise."
        )


@attrs.frozen(eq=False)
class _OneCycle:
    """What the two halves of the one-cycle policy share."""

    rising: float = attrs.field(default=0.3, kw_only=True, validator=between(0, 1))
    three_phase: bool = attrs.field(default=False, kw_only=True, validator=_room_for_three)
    anneal: Anneal = attrs.field(default="cosine", kw_only=True, validator=one_of("cosine", "linear"))
    total: int | None = attrs.field(default=None, kw_only=True, validator=attrs.validators.optional(whole()))

    @property
    def needs_total(self) -> bool:
        """Whether it must be told how many steps there are."""
        return self.total is None

    def bound(self, run: Run, total: int | None) -> Schedule:
        """Itself, if its own *total* reaches to the end of the run."""
        if total is not None and self.total is not None and total > self.total:
            raise ValueError(
                f"{type(self).__name__}: its total is {self.total} steps, but the run has {total}. "
                "Leave total out to have one cycle over the whole run."
            )
        return self  # type: ignore[return-value]  # the halves can be called

    def _along(self, done: int, total: int | None, values: list[float]) -> float:
        """The value at step *done* of a cycle through *values*: up, down, and out.

        The ends of its phases are those of torch's OneCycleLR: they need not be whole, so that no step may meet the
        peak.
        """
        steps: Any = self.total or total  # its being there is checked when the run is built
        peak = self.rising * steps - 1
        ends = [peak, 2 * peak, steps - 1] if self.three_phase else [peak, steps - 1]
        begin = 0.0
        for phase, end in enumerate(ends):
            if done <= end or phase == len(ends) - 1:
                break
            begin = end
        x = min((done - begin) / (end - begin), 1.0) if end > begin else 1.0
        return CURVES[self.anneal](values[phase], values[phase + 1], x)


@attrs.frozen(eq=False)
class one_cycle(_OneCycle):
    """From peak / div up to *peak*, then down to peak / div / final_div, over the whole run.

    From value a to b, at the fraction x of a phase: b + (a - b)(1 + cos(π · x)) / 2, or linear a + (b - a) · x. With
    *total* steps the rise ends at rising · total - 1, the fall at total - 1; with three phases, first at
    2 · rising · total - 2.
    Source: Smith and Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates",
    the "1cycle" policy; the formulas are those of ``torch.optim.lr_scheduler.OneCycleLR``. With `one_cycle_momentum` it
    is all of that.

    Args:
        peak: The highest value, whatever base is; None takes the param group's base value.
        rising: Fraction of the steps that it rises.
        div: The first value is peak / div.
        final_div: The last value is the first one / final_div.
        three_phase: Fall back to the first value as fast as it rose, and only then to the last one.
        anneal: Along a ``"cosine"`` or a ``"linear"`` line.
        total: Steps of the cycle, if not those of the run. A run that has more is refused when it is built.

    Raises:
        ValueError: If *rising* is no fraction, or leaves no room for the three phases.

    Example:
        >>> schedule = one_cycle(1.0, rising=0.4, div=10, final_div=10, anneal="linear")
        >>> [round(schedule(done, 5, 0.5), 3) for done in range(5)]
        [0.1, 1.0, 0.67, 0.34, 0.01]
    """

    peak: float | None = attrs.field(default=None, validator=attrs.validators.optional(number))
    div: float = attrs.field(default=25.0, kw_only=True, validator=positive("to begin at the peak, give 1"))
    final_div: float = attrs.field(default=1e4, kw_only=True, validator=positive("to end as it began, give 1"))

    def __call__(self, done: int, total: int | None, base: float) -> float:
        peak = base if self.peak is None else self.peak
        first = peak / self.div
        last = first / self.final_div
        return self._along(done, total, [first, peak, first, last] if self.three_phase else [first, peak, last])


@attrs.frozen(eq=False)
class one_cycle_momentum(_OneCycle):
    """The momentum that goes with `one_cycle`: from *high* down to *low* while the rate rises, then up again.

    It does not look at the group's base value. Formulas as for `one_cycle`, through *high*, *low* and *high* again.
    Source: Smith, "A disciplined approach to neural network hyper-parameters: Part 1", section 4.3 (cyclical momentum),
    and torch's OneCycleLR.

    Args:
        low: The lowest value.
        high: The first and the last one.
        rising: Fraction of the steps that the learning rate rises, and the momentum falls.
        three_phase: Be back at *high* as soon as the learning rate is back at its first value, and stay there.
        anneal: As for `one_cycle`.
        total: As for `one_cycle`.

    Raises:
        ValueError: As for `one_cycle`.

    Example:
        >>> schedule = one_cycle_momentum(0.8, 0.9, rising=0.4, anneal="linear")
        >>> [round(schedule(done, 5, 0.5), 3) for done in range(5)]
        [0.9, 0.8, 0.833, 0.867, 0.9]
    """

    low: float = attrs.field(default=0.85, validator=number)
    high: float = attrs.field(default=0.95, validator=number)

    def __call__(self, done: int, total: int | None, base: float) -> float:
        return self._along(done, total, [self.high, self.low, self.high, self.high])


@attrs.frozen(eq=False)
class cyclic:
    """From base up to base · up, then down to base · down, in *cycles* cycles over the whole run.

    A cycle has n = total // cycles steps, int(rising · n) of which rise; steps left over begin another cycle. In
    cycle c the top is base · (1 + (up - 1) · gamma^c).
    Source: Smith, "Cyclical Learning Rates for Training Neural Networks", section 3, with mmcv's descent below base.

    Args:
        up: The top, as a multiple of base; below 1 for a momentum that falls first.
        down: The end of each cycle, as a multiple of base.
        cycles: How many.
        rising: Fraction of a cycle that it rises.
        anneal: Along a ``"cosine"`` or a ``"linear"`` line.
        gamma: Factor from one cycle to the next of what the top is above base.

    Raises:
        ValueError: If a run has fewer steps than *cycles*, when it is built.

    Example:
        >>> schedule = cyclic(up=3, down=0, cycles=2, rising=0.5, anneal="linear", gamma=0.5)
        >>> [schedule(done, 8, 1.0) for done in range(8)]
        [1.0, 2.0, 3.0, 1.5, 1.0, 1.5, 2.0, 1.0]
    """

    up: float = attrs.field(default=10.0, validator=number)
    down: float = attrs.field(default=1e-4, validator=number)
    cycles: int = attrs.field(default=1, kw_only=True, validator=whole())
    rising: float = attrs.field(default=0.4, kw_only=True, validator=between(0, 1, high_too=False))
    anneal: Anneal = attrs.field(default="cosine", kw_only=True, validator=one_of("cosine", "linear"))
    gamma: float = attrs.field(default=1.0, kw_only=True, validator=positive(CONSTANT))
    needs_total: ClassVar[bool] = True

    def bound(self, run: Run, total: int | None) -> Schedule:
        """Itself, if each cycle has a step."""
        if total is not None and total < self.cycles:
            raise ValueError(f"cyclic: {self.cycles} cycles need as many steps, but the run has {total}. Give fewer.")
        return self

    def __call__(self, done: int, total: int | None, base: float) -> float:
        assert total is not None  # checked when the run is built
        length = total // self.cycles
        rising = int(self.rising * length)
        cycle, at = divmod(done, length)
        top = base * (1 + (self.up - 1) * self.gamma**cycle)
        curve = CURVES[self.anneal]
        if at < rising:
            return curve(base, top, at / rising)
        return curve(top, base * self.down, (at - rising) / (length - rising))
