"""Keep a moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import attrs
from torch.nn import Module
from torch.optim.swa_utils import AveragedModel

from ..checks import one_of, whole
from ..state import State

if TYPE_CHECKING:
    from ..run import Run

AVERAGED = "the averaged weights have moved"


def is_averaged(part: Any, field: Any, value: Any) -> None:
    """A validator for averaged models."""
    if not isinstance(value, AveragedModel):
        raise TypeError(
            f"{type(part).__name__}: {field.name} must be a torch.optim.swa_utils.AveragedModel, got a "
            f"{type(value).__name__}. Make one first: AveragedModel(model)."
        )


def show_averaged(averaged: AveragedModel) -> str:
    """How an averaged model is shown among a part's options."""
    return f"AveragedModel({type(averaged.module).__name__})"


def require_same_model(part: Any, run: Run) -> None:
    """See that *part* averages the weights of the model that its phase trains.

    Raises:
        ValueError: If the model has other parameters or buffers than the average, or nothing is trained here.
    """
    name, averaged, cursor = type(part).__name__, part.averaged, run.cursor
    of_run = any(slot.part is part for slot in cursor.run_slots)
    through = [
        phase
        for phase in cursor.passes.agenda.phases
        if phase.trains and (of_run or any(slot.part is part for slot in cursor.lines[id(phase)]))
    ]
    if not through:
        raise ValueError(f"{name}: no training goes through it. Pipe it onto a training phase, behind optimize.")
    for phase in through:
        if phase.model is averaged:
            raise ValueError(f"{name}: {phase.name} trains the average itself. Give that phase the model it is of.")
        here, there = _shapes(averaged.module), _shapes(phase.model)
        if here != there:
            count = [f"{len(params)} parameters and {len(buffers)} buffers" for params, buffers in (here, there)]
            but = count[1] if count[0] != count[1] else "others of as many"
            raise ValueError(
                f"{name}: averaged was made of another model than the one that {phase.name} trains: it has "
                f"{count[0]}, the model {but}. Write AveragedModel(model)."
            )


def _shapes(model: Any) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Those of parameters and of buffers; names do not count, since wrappers change them."""
    if not isinstance(model, Module):
        return [], []
    return [tuple(p.shape) for p in model.parameters()], [tuple(b.shape) for b in model.buffers()]


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class ema:
    """Take the weights into a running average after updates.

    Stands behind ``update``, and calls ``averaged.update_parameters(state.model)``. What an update is worth is
    *averaged*'s own affair: ``AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))`` decays, with
    ``use_buffers=True`` it averages buffers too (else it copies them), and its first call copies the weights: set
    ``averaged.n_averaged.fill_(1)`` to begin from the initial ones. An ``avg_fn`` is given the number of weights
    averaged so far, which is how a decay warms up::

        lambda ema, weight, n: ema + (weight - ema) * torch.clamp(9 / (10 + n), min=0.001)

    Judge the average with ``lt.validate(averaged, loader, step)``. Checkpoints hold it like any other model.

    The part reads no device. ``AveragedModel`` does, as in a loop by hand: twice a call if its ``n_averaged`` is there.
    If that is on the CPU, as when an average is made of a model that was moved before, it is copied over instead: once
    for each dtype with ``multi_avg_fn``, once for each parameter with ``avg_fn``.

    Args:
        averaged: The average. It belongs to you; the part only has it updated.
        every: How many updates (or iterations) there are to a call, counted from *start*.
        by: What counts: ``"update"``, only iterations on which the optimizer moved, not what a GradScaler skipped; or
            ``"iteration"``, every training iteration.
        start: Updates (or iterations) before which nothing is averaged.

    Raises:
        ValueError: When the run is built: if *averaged* has other shapes than the model that the phase trains, or
            counts updates and no part of the run makes any.

    Example:
        >>> from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        >>> sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> train = lt.train(model, [torch.ones(1, 1)] * 2, lambda model, batch: model(batch).mean())
        >>> results = (train | lt.optimize(sgd) | lt.ema(averaged)).to_end()
        >>> round(float((averaged.module.weight - model.weight).detach()), 4)
        0.5
    """

    averaged: AveragedModel = attrs.field(validator=is_averaged, repr=show_averaged)
    every: int = attrs.field(default=1, kw_only=True, validator=whole())
    by: Literal["update", "iteration"] = attrs.field(
        default="update", kw_only=True, validator=one_of("update", "iteration")
    )
    start: int = attrs.field(default=0, kw_only=True, validator=whole(0))
    updates: int = attrs.field(default=0, init=False, repr=False)  # that came through here

    def on_build(self, run: Run) -> None:
        """See that it averages the model that is trained."""
        require_same_model(self, run)

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        by_update, every, start = self.by == "update", self.every, self.start
        for state in states:
            if state.trains and (state.updates or not by_update):
                done = self.updates + 1 if by_update else state.iteration + 1
                if done > start and not (done - start) % every:
                    state.committed = state.committed or AVERAGED
                    self.averaged.update_parameters(state.model)
                if by_update:
                    self.updates = done
            yield state

    def leaves(self, state: State) -> str:
        """What a failure in the middle of this part can leave behind."""
        return "some of the averaged weights may have moved already, and would move again"
