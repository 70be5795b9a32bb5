"""The usual way to train: backward, clip, update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ..gradients import one_or_several, parameters_of, require_optimizers
from ..pipeline import Chain, Middleware, chain
from ..weighing import Weigh
from .backward import backward
from .clip_grad_norm import clip_grad_norm
from .clip_grad_value import clip_grad_value
from .update import update
from .update_by_closure import update_by_closure


def optimize(
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    max_value: float | None = None,
    accumulate: int = 1,
    across_epochs: bool = False,
    weigh: Weigh = "batches",
    scaler: GradScaler | None = None,
    between: Middleware | Sequence[Middleware] = (),
    name: str = "",
) -> Chain:
    """Make the recipe ``backward | clip_grad_value | clip_grad_norm | update``.

    Several optimizers go down one loss together: ``optimize([muon, adamw])`` zeroes and clips the parameters of all (as
    one vector, where it clips by norm), and has an ``update`` for each. With a scaler, one of them may skip a step
    that the others make. For LBFGS, whose step evaluates the loss several times, it is ``update_by_closure``.

    Args:
        optimizer: Moves the weights; its parameters are the ones zeroed and clipped. A list of several, each with
            parameters of its own.
        max_norm: Upper bound of the gradients' joint norm; None leaves clipping by norm out.
        norm_type: Order of that norm; ``inf`` for the largest element.
        max_value: Upper bound of each element of the gradients; None leaves clipping by value out.
        accumulate: Iterations whose gradients make one update; the last window of a pass may be shorter.
        across_epochs: Whether windows go on across the ends of passes, as with mmcv.
        weigh: What an iteration counts in its window: ``"batches"``, ``"samples"``, or a function of the state that
            gives a number or a tensor of shape ``()`` (its tokens).
        scaler: ``torch.amp.GradScaler`` for fp16.
        between: A part, or several, that look at the gradients or change them, between backward and clipping:
            ``between=lt.nan_guard()``, ``between=[lt.grad_noise(params), lt.watch(model)]``.
        name: What the part names begin with where a pipe optimizes twice: ``"D"`` makes ``D.backward``.

    Raises:
        TypeError: If *optimizer* is not one, or LBFGS is one of several.
        ValueError: If *max_norm* or *max_value* is not positive, *accumulate* less than 1, one of the options
            does not go with LBFGS, or two optimizers hold the same parameter.

    Example:
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(()))], lr=0.1)
        >>> [type(part).__name__ for part in optimize(sgd, max_norm=1.0).parts]
        ['backward', 'clip_grad_norm', 'update']
    """
    optimizer = one_or_several(optimizer)
    optimizers = require_optimizers("optimize", optimizer)
    window = {"accumulate": accumulate, "across_epochs": across_epochs, "weigh": weigh, "scaler": scaler}
    if isinstance(optimizer, torch.optim.LBFGS):
        for option, default in {"accumulate": 1, "across_epochs": False, "weigh": "batches", "scaler": None}.items():
            if window[option] != default:
                raise ValueError(
                    f"optimize: {option} does not go with LBFGS, which evaluates the loss of one batch several times "
                    f"a step, got {option}={window[option]!r}. Leave it out, or make batches larger."
                )
        if between != ():
            raise ValueError("optimize: between does not go with LBFGS, whose gradients come and go within one part.")
        by_closure = update_by_closure(optimizer, max_value=max_value, max_norm=max_norm, norm_type=norm_type)
        return chain(by_closure, name=name)
    params = list(parameters_of(optimizers))
    clip: list[Middleware] = []
    if max_value is not None:
        clip.append(clip_grad_value(params, max_value))
    if max_norm is not None:
        clip.append(clip_grad_norm(params, max_norm, norm_type=norm_type))
    first = backward(optimizer, accumulate=accumulate, across_epochs=across_epochs, weigh=weigh, scaler=scaler)
    guards = between if isinstance(between, list | tuple) else (between,)
    return chain(first, *guards, *clip, *(update(one, scaler=scaler) for one in optimizers), name=name)
