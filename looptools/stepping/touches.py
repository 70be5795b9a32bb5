"""See whether somebody has changed a run's weights, options or open iteration by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs
from torch import Tensor
from torch.optim import Optimizer

from ..checkpoints.inventory import inventory
from ..cursor import Cursor
from ..generators import get_generators, same_states
from ..state import State


@attrs.frozen(eq=False)
class Looked:
    """What can be seen of a change in place: the numbers of times that tensors were written to, and who is where.

    Args:
        weights: How often weights were changed.
        buffers: The same of buffers.
        options: Of all param groups.
        held: Gradients, and what the open iteration's state has.
        versions: How often their tensors were changed.
        generators: The process's random generators.
    """

    weights: int
    buffers: int
    options: list[Any]
    held: list[Any]
    versions: int
    generators: dict[str, Any] | None

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Looked)
            and (self.weights, self.buffers, self.versions) == (other.weights, other.buffers, other.versions)
            and self.options == other.options
            and len(self.held) == len(other.held)
            and all(mine is its for mine, its in zip(self.held, other.held, strict=True))
            and same_states(self.generators, other.generators)
        )


class Touches:
    """Looks at all that of a run. Changes through ``tensor.data`` are not seen.

    Args:
        cursor: The run's machine.
    """

    def __init__(self, cursor: Cursor) -> None:
        self.cursor = cursor
        self._parts: list[Any] = []  # that the following are of
        self._weights: list[Tensor] = []
        self._buffers: list[Tensor] = []
        self._modules: list[Any] = []
        self._optimizers: list[Optimizer] = []

    def look(self, state: State | None = None) -> Looked:
        """How it stands; within an iteration, with its *state*, more closely."""
        parts = [slot.part for slot in self.cursor.slots]
        if list(map(id, parts)) != list(map(id, self._parts)):
            found = inventory(self.cursor)
            self._weights = [p for module in found.modules.values() for p in module.parameters()]
            self._buffers = [b for module in found.modules.values() for b in module.buffers()]
            self._modules = [m for module in found.modules.values() for m in module.modules()]
            self._parts, self._optimizers = parts, list(found.optimizers.values())
        options = [
            value
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for value in group.values()
            if type(value) in (int, float, bool, tuple)
        ]
        options += [p.requires_grad for p in self._weights] + [module.training for module in self._modules]
        options += [dict(self.cursor.run.results), len(self.cursor.run.history)]
        steps = [
            value
            for optimizer in self._optimizers
            for held in (*optimizer.state.values(), *optimizer.param_groups)
            for value in held.values()
            if isinstance(value, Tensor)
        ]
        options += [len(steps), _changes(steps)]
        held: list[Any] = []
        if state is not None:
            held = [parameter.grad for parameter in self._weights]
            held += [state.outputs, state.loss, state.lr, state.grad_norm, state.updates, *_inner(state.batch)]
            held += [*state.metrics, *state.metrics.values(), *state.gauges.values()]
        inner = [value for value in held if isinstance(value, Tensor)]
        generators = None if state is None else get_generators()
        return Looked(_changes(self._weights), _changes(self._buffers), options, held, _changes(inner), generators)


def _inner(batch: Any, depth: int = 8) -> Iterator[Any]:
    """A batch, and what is in its containers and objects."""
    yield batch
    if isinstance(batch, Mapping):
        items: Any = batch.values()
    elif isinstance(batch, list | tuple):
        items = batch
    else:
        items = () if isinstance(batch, Tensor) else getattr(batch, "__dict__", {}).values()
    for item in items if depth else ():
        yield from _inner(item, depth - 1)


def _changes(tensors: list[Tensor]) -> int:
    """A number that grows when one of them is changed in place."""
    return sum(0 if tensor.is_inference() else tensor._version for tensor in tensors)
