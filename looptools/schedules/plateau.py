"""A value that drops when a result stops getting better."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import attrs
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..checks import one_of, whole
from ..intervals import highest, require_written
from .options import Schedule, between

if TYPE_CHECKING:
    from ..run import Run


def _is_best(part: Any, field: Any, best: Any) -> None:
    if not isinstance(best, highest):
        raise TypeError(f'plateau: best must be lt.lowest("val/loss") or lt.highest(...), got {best!r}.')


@attrs.frozen(eq=False)
class plateau:
    """Multiply by *factor* whenever a result has not got better for more than *patience* passes.

    After k drops the value is max(base · factor^k, floor). A lowest result r is better than the best b so far where
    r < b · (1 - threshold) (``"rel"``) or r < b - threshold (``"abs"``), a highest one where r > b · (1 + threshold) or
    r > b + threshold. Source: ``torch.optim.lr_scheduler.ReduceLROnPlateau``, whose code it runs.

    Counts the workflow's passes of the phase that the metric names, whatever the part is stepped ``by``, as torch's
    does that is stepped by hand after each of them. Those of ``run.validate`` do not count, unless that phase is not in
    the workflow, so that there are no others. It remembers nothing: it goes through ``run.history``, which is saved.
    Drops of less than 1e-8 are left out, as torch does.

    Args:
        best: ``lt.lowest("val/loss")`` or ``lt.highest("val/accuracy")``.
        factor: What the value is multiplied by.
        patience: Passes without improvement that are borne with.
        threshold: How much better counts as better.
        threshold_mode: Whether that is a fraction of the best so far (``"rel"``) or a difference (``"abs"``).
        cooldown: Passes after a drop that are not counted.
        floor: What the value does not fall below.

    Raises:
        LookupError: If nobody has written the metric after the first round.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> step = lambda model, batch: {"loss": model(batch).sum() * 0 + 1}
        >>> drop = lt.schedules.plateau(lt.lowest("val/loss"), factor=0.5, patience=0)
        >>> phase = lt.train(model, [torch.ones(1, 1)], step) | lt.schedule_lr(sgd, drop) | lt.optimize(sgd)
        >>> run = lt.workflow([(phase, 1), (lt.validate(model, [torch.ones(1, 1)], step), 1)], max_epochs=4)
        >>> [state.lr for state in run if state.trains]
        [0.1, 0.1, 0.05, 0.025]
    """

    best: highest = attrs.field(validator=_is_best)
    factor: float = attrs.field(default=0.1, kw_only=True, validator=between(0, 1, low_too=False, high_too=False))
    patience: int = attrs.field(default=10, kw_only=True, validator=whole(0))
    threshold: float = attrs.field(default=1e-4, kw_only=True, validator=between(0, float("inf")))
    threshold_mode: Literal["rel", "abs"] = attrs.field(default="rel", kw_only=True, validator=one_of("rel", "abs"))
    cooldown: int = attrs.field(default=0, kw_only=True, validator=whole(0))
    floor: float = attrs.field(default=0.0, kw_only=True, validator=between(0, float("inf")))
    needs_total: ClassVar[bool] = False

    def bound(self, run: Run, total: int | None) -> Schedule:
        """The schedule that reads *run*'s history."""
        return _Judge(self, run)

    def __call__(self, done: int, total: int | None, base: float) -> float:
        raise RuntimeError("plateau: it depends on a run's results. Give it to schedule_lr(...) in a run.")


class _Judge:
    """Goes through the history of a run; a call costs next to nothing while no pass has ended."""

    def __init__(self, options: plateau, run: Run) -> None:
        self.options = options
        self.run = run
        self.phase, _, self.metric = options.best.metric.partition("/")
        self._forget()

    def __call__(self, done: int, total: int | None, base: float) -> float:
        history = self.run.history
        if len(history) != self.seen or (history and history[-1] is not self.newest):
            self._catch_up(history)
        if not self.results and self.run.progress.round:  # after a whole round everybody has written
            require_written("plateau", self.options.best.metric, self.run)
        if base not in self.schedulers:
            self.schedulers[base] = self._scheduler(base)
        value: float = self.schedulers[base].optimizer.param_groups[0]["lr"]
        return value

    def _forget(self) -> None:
        self.seen = 0  # rows of the history,
        self.newest: dict[str, Any] | None = None  # the last of which was this
        self.results: list[float] = []
        self.schedulers: dict[float, ReduceLROnPlateau] = {}  # one for each base value

    def _catch_up(self, history: list[dict[str, Any]]) -> None:
        if self.seen > len(history) or (self.seen and history[self.seen - 1] is not self.newest):
            self._forget()  # it is another history: that of a resumed run
        of_workflow = self.phase in self.run.cursor.passes.names.values()
        for row in history[self.seen :]:
            on_demand = of_workflow and row.get("on_demand", False)
            if row["phase"] == self.phase and self.metric in row and not on_demand:
                self.results.append(row[self.metric])
                for scheduler in self.schedulers.values():
                    scheduler.step(row[self.metric])
        self.seen, self.newest = len(history), history[-1] if history else None

    def _scheduler(self, base: float) -> ReduceLROnPlateau:
        """Torch's own, on an optimizer that moves nothing, after all results until now."""
        options = self.options
        scheduler = ReduceLROnPlateau(
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=base),
            mode="min" if options.best.sign < 0 else "max",
            factor=options.factor,
            patience=options.patience,
            threshold=options.threshold,
            threshold_mode=options.threshold_mode,
            cooldown=options.cooldown,
            min_lr=options.floor,
        )
        for result in self.results:
            scheduler.step(result)
        return scheduler
