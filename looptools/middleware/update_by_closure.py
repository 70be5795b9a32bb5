"""Move the weights with an optimizer that evaluates the loss several times a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..checks import is_optimizer, positive
from ..state import State
from .backward import refuse
from .update import HAS_MOVED, count_update

_CURE = "to leave gradients as they are, leave it out"


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class update_by_closure:
    """Step an optimizer with a closure that computes the loss anew: ``backward`` and ``update`` in one part.

    By default, as torch's own LBFGS wants it: the closure zeroes the gradients, calls backward and returns the loss.
    Its first call takes the loss that ``forward`` has computed, each further one computes it again on the same batch,
    with fresh dropout. With *gradients_first*, as SAM is commonly written: the gradients of ``forward``'s loss are
    there when step is called, and every call of the closure computes the loss again. Gradients are clipped after each
    backward.

    Every iteration updates: sets ``state.updates``, ``state.lr`` unless a schedule did, and ``state.grad_norm`` if it
    clips by norm, that of the first evaluation. ``state.loss`` and metrics stay those of ``forward``. LBFGS reads the
    device several times an iteration to decide where it goes; this part adds nothing to that. If a step fails half way,
    the weights (and LBFGS's memory) are put back, for which they are copied each iteration.

    Args:
        optimizer: Its ``step(closure)`` is called.
        max_value: Upper bound of a gradient's element; it comes before *max_norm*.
        max_norm: Upper bound of the gradients' joint norm.
        norm_type: Order of that norm; ``inf`` for the largest element.
        gradients_first: Whether step wants gradients to be there already.

    Raises:
        TypeError: If the step gave no loss.
        RuntimeError: If the loss has no graph, or there is no ``forward`` to compute it again.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> lbfgs = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
        >>> fit = lambda model, batch: (model(batch) - 2 * batch - 1).pow(2).mean()
        >>> run = iter(lt.train(model, [torch.tensor([[0.0], [1.0]])], fit) | update_by_closure(lbfgs))
        >>> state = next(run)
        >>> [round(float(p.detach()), 3) for p in model.parameters()], state.updates
        ([2.0, 1.0], True)
    """

    optimizer: Optimizer = attrs.field(validator=is_optimizer, repr=lambda optimizer: type(optimizer).__name__)
    max_value: float | None = attrs.field(
        default=None, kw_only=True, validator=attrs.validators.optional(positive(_CURE))
    )
    max_norm: float | None = attrs.field(
        default=None, kw_only=True, validator=attrs.validators.optional(positive(_CURE))
    )
    norm_type: float = attrs.field(default=2.0, kw_only=True, validator=positive("for the largest element, give inf"))
    gradients_first: bool = attrs.field(default=False, kw_only=True, validator=attrs.validators.instance_of(bool))
    redo_from: ClassVar[str] = "forward"  # after a failure here the graph may be gone

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        for state in states:
            if state.loss is None or not state.loss.requires_grad:
                refuse("update_by_closure", state)
            if state.forwarded is None:
                raise RuntimeError(
                    f"update_by_closure: the state of iteration {state.iteration} of {state.phase} came through no "
                    "forward, which could compute its loss again. Make the phase with lt.train(model, source, step)."
                )
            if state.lr is None:
                state.lr = self.optimizer.param_groups[0]["lr"]
            if self.max_norm is not None:
                state.grad_norm = None
            loss: Tensor | None = state.loss
            if self.gradients_first and loss is not None:
                self._differentiate(state, loss)
                loss = None
            state.updates, state.committed = True, HAS_MOVED
            before = _Before(self.optimizer)
            try:
                self.optimizer.step(_closure(self, state, loss))
            except BaseException:
                before.put_back()
                raise
            count_update(state, self.optimizer)
            yield state

    def _differentiate(self, state: State, loss: Tensor) -> None:
        """Fill the gradients, and clip them."""
        self.optimizer.zero_grad()
        loss.backward()
        if self.max_norm is None and self.max_value is None:
            return
        params = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if self.max_value is not None:
            torch.nn.utils.clip_grad_value_(params, self.max_value)
        if self.max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(params, self.max_norm, self.norm_type)
            state.grad_norm = norm if state.grad_norm is None else state.grad_norm

    def updates_in(self, passes: Sequence[int]) -> int:
        """One an iteration."""
        return sum(passes)

    def leaves(self, state: State) -> str:
        """What a failure in the middle of this part can leave behind."""
        if state.committed != HAS_MOVED:
            return ""
        left = [state.forwarded.leaves(state)] if hasattr(state.forwarded, "leaves") else []
        if not isinstance(self.optimizer, torch.optim.LBFGS):
            left.append("the optimizer's own memory may have moved, and would move again")
        return "; ".join(filter(None, left))


def _closure(part: update_by_closure, state: State, ready: Tensor | None) -> Any:
    """The function that the optimizer calls; *ready* is a loss that it takes the first time."""

    def closure() -> Tensor:
        nonlocal ready
        loss, ready = state.forwarded.recompute(state) if ready is None else ready, None
        part._differentiate(state, loss)
        return loss

    return closure


class _Before:
    """What a step that fails half way would leave moved: the weights, and LBFGS's memory of where it has been."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.weights = [parameter.detach().clone() for parameter in self.params]
        self.memory = {
            parameter: {key: _copy(value) for key, value in values.items()}
            for parameter, values in optimizer.state.items()
            if isinstance(optimizer, torch.optim.LBFGS)  # others have much more, and are not known to need it
        }

    def put_back(self) -> None:
        for parameter, weight in zip(self.params, self.weights, strict=True):
            parameter.data.copy_(weight)
        if isinstance(self.optimizer, torch.optim.LBFGS):
            self.optimizer.state.clear()
            self.optimizer.state.update(self.memory)


def _copy(value: Any) -> Any:
    """LBFGS changes its tensors in place, but not those in its lists."""
    return value.clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value
