"""A GradScaler and its optimizers: it changes its scale once all of them have had their step."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakKeyDictionary, ref

import attrs
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .gradients import parameters_of
from .state import State


@attrs.define(eq=False)
class _Unscaled:
    """Gradients that a scaler has unscaled: where, for whom, and whether one of them has moved."""

    state: ref[State]  # through its run it holds the scaler, which could never go
    waiting: list[Optimizer]
    moved: bool = False


_unscaled: WeakKeyDictionary[GradScaler, _Unscaled] = WeakKeyDictionary()  # as long as somebody waits


def unscale(scaler: GradScaler, optimizers: Iterable[Optimizer], state: State) -> None:
    """Unscale the gradients of *optimizers*, each of which now waits for its step in the iteration of *state*."""
    waiting = list(optimizers)
    for optimizer in waiting:
        scaler.unscale_(optimizer)
    _unscaled[scaler] = _Unscaled(ref(state), waiting)


def step(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Step *optimizer*, unless its gradients are not finite; whether it moved.

    One without any gradient (its weights are frozen), which torch's scaler refuses, is stepped as it would be without.
    """
    moved: list[bool] = []
    handle = optimizer.register_step_post_hook(lambda *_: moved.append(True))
    try:
        if any(parameter.grad is not None for parameter in parameters_of([optimizer])):
            scaler.step(optimizer)
        else:
            optimizer.step()
    finally:
        handle.remove()
    return bool(moved)


def settle(scaler: GradScaler, optimizer: Optimizer, moved: bool) -> bool:
    """Have the scale change, if *optimizer* was the last that waited for its step.

    Returns:
        Whether any of them moves: True as long as one is still to come.
    """
    unscaled = _unscaled.get(scaler)
    if unscaled is not None and any(one is optimizer for one in unscaled.waiting):
        unscaled.waiting = [one for one in unscaled.waiting if one is not optimizer]
        unscaled.moved = moved = unscaled.moved or moved
        if unscaled.waiting:
            return True
        del _unscaled[scaler]
    scaler.update()
    return moved


def forget_dropped(scaler: GradScaler) -> None:
    """Have the scale change, if the iteration that was unscaled last was dropped before all had their step."""
    unscaled = _unscaled.get(scaler)
    state = unscaled.state() if unscaled is not None else None
    if state is not None and state.dropped:
        del _unscaled[scaler]
        scaler.update()
