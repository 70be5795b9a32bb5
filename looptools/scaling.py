"""A GradScaler and its optimizers: it changes its scale once all of them have had their step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from weakref import WeakKeyDictionary, ref

import attrs
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .gradients import parameters_of
from .state import State


@attrs.define(eq=False)
class _Unscaled:
    """Gradients that a scaler has unscaled since its scale changed: where, for whom, and who has not been stepped."""

    state: ref[State]  # through its run it holds the scaler, which could never go
    optimizers: list[Optimizer]
    waiting: list[Optimizer]


_unscaled: WeakKeyDictionary[GradScaler, _Unscaled] = WeakKeyDictionary()  # as long as somebody waits


def prepare(scaler: GradScaler, optimizers: Iterable[Optimizer]) -> None:
    """Before a loss is scaled for *optimizers*: have the scale change, if they are stepped twice an iteration.

    So it does where an update that was to have it change did not come, since its gradients were left alone.
    """
    unscaled = _unscaled.get(scaler)
    if unscaled is None or len(unscaled.waiting) == len(unscaled.optimizers):
        return
    if any(one is other for one in optimizers for other in unscaled.optimizers):
        _change(scaler)


def unscale(scaler: GradScaler, optimizers: Iterable[Optimizer], state: State) -> None:
    """Unscale the gradients of *optimizers*, each of which now waits for its step in the iteration of *state*."""
    more = list(optimizers)
    for optimizer in more:
        scaler.unscale_(optimizer)
    unscaled = _unscaled.get(scaler)
    if unscaled is None or unscaled.state() is not state:
        unscaled = _unscaled[scaler] = _Unscaled(ref(state), [], [])
    unscaled.optimizers += more
    unscaled.waiting += more


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


def settle(scaler: GradScaler, optimizer: Optimizer, last: bool) -> None:
    """Have the scale change, if *optimizer* was the last that waited for its step, and no other update comes."""
    unscaled = _unscaled.get(scaler)
    if unscaled is None:
        scaler.update()
        return
    unscaled.waiting = [one for one in unscaled.waiting if one is not optimizer]
    if last and not unscaled.waiting:
        _change(scaler)


def forget_dropped(scaler: GradScaler, state: State) -> None:
    """Have the scale change, if *state* was dropped before all that were unscaled in it had their step."""
    unscaled = _unscaled.get(scaler)
    if state.dropped and unscaled is not None and unscaled.state() is state:
        _change(scaler)


def noted(scaler: GradScaler) -> Callable[[], None]:
    """Note who waits for a step now: returns what puts that back."""
    held = _unscaled.get(scaler)
    before = None if held is None else (held.state, list(held.optimizers), list(held.waiting))

    def put_back() -> None:
        _unscaled.pop(scaler, None)
        if before is not None:
            state, optimizers, waiting = before
            _unscaled[scaler] = _Unscaled(state, list(optimizers), list(waiting))

    return put_back


def forget(scaler: GradScaler) -> None:
    """The iteration that is open is given up: nothing is unscaled, and nobody waits for a step."""
    _unscaled.pop(scaler, None)
    scaler._per_optimizer_states.clear()


def _change(scaler: GradScaler) -> None:
    del _unscaled[scaler]
    scaler.update()
