"""Set the momentum of each iteration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch.optim import Optimizer

from .. import schedules
from ..intervals import epochs
from ..schedules import Schedule
from .schedule import schedule as schedule_option


def schedule_momentum(
    optimizer: Optimizer,
    schedule: Schedule | Sequence[Schedule],
    *,
    warmup: int | epochs | schedules.warmup = 0,
    by: Literal["update", "iteration", "epoch"] = "update",
) -> schedule_option:
    """Set the momentum of every param group, or the first of its betas, before the optimizer moves.

    It is ``schedule(optimizer, "momentum", ...)``, which says what a base value is, and what a hand may do. Sets
    ``state.gauges["momentum"]`` to the first group's.

    Args:
        optimizer: Its param groups are set.
        schedule: One of ``lt.schedules``, a function of (done, total, base), or a list of one for each param group.
        warmup: Updates over which the momentum falls from the schedule's value / 0.95 to the value itself (iterations,
            with ``by="iteration"``); ``lt.epochs(n)``; or ``lt.schedules.warmup(...)``, whose factor it is divided by.
        by: What *done* and *total* count: ``"update"``, ``"iteration"`` or ``"epoch"``.

    Raises:
        LookupError: If the optimizer has no momentum.
        ValueError: If the momentum would pass 1 (reach it, with betas), or as for `schedule_lr`.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(()))
        >>> adam = torch.optim.Adam([weight], betas=(0.9, 0.999))
        >>> phase = lt.train(torch.nn.ParameterList([weight]), [1, 2], lambda model, batch: model[0] * batch)
        >>> pipe = phase | lt.schedule_momentum(adam, lt.schedules.multistep([1], gamma=0.5)) | lt.optimize(adam)
        >>> [adam.param_groups[0]["betas"] for state in pipe]
        [(0.9, 0.999), (0.45, 0.999)]
    """
    return schedule_option(optimizer, "momentum", schedule, warmup=warmup, by=by)
