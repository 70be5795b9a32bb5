"""Average the weights that a long training passes through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
from torch.optim.swa_utils import AveragedModel

from ..intervals import Interval, epochs, interval, iterations, rounds
from ..state import State
from .ema import AVERAGED, is_averaged, require_same_model, show_averaged

if TYPE_CHECKING:
    from ..run import Run


def _start(value: Any) -> Any:
    return iterations(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _is_count(part: Any, field: Any, value: Any) -> None:
    if not isinstance(value, iterations | epochs):
        raise TypeError(f"swa: start must be lt.epochs(n) or a number of training iterations, got {value!r}.")


def _within_training(part: Any, field: Any, value: Any) -> None:
    if isinstance(value, rounds):
        raise ValueError(
            f"swa: a round can end in validation, where nothing is averaged. Give every=lt.epochs({value.n})."
        )


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class swa:
    """Take the weights into an equal average when *start* is reached, and at each *every* from there on.

    Stands behind ``update``, and calls ``averaged.update_parameters(state.model)``: stochastic weight averaging
    (Izmailov et al. 2018, algorithm 1). The weights that stand when *start* is reached are the first, as there; where
    *start* counts iterations and *every* epochs, those at the end of that epoch.

    BatchNorm statistics are those of the newest weights until they are renewed: an entry of the workflow that is a
    plain function does that, and the average is judged after it. The learning rate is a schedule's affair:
    ``lt.schedule_lr(optimizer, torch.optim.swa_utils.SWALR(optimizer, 0.05), by="epoch")``.
    Device reads are those of ``AveragedModel``: see `ema`.

    Args:
        averaged: The average. It belongs to you; the part only has it updated.
        start: Training that comes first: ``lt.epochs(n)`` or a number of iterations.
        every: How often from there on: ``lt.epochs(n)`` or a number of training iterations, counted from the first
            average; or ``lt.samples(n)``, ``lt.seconds(n)`` or a predicate of the state, which know nothing of *start*.

    Raises:
        ValueError: If *averaged* has other shapes than the model that the phase trains, when the run is built.

    Example:
        >>> from torch.optim.swa_utils import AveragedModel, update_bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.BatchNorm1d(2))
        >>> averaged, loader = AveragedModel(model), [torch.randn(4, 1) for _ in range(3)]
        >>> sgd, step = torch.optim.SGD(model.parameters(), lr=0.1), lambda model, batch: model(batch).pow(3).mean()
        >>> train = lt.train(model, loader, step) | lt.optimize(sgd) | lt.swa(averaged, start=lt.epochs(2))
        >>> refresh, val = lambda run: update_bn(loader, averaged), lt.validate(averaged, loader, step)
        >>> run = lt.workflow([(train, 1), (refresh, 1), (val, 1)], max_epochs=4)
        >>> results = run.to_end()
        >>> averaged.n_averaged
        tensor(3)
    """

    averaged: AveragedModel = attrs.field(validator=is_averaged, repr=show_averaged)
    start: int | iterations | epochs = attrs.field(kw_only=True, converter=_start, validator=_is_count)
    every: int | Interval = attrs.field(
        factory=lambda: epochs(1), kw_only=True, converter=interval, validator=_within_training
    )
    first: int | None = attrs.field(default=None, init=False, repr=False)  # epoch or iteration of the first average
    closes_pass: ClassVar[bool] = True

    def on_build(self, run: Run) -> None:
        """See that it averages the model that is trained."""
        require_same_model(self, run)

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        at_ends = isinstance(self.every, epochs)  # a pass ends, also where its last batch was dropped
        for state in states:
            if state.trains and (at_ends or not state.dropped) and self._has_begun(state) and self._is_due(state):
                state.committed = state.committed or AVERAGED
                self.averaged.update_parameters(state.model)
            yield state

    def _has_begun(self, state: State) -> bool:
        start: Any = self.start
        if isinstance(start, iterations):
            return state.iteration + 1 >= start.n
        return state.epoch >= start.n or (state.epoch + 1 == start.n and state.last)

    def _is_due(self, state: State) -> bool:
        """Whether *every* is full, counted from the first average."""
        every: Any = self.every
        if not isinstance(every, iterations | epochs):
            return bool(every(state))
        at_ends = isinstance(every, epochs)
        done = 1 + (state.epoch if at_ends else state.iteration)
        if self.first is not None and (done - self.first) % every.n:
            return False
        if at_ends and not state.last:
            return False
        self.first = done if self.first is None else self.first
        return True

    def leaves(self, state: State) -> str:
        """What a failure in the middle of this part can leave behind."""
        return "some of the averaged weights may have moved already, and would move again"
