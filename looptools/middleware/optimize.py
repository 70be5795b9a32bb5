"""The usual way to train: backward, clip, update."""

from __future__ import annotations

from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ..checks import require_optimizer
from ..pipeline import Chain, Middleware, chain
from .backward import backward
from .clip_grad_norm import clip_grad_norm
from .update import update


def optimize(
    optimizer: Optimizer,
    *,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    accumulate: int = 1,
    scaler: GradScaler | None = None,
    name: str = "",
) -> Chain:
    """Make the recipe ``backward | clip_grad_norm | update``.

    Args:
        optimizer: Moves the weights; its parameters are the ones zeroed and clipped.
        max_norm: Upper bound of the gradients' joint norm; None leaves clipping out.
        norm_type: Order of that norm; ``inf`` for the largest element.
        accumulate: Iterations whose gradients make one update; the last window of a pass may be shorter.
        scaler: ``torch.amp.GradScaler`` for fp16.
        name: What the part names begin with where a pipe optimizes twice: ``"D"`` makes ``D.backward``.

    Raises:
        TypeError: If *optimizer* is not one.
        ValueError: If *max_norm* is not positive, or *accumulate* less than 1.

    Example:
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(()))], lr=0.1)
        >>> [type(part).__name__ for part in optimize(sgd, max_norm=1.0).parts]
        ['backward', 'clip_grad_norm', 'update']
    """
    require_optimizer("optimize: optimizer", optimizer)
    clip: list[Middleware] = []
    if max_norm is not None:
        params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        clip = [clip_grad_norm(params, max_norm, norm_type=norm_type)]
    first = backward(optimizer, accumulate=accumulate, scaler=scaler)
    return chain(first, *clip, update(optimizer, scaler=scaler), name=name)
