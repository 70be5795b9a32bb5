"""Set the learning rate of each iteration."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import attrs
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .. import schedules
from ..checks import is_optimizer, one_of
from ..pipeline import name_of
from ..schedules import Schedule
from ..state import State

if TYPE_CHECKING:
    from ..run import Run


def _schedule(part: schedule_lr, field: object, schedule: Any) -> None:
    if isinstance(schedule, type) or not (callable(schedule) or isinstance(schedule, LRScheduler)):
        raise TypeError(
            f"schedule_lr: schedule must be one of lt.schedules, a torch scheduler or a function of "
            f"(done, total, base), got {schedule!r}. A class needs its options first: lt.schedules.cosine()."
        )
    if isinstance(schedule, ReduceLROnPlateau):
        raise TypeError("schedule_lr: ReduceLROnPlateau waits for a metric, which schedule_lr does not give it.")
    if isinstance(schedule, LRScheduler) and schedule.optimizer is not part.optimizer:
        raise ValueError("schedule_lr: the torch scheduler was made for another optimizer than the one given here.")


def _warmup(value: Any) -> Any:
    return schedules.warmup(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _fits(part: schedule_lr, field: object, value: Any) -> None:
    if not isinstance(value, schedules.warmup):
        raise TypeError(f"schedule_lr: warmup must be a count or lt.schedules.warmup(...), got {value!r}.")
    if value.count and isinstance(part.schedule, LRScheduler):
        raise ValueError(
            "schedule_lr: warmup goes with lt.schedules only. With torch schedulers, put a LinearLR before yours "
            "in torch.optim.lr_scheduler.SequentialLR."
        )


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class schedule_lr:
    """Set the learning rate of every param group, each from its own base value, before the optimizer moves.

    A group's base value is its ``"initial_lr"`` if it has one, as with torch's schedulers, else its ``"lr"``. What was
    written last stands in its ``"scheduled_lr"``, so that several phases can schedule one optimizer.
    A learning rate changed by hand rescales all that follows, which is said once; where the value in force was 0,
    the hand's value holds for that iteration. Sets ``state.lr`` to the first group's.

    Args:
        optimizer: Its param groups are set.
        schedule: One of ``lt.schedules``, a function of (done, total, base), or a ``torch.optim.lr_scheduler``,
            which is stepped after each update (or iteration, or epoch) just as in a loop by hand.
        warmup: Updates over which the learning rate grows linearly from a tenth of the schedule's value to the
            whole (iterations, with ``by="iteration"``); or ``lt.schedules.warmup(...)``.
        by: What *done* and *total* count: ``"update"``, ``"iteration"`` or ``"epoch"``.

    Raises:
        ValueError: If the schedule needs a horizon and the run has none, when the run is built.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(()))
        >>> sgd = torch.optim.SGD([weight], lr=0.1)
        >>> phase = lt.train(torch.nn.ParameterList([weight]), [1, 2], lambda model, batch: model[0] * batch)
        >>> pipe = phase | lt.schedule_lr(sgd, lt.schedules.poly()) | lt.optimize(sgd)
        >>> [state.lr for state in pipe]
        [0.1, 0.05]
    """

    optimizer: Optimizer = attrs.field(validator=is_optimizer, repr=lambda optimizer: type(optimizer).__name__)
    schedule: Schedule | LRScheduler = attrs.field(
        validator=_schedule, repr=lambda s: repr(s) if attrs.has(type(s)) else name_of(s)
    )
    warmup: int | schedules.warmup = attrs.field(default=0, kw_only=True, converter=_warmup, validator=_fits)
    by: Literal["update", "iteration", "epoch"] = attrs.field(
        default="update", kw_only=True, validator=one_of("update", "iteration", "epoch")
    )
    stepped: int = attrs.field(default=0, init=False, repr=False)  # of a torch scheduler
    _total: int | None = attrs.field(default=None, init=False, repr=False)
    _ready: bool = attrs.field(default=False, init=False, repr=False)

    def on_build(self, run: Run) -> None:
        """See that the run's length is known, if the schedule asks for it."""
        self._total, self._ready = run.total(self.by, self.optimizer), True
        if self._total is None and getattr(self.schedule, "needs_total", False):
            raise ValueError(
                f"schedule_lr: {self.schedule!r} needs to know how many {self.by}s the run will have, and the "
                "training source has no length. Bound the run with max_iterations=, or give the entry a length: "
                "(train, lt.iterations(1000))" + (", and use by='iteration'." if self.by == "update" else ".")
            )

    def on_start(self, run: Run) -> None:
        """In a fresh run, begin from the base value; from the hand's, if it was changed since another run wrote it."""
        if run.resumed or isinstance(self.schedule, LRScheduler):
            return
        for group in self.optimizer.param_groups:
            lr, written = group["lr"], group.pop("scheduled_lr", None)
            if written is not None and lr != written:
                group["initial_lr"] = lr
            group.pop("lr_by_hand", None)

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        by, schedule, optimizer = self.by, self.schedule, self.optimizer
        warmup: Any = self.warmup
        for state in states:
            if state.run is None:
                raise RuntimeError("schedule_lr: these states belong to no run, so nobody counts. Iterate a phase.")
            updates = state.run.progress.updates.get(optimizer, 0)
            done = updates if by == "update" else state.iteration if by == "iteration" else state.epoch
            if isinstance(schedule, LRScheduler):
                self._step(schedule, done)
            else:
                if not self._ready:  # in a plain pipe
                    self.on_build(state.run)
                steps = updates if by == "epoch" else done  # a warm-up counts updates under a schedule by epoch too
                factor = warmup(steps) if steps < warmup.count else 1.0
                for group in optimizer.param_groups:
                    lr = group["lr"]
                    if "initial_lr" not in group:
                        group["initial_lr"] = lr.clone() if isinstance(lr, Tensor) else lr
                    value = factor * schedule(done, self._total, float(group["initial_lr"]))
                    if isinstance(lr, Tensor):
                        lr.fill_(value)
                    elif lr == group.get("scheduled_lr", lr) or self._by_hand(group):
                        group["lr"] = group["scheduled_lr"] = value * group.get("lr_by_hand", 1.0)
            state.lr = optimizer.param_groups[0]["lr"]
            yield state

    def _step(self, scheduler: LRScheduler, done: int) -> None:
        for _ in range(done - self.stepped):
            scheduler.step()
            self.stepped += 1

    @staticmethod
    def _by_hand(group: dict[str, Any]) -> bool:
        """Take a learning rate that was changed by hand into account; False if it holds for this iteration only."""
        lr, written = group["lr"], group["scheduled_lr"]
        if not written:
            group["scheduled_lr"] = lr
            return False
        group["lr_by_hand"] = group.get("lr_by_hand", 1.0) * lr / written
        warnings.warn(
            f"schedule_lr: a learning rate was changed by hand from {written:g} to {lr:g}; "
            f"what follows is scaled by {group['lr_by_hand']:g}.",
            stacklevel=2,
        )
        return True
