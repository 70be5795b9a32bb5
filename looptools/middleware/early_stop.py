"""Stop when there is nothing left to gain."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import attrs

from ..checks import whole
from ..intervals import highest, is_criterion, newest
from ..state import State

if TYPE_CHECKING:
    from ..run import Run


def _delta(part: Any, field: Any, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"early_stop: min_delta must be a number, got {value!r}.")
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"early_stop: min_delta must be 0 or more, got {value!r}. Which way is better, best says.")


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class early_stop:
    """Stop the run when a result has not become better for *patience* passes. Piped onto the run.

    Looks when a pass of the metric's phase has ended, ``run.validate`` included, at no other time; a value that is not
    finite is no improvement. The run ends at the boundary of that iteration, and ``run.ended`` says why. A run that is
    resumed after that stays stopped; ``run.extend(...)`` lets it go on, with its patience restored and the best value
    still to be beaten. With another metric, or the other direction, it begins afresh.

    Args:
        best: ``lt.lowest("val/loss")`` or ``lt.highest("val/accuracy")``.
        patience: Passes in a row without an improvement.
        min_delta: What an improvement must be larger than, in the units of the metric.

    Raises:
        LookupError: If its phase has not written the metric after the first round.

    Example:
        >>> losses = iter([3.0, 2.0, 2.0, 2.5, 1.0])
        >>> val = lt.validate(None, lambda: [next(losses)], lambda model, batch: {"loss": torch.tensor(batch)})
        >>> run = lt.workflow([(val, 1)], max_rounds=5) | lt.early_stop(lt.lowest("val/loss"), patience=2)
        >>> results = run.to_end()
        >>> len(run.history), run.ended
        (4, 'early_stop: val/loss has not improved on 2 for 2 passes (since epoch 0)')
    """

    best: highest = attrs.field(validator=is_criterion)
    patience: int = attrs.field(default=5, kw_only=True, validator=whole())
    min_delta: float = attrs.field(default=0.0, kw_only=True, validator=_delta)
    value: float | None = attrs.field(default=None, init=False, repr=False)  # the best so far
    since: int = attrs.field(default=0, init=False, repr=False)  # training passes that were done then
    waited: int = attrs.field(default=0, init=False, repr=False)  # passes since
    of: str = attrs.field(default="", init=False, repr=False)  # what these were judged by
    stopped: bool = attrs.field(default=False, init=False, repr=False)

    def on_build(self, run: Run) -> None:
        """Now, and when a run that was stopped here is extended, which restores the patience."""
        run.require_run_scope(self)
        if self.stopped:
            self.waited, self.stopped = 0, False

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        for state in states:
            if state.last:
                self._look(state)
            yield state

    def on_results(self, state: State) -> None:
        """Judge a validation beside the workflow as well."""
        self._look(state)

    def _look(self, state: State) -> None:
        value = newest("early_stop", self.best.metric, state)
        if value is None:
            return
        of = f"{'highest' if self.best.sign > 0 else 'lowest'} {self.best.metric}"
        if of != self.of:
            self.of, self.value, self.waited = of, None, 0
        self._judge(value, state)

    def _judge(self, value: float, state: State) -> None:
        if self.best.better(value, self.value, self.min_delta):
            assert state.run is not None
            self.value, self.waited = value, 0
            self.since = state.run.progress.epoch + state.trains  # its own pass is counted at the boundary that follows
            return
        self.waited += 1
        if self.waited >= self.patience:
            passes = "1 pass" if self.waited == 1 else f"{self.waited} passes"
            best = f"improved on {self.value:.4g}" if self.value is not None else "been finite"
            self.stopped = True
            since = "" if self.value is None else f" (since epoch {self.since})"
            state.stop(f"early_stop: {self.best.metric} has not {best} for {passes}{since}")
