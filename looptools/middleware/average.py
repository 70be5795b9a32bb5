"""Average what a pass measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar

import attrs

from ..checks import whole
from ..means import FOLD_AT, Means
from ..state import State
from ..warn import warn

if TYPE_CHECKING:
    from ..run import Run


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class average:
    """Average the metrics of a pass, weighted by ``num_samples``, into ``run.results`` on its last state.

    The last part of every phase, put there by itself. Tensors stay on their device until the last state; then the
    device is read once. The means of phase ``val`` get the keys ``"val/loss"`` and so on, and ``run.history`` a row;
    ``state.gauges`` of the last state go there as they are. Where the source does not know its length, reading
    ``state.last`` fetches the next batch here, after the update.

    Args:
        window: Average over the last *window* iterations of the pass instead of all. An ``average`` that is
            piped on takes the place of the one that would be put there.

    Example:
        >>> states = [State(phase="val", metrics={"loss": 1.0}), State(phase="val", metrics={"loss": 3.0}, last=True)]
        >>> part = average()
        >>> for state in part(states):
        ...     pass
        >>> part.means.read()
        {'loss': 2.0}
    """

    window: int | None = attrs.field(default=None, kw_only=True, validator=attrs.validators.optional(whole()))
    means: Means = attrs.field(init=False, repr=False)
    closes_pass: ClassVar[bool] = True

    def __attrs_post_init__(self) -> None:
        self.means = Means(self.window)

    def on_pass(self, run: Run) -> None:
        """Begin the means of a new pass."""
        self.means.clear()

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        means = self.means
        for state in states:
            last = state.last  # may fetch a batch, and fail: so before anything is counted
            if state.first:  # in a pipe without a run; there, on_pass does it
                means.clear()
            if not state.dropped:
                means.entries.append((state.metrics.copy(), state.num_samples))
                if len(means.entries) >= FOLD_AT:
                    means.fold()
                state.committed = state.committed or "average has counted it"
            if last and means.empty and state.dropped:
                warn(
                    f"{state.phase}: every state of this pass was dropped, so nothing came of it. Which part does that?"
                )
            if last and state.run is not None:
                state.run.record(state, means.read(state.gauges))
            yield state

    def leaves(self, state: State) -> str:
        """What a failure in the middle of this part can leave behind."""
        return "this batch may be in the means of the pass already, and would be counted again"
