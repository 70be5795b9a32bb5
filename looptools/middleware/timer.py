"""Measure how long iterations take, and how long the training will."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from ..checks import whole
from ..state import State

if TYPE_CHECKING:
    from ..run import Run


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class timer:
    """Measure the seconds of each iteration, and estimate those that are left.

    Sets ``state.metrics["data_time"]``, the seconds that its batch took, and ``state.metrics["iter_time"]``, those of
    the whole iteration up to here, batch included. In training phases also ``state.gauges["samples_per_s"]``, over
    the last *window* iterations, and ``state.gauges["eta"]``, the seconds until training is over, if the number of
    iterations is known. The estimate supposes that what lies between two training passes (validations, checkpoints)
    goes on taking the share that it has taken so far: before the first validation it knows nothing of it.

    Piped onto the last place of a phase, its means are in ``run.results`` too; piped onto the run before ``log``, it
    sees all phases and times the run's parts before it, and its numbers are in the log's rows between passes. Behind
    ``log`` they are in no row.

    All are seconds that the run was at work: your own code between two states is not counted. On a GPU they are the
    host's: the device may be behind, and waiting for it counts where somebody reads a tensor. The timer reads none.
    Where a source does not know its length, a batch is fetched within the iteration before it, and counts there.

    Args:
        window: Training iterations over which the speed is averaged.

    Raises:
        RuntimeError: If the states belong to no run.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> phase = lt.train(model, [torch.ones(4, 1)] * 3, lambda model, batch: model(batch).mean())
        >>> phase = phase | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1)) | lt.timer()
        >>> run = lt.workflow([(phase, 1)], max_epochs=1)
        >>> run.to_end()["train/eta"], sorted(run.results)
        (0.0, ['train/data_time', 'train/eta', 'train/iter_time', 'train/loss', 'train/samples_per_s'])
    """

    window: int = attrs.field(default=100, kw_only=True, validator=whole())
    elsewhere: float = attrs.field(default=0.0, init=False, repr=False)  # seconds between training passes,
    trained: int = attrs.field(default=0, init=False, repr=False)  # and training iterations, both in the whole run
    _spent: float = attrs.field(default=0.0, init=False, repr=False)  # seconds of training iterations
    _samples: int = attrs.field(default=0, init=False, repr=False)
    _marks: deque[tuple[float, int]] = attrs.field(init=False, repr=False)  # those two, before each of the window
    before: float | None = attrs.field(default=None, init=False, repr=False)  # when the last training state was here
    _anew: bool = attrs.field(default=False, init=False, repr=False)  # a pass has begun since
    only_looks: ClassVar[bool] = True

    def __attrs_post_init__(self) -> None:
        self._marks = deque(maxlen=self.window)

    def on_pass(self, run: Run) -> None:
        """What lies between two training passes is no training."""
        self._anew = True

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        for state in states:
            if state.run is None:
                raise RuntimeError("timer: these states belong to no run, so nobody keeps the time. Iterate a phase.")
            if not state.dropped:
                cursor = state.run.cursor
                now, began = cursor.seconds, cursor.began
                state.metrics["data_time"] = cursor.fetched - began
                state.metrics["iter_time"] = now - began
                if state.trains:
                    self._estimate(state, now, began)
            yield state

    def _estimate(self, state: State, now: float, began: float) -> None:
        """Take in a training iteration, from when the one before was here to *now*."""
        before = self.before
        if before is None:
            before = began
        elif self._anew:
            self.elsewhere += began - before
            before = began
        self.before, self._anew = now, False
        marks = self._marks
        marks.append((self._spent, self._samples))
        self._spent += now - before
        self._samples += state.num_samples
        self.trained += 1
        spent, samples = marks[0]
        spent = self._spent - spent
        gauges: dict[str, Any] = state.gauges
        if spent:
            gauges["samples_per_s"] = (self._samples - samples) / spent
        total = None if state.plan is None else state.plan.iterations
        if total is not None:
            left = total - state.iteration - 1
            gauges["eta"] = left * (spent / len(marks) + self.elsewhere / self.trained)
