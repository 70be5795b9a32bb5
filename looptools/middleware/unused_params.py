"""Report parameters that do not learn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
from torch.nn import Module

from ..gradients import optimizers_in, parameters_of
from ..intervals import Interval, interval
from ..state import State
from ..warn import warn

if TYPE_CHECKING:
    from ..run import Run


def _is_module(part: Any, field: Any, value: Any) -> None:
    if not isinstance(value, Module):
        raise TypeError(f"unused_params: model must be a torch.nn.Module, got {value!r}.")


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class unused_params:
    """Warn of parameters that require gradients, but that the loss did not reach or no optimizer holds.

    Stands between ``backward`` and ``update``. The loss did not reach what has no gradient after ``backward``; within
    an accumulation window, what none of its batches so far has reached. Each set of names is told once. Sets nothing,
    reads no device.

    Args:
        model: Whose parameters are looked at.
        every: How often; by default on the first training iteration of each pass.

    Example:
        >>> import warnings
        >>> model = torch.nn.ModuleDict({"used": torch.nn.Linear(1, 1), "idle": torch.nn.Linear(1, 1, bias=False)})
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> train = lt.train(model, [torch.ones(1, 1)], lambda model, batch: model["used"](batch).mean())
        >>> with warnings.catch_warnings(record=True, action="always") as told:
        ...     state = next(iter(train | lt.backward(sgd) | lt.unused_params(model) | lt.update(sgd)))
        >>> print(str(told[0].message).partition(". ")[0])
        unused_params: in iteration 0 of train the loss did not reach 1 parameter: idle.weight
    """

    model: Module = attrs.field(validator=_is_module, repr=lambda model: type(model).__name__)
    every: int | Interval | None = attrs.field(
        default=None, kw_only=True, converter=attrs.converters.optional(interval)
    )
    _opens: bool = attrs.field(default=True, init=False, repr=False)  # the pass's first iteration is still to come
    _told: set[tuple[str, ...]] = attrs.field(factory=set, init=False, repr=False)
    only_looks: ClassVar[bool] = True

    def on_pass(self, run: Run) -> None:
        """A new pass: look at its first iteration, whichever that will be."""
        self._opens = True

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        is_due: Any = self.every
        for state in states:
            opens, self._opens = self._opens or state.first, False  # `first`: in a pipe without a run
            if state.trains and (opens if is_due is None else is_due(state)):
                self._look(state)
            yield state

    def _look(self, state: State) -> None:
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        where = f"unused_params: in iteration {state.iteration} of {state.phase}"
        unreached = [name for name, parameter in named if parameter.grad is None]
        if unreached and len(unreached) == len(named):
            cure = "None of them has a gradient: is this part piped behind backward, and is the model the phase's?"
        else:
            cure = "Use them in the step, or freeze them: lt.freeze(...), or requires_grad_(False)."
        self._tell(unreached, f"{where} the loss did not reach {_listed(unreached)}. {cure}")
        known = [] if state.run is None else optimizers_in(state.run)
        held = set(map(id, parameters_of(known)))
        loose = [name for name, parameter in named if id(parameter) not in held] if known else []
        cure = "Give them to one: torch.optim.SGD(model.parameters(), ...), or freeze them."
        self._tell(loose, f"{where} no optimizer of the run holds {_listed(loose)}. {cure}")

    def _tell(self, names: list[str], message: str) -> None:
        key = (message.partition("the loss")[1], *names)
        if names and key not in self._told:
            self._told.add(key)
            warn(message)


def _listed(names: list[str], most: int = 8) -> str:
    """The names, or the first of them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} parameter{'s' * (len(names) != 1)}: {', '.join(names[:most])}{more}"
