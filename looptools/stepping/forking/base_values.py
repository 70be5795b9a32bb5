"""Options of a run's optimizers: what they are called, and how they are set under schedules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ...checkpoints.inventory import inventory
from ...cursor import Cursor
from ...middleware.schedule import schedule

KEPT = ("initial_", "scheduled_", "base_", "max_", "min_")  # what a group's keys of schedules begin with


def option_names(optimizers: Iterable[Optimizer]) -> list[str]:
    """The options that their groups have, without what schedules keep there."""
    keys = [key for one in optimizers for group in one.param_groups for key in group]
    told = (key for key in keys if key != "params" and not key.startswith(KEPT) and not key.endswith("_by_hand"))
    return list(dict.fromkeys(told))


def set_option(cursor: Cursor, name: str, value: Any) -> None:
    """Set an option in every param group that has it; where a schedule moves it, as the base value of that.

    Raises:
        ValueError: If it is the learning rate, and a scheduler of torch's has bounds of its own.
    """
    found = inventory(cursor)
    for optimizer in found.optimizers.values():
        if not any(name in group for group in optimizer.param_groups):
            continue
        torchs = [one for one in found.schedulers.values() if one.optimizer is optimizer] if name == "lr" else []
        for scheduler in torchs:
            _rebase(scheduler, value)
        ours = any(
            isinstance(slot.part, schedule) and slot.part.optimizer is optimizer and slot.part.option == name
            for slot in cursor.slots
        )
        for group in optimizer.param_groups:
            if name in group:
                _set(group, name, value, scheduled=ours or bool(torchs))
        for scheduler in torchs:
            if hasattr(scheduler, "_last_lr"):
                scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def _set(group: dict[str, Any], name: str, value: Any, scheduled: bool) -> None:
    base, by_hand = group.get(f"initial_{name}"), group.pop(f"{name}_by_hand", 1.0)
    scales = scheduled and base is not None and (isinstance(base, Tensor) or base != 0)
    now = group[name] * (value / (base * by_hand)) if scales else value  # until the schedule sets it
    _put(group, name, now)
    if base is not None:
        _put(group, f"initial_{name}", value)
    if f"scheduled_{name}" in group:
        group[f"scheduled_{name}"] = now


def _put(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group.get(key), Tensor):  # a graph may have been captured with it
        group[key].fill_(value)
    else:
        group[key] = value


def _rebase(scheduler: LRScheduler, value: Any) -> None:
    """Have a scheduler of torch's, and those in it, begin from *value*."""
    for one in _all_of(scheduler):
        if hasattr(one, "max_lrs") or any("max_lr" in group for group in one.optimizer.param_groups):
            kind = type(one).__name__
            raise ValueError(
                f"fork: lr is moved by {kind} between bounds of its own. Fork without lr, and give each fork another "
                f"one: lr = torch.optim.lr_scheduler.{kind}(fork.optimizer, ...); "
                'fork.replace("schedule_lr", lt.schedule_lr(fork.optimizer, lr)).'
            )
        if hasattr(one, "base_lrs"):
            one.base_lrs = [value] * len(one.base_lrs)


def _all_of(scheduler: Any) -> Iterator[Any]:
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _all_of(inner)
