"""Set the learning rate of each iteration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .. import schedules
from ..intervals import epochs
from ..schedules import Schedule
from .schedule import schedule as schedule_option


def schedule_lr(
    optimizer: Optimizer,
    schedule: Schedule | LRScheduler | Sequence[Schedule],
    *,
    warmup: int | epochs | schedules.warmup = 0,
    by: Literal["update", "iteration", "epoch"] = "update",
) -> schedule_option:
    """Set the learning rate of every param group, each from its own base value, before the optimizer moves.

    It is ``schedule(optimizer, "lr", ...)``, which says what a base value is, and what a hand may do. Sets
    ``state.lr`` to the first group's.

    Args:
        optimizer: Its param groups are set.
        schedule: One of ``lt.schedules``, a function of (done, total, base), a list of one for each param group, or a
            ``torch.optim.lr_scheduler``, which is stepped after each update (or iteration, or epoch) just as in a loop
            by hand.
        warmup: Updates over which the learning rate grows linearly from a tenth of the schedule's value to the
            whole (iterations, with ``by="iteration"``); ``lt.epochs(n)``; or ``lt.schedules.warmup(...)``.
        by: What *done* and *total* count: ``"update"``, ``"iteration"`` or ``"epoch"``.

    Raises:
        ValueError: If the schedule needs a horizon and the run has none, or cannot do so many steps, when the run is
            built.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(()))
        >>> sgd = torch.optim.SGD([weight], lr=0.1)
        >>> phase = lt.train(torch.nn.ParameterList([weight]), [1, 2], lambda model, batch: model[0] * batch)
        >>> pipe = phase | lt.schedule_lr(sgd, lt.schedules.poly()) | lt.optimize(sgd)
        >>> [state.lr for state in pipe]
        [0.1, 0.05]
    """
    return schedule_option(optimizer, "lr", schedule, warmup=warmup, by=by)
