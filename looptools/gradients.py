"""The gradients of one optimizer's parameters, or of those of several that go down one loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from .checks import require_optimizer
from .state import State

if TYPE_CHECKING:
    from .run import Run

OPEN, CLOSED, MOVED, SKIPPED = "open", "closed", "moved", "skipped"  # what `state.windows` says of an optimizer


def optimizers_of(part: Any) -> tuple[Optimizer, ...]:
    """The optimizers that a part has among its options as ``optimizer``, one or several.

    Example:
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(()))], lr=0.1)
        >>> optimizers_of(lt.backward(sgd)) == (sgd,), optimizers_of(print)
        (True, ())
    """
    held = getattr(part, "optimizer", None)
    return tuple(one for one in (held if isinstance(held, tuple) else (held,)) if isinstance(one, Optimizer))


def optimizers_in(run: Run) -> list[Optimizer]:
    """All that a run knows, none or several."""
    found = run.optimizer
    return list(found.values()) if isinstance(found, dict) else [] if found is None else [found]


def one_or_several(given: Any) -> Any:
    """Read an option ``optimizer``: one as it is, several as a tuple."""
    if not isinstance(given, list | tuple):
        return given
    return given[0] if len(given) == 1 else tuple(given)


def require_optimizers(part: str, given: Any) -> tuple[Optimizer, ...]:
    """Refuse what is neither an optimizer nor several that can share a loss; return them.

    Raises:
        TypeError: If something is not an optimizer, or LBFGS is one of several.
        ValueError: If there is none, or one parameter would be moved twice.
    """
    if not isinstance(given, tuple):
        require_optimizer(f"{part}: optimizer", given)
        return (given,)
    if not given:
        raise ValueError(
            f"{part}: the list of optimizers is empty. Give one, or several that go down one loss: [muon, adamw]."
        )
    for number, optimizer in enumerate(given):
        require_optimizer(f"{part}: optimizer[{number}]", optimizer)
        if isinstance(optimizer, LBFGS):
            raise TypeError(
                f"{part}: LBFGS evaluates the loss several times a step, so it cannot share one backward with others. "
                "Give each its own: lt.optimize(lbfgs) | lt.forward(step) | lt.optimize(adamw)."
            )
    for (i, first), (j, second) in itertools.combinations(enumerate(given), 2):
        _require_apart(part, f"optimizer[{i}]", first, f"optimizer[{j}]", second)
    return given


def _require_apart(part: str, name: str, first: Optimizer, other: str, second: Optimizer) -> None:
    if first is second:
        raise ValueError(f"{part}: {name} and {other} are the same {type(first).__name__}. Give it once.")
    mine = set(map(id, parameters_of([first])))
    shared = [tuple(parameter.shape) for parameter in parameters_of([second]) if id(parameter) in mine]
    if shared:
        kinds = f"{name} ({type(first).__name__}) and {other} ({type(second).__name__})"
        count = "a parameter" if len(shared) == 1 else f"{len(shared)} parameters, the first"
        raise ValueError(
            f"{part}: {kinds} share {count} of shape {shared[0]}, which both would move. Give each parameter to one."
        )


def parameters_of(optimizers: Iterable[Optimizer]) -> Iterator[Tensor]:
    """Their parameters, one optimizer after the other."""
    return (parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"])


def tensors(part: str, params: Any) -> list[Tensor]:
    """Read an option ``params``: tensors, or one of them, as torch's own functions take them."""
    found = [params] if isinstance(params, Tensor) or not hasattr(params, "__iter__") else list(params)
    if not found or not all(isinstance(parameter, Tensor) for parameter in found):
        raise TypeError(f"{part}: params must be tensors, as in model.parameters(), got {params!r:.60}.")
    return found


# Whose turn it is, where a pipe has several optimizers


def fill_windows(state: State, optimizers: Iterable[Optimizer], closes: bool) -> None:
    """Their windows have the gradients of this iteration now; where they close, updates may come."""
    windows = state.windows
    if not state.updates or CLOSED not in windows.values():  # nobody waits for a turn that may come
        for optimizer, window in list(windows.items()):
            if window != OPEN:
                del windows[optimizer]
    windows.update(dict.fromkeys(optimizers, CLOSED if closes else OPEN))
    state.updates = CLOSED in windows.values()


def are_due(state: State, params: Iterable[Tensor]) -> bool:
    """Whether gradients of *params* are to be used in this iteration."""
    if not state.updates or OPEN not in state.windows.values():
        return state.updates
    mine = set(map(id, params))
    held = [w for one, w in state.windows.items() if not mine.isdisjoint(map(id, parameters_of([one])))]
    return not held or any(window != OPEN for window in held)


class Gradients:
    """The gradients of the parameters of *optimizers*; they can be laid aside while others need the parameters.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(()))
        >>> weight.grad = torch.tensor(2.0)
        >>> gradients = Gradients((torch.optim.SGD([weight], lr=0.1),))
        >>> gradients.lay_aside()
        >>> weight.grad = torch.tensor(7.0)
        >>> gradients.put_back()
        >>> weight.grad
        tensor(2.)
    """

    def __init__(self, optimizers: tuple[Optimizer, ...]) -> None:
        self.optimizers = optimizers
        self.aside: list[Tensor | None] | None = None

    def present(self) -> list[Tensor]:
        """Those that are there."""
        return [parameter.grad for parameter in parameters_of(self.optimizers) if parameter.grad is not None]

    def all(self) -> list[Tensor | None]:
        """One for each parameter, laid aside or not."""
        return self.aside if self.aside is not None else [p.grad for p in parameters_of(self.optimizers)]

    def lay_aside(self) -> None:
        """Hold on to them, and take them off the parameters: other losses may go through these, too."""
        if self.aside is None:
            self.aside = self.all()
            for parameter in parameters_of(self.optimizers):
                parameter.grad = None

    def put_back(self) -> None:
        """Give the parameters what was laid aside."""
        for parameter, gradient in zip(parameters_of(self.optimizers), self.aside or (), strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        self.aside = None

    def take_over(self, old: Gradients) -> None:
        """Hold what *old* has laid aside for the same parameters, whatever their order."""
        if old.aside is not None:
            held = dict(zip(map(id, parameters_of(old.optimizers)), old.aside, strict=True))
            self.aside = [held.get(id(parameter)) for parameter in parameters_of(self.optimizers)]
