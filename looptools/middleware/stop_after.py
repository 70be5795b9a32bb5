"""Stop when enough is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import attrs

from ..intervals import Interval, interval, seconds, target
from ..pipeline import name_of
from ..state import State

if TYPE_CHECKING:
    from ..run import Run


def _interval(when: Any) -> Interval:
    return interval(when, "stop_after: when")


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class stop_after:
    """Stop the run at the boundary of the iteration with which *when* is reached. Piped onto the run.

    Unlike ``max_epochs=`` and ``max_iterations=``, which end the training and let the round be completed, it stops
    there and then, and schedules know nothing of it. It stops a run once: after ``run.extend(...)`` the run goes on to
    its own end, unless it was resumed with another *when*. A predicate, which is known by its name alone, may stop it
    again once it has been false in the like place (of the same phase, the last of a pass or not).

    Args:
        when: A number of training iterations, ``lt.iterations(n)``, ``lt.epochs(n)``, ``lt.rounds(n)``,
            ``lt.samples(n)``, ``lt.seconds(n)`` at work in all (what a resumed run did before counts),
            ``lt.target("val/accuracy", at_least=0.97)``, or a predicate of the state.

    Raises:
        LookupError: If a phase of the workflow has not written a target's metric after the first round.

    Example:
        >>> phase = lt.train(None, [1.0] * 10, lambda model, batch: {"x": batch})
        >>> run = lt.workflow([(phase, 1)], max_epochs=1) | lt.stop_after(lt.samples(3))
        >>> len(list(run)), run.ended
        (3, 'stop_after: 3 samples')
    """

    when: int | Interval = attrs.field(converter=_interval)
    stopped: str = attrs.field(default="", init=False, repr=False)  # at what,
    place: list[Any] = attrs.field(factory=list, init=False, repr=False)  # and in which: phase, whether last

    def on_build(self, run: Run) -> None:
        """See that it stands behind what it looks at."""
        run.require_run_scope(self)

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        when: Any = self.when
        reached: Callable[[State], Any] = getattr(when, "reached", when)
        words, is_predicate = _in_words(when), not hasattr(when, "reached") and not isinstance(when, target)
        for state in states:
            if self.stopped != words:
                if reached(state):
                    self._stop(words, state)
            elif is_predicate and self.place == [state.phase, state.last] and not reached(state):
                self.stopped = ""
            yield state

    def on_results(self, state: State) -> None:
        """Look whether a validation beside the workflow reaches the target."""
        if isinstance(self.when, target) and self.stopped != _in_words(self.when) and self.when(state):
            self._stop(_in_words(self.when), state)

    def _stop(self, words: str, state: State) -> None:
        self.stopped, self.place = words, [state.phase, state.last]
        state.stop(f"stop_after: {words}")


def _in_words(when: Any) -> str:
    if isinstance(when, target):
        bound = f"at most {when.at_most:g}" if when.at_most is not None else f"at least {when.at_least:g}"
        return f"{when.metric} is {bound}"
    if not hasattr(when, "reached"):
        return name_of(when)
    word = type(when).__name__
    return f"{when.n} {word[:-1] if when.n == 1 else word}" + (" at work" if isinstance(when, seconds) else "")
