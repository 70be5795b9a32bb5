"""Keep everything that a training changes, to try something and put it back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import Parameter, is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ..checkpoints.inventory import inventory
from ..cursor import Cursor
from ..generators import get_generators, set_generators
from ..phases import Phase


@contextmanager
def kept(cursor: Cursor, *also: Any) -> Iterator[None]:
    """Put back, when the ``with`` is left, whatever training on *cursor*'s phases changes.

    Weights, buffers, gradients, optimizers, scalers, torch's schedulers, modes, ``requires_grad``, the process's random
    generators and those of the loaders, and what *also* has a state. Meanwhile there are no gradients, and loaders make
    new workers; those that they keep come back, with the gradients' own tensors, the optimizers' and their groups.
    """
    everything = _Kept(cursor, also)
    try:
        yield
    finally:
        everything.put_back()


def require_repeatable(verb: str, phases: Iterable[Phase]) -> None:
    """Refuse what could not be put back.

    Raises:
        RuntimeError: If a source can be walked through only once, or a model's weights are not made yet.
    """
    for phase in phases:
        if hasattr(phase.source, "__next__"):
            raise RuntimeError(
                f"{verb}: the source of {phase.name} can be walked through only once; {verb} would use it up. "
                "Give a function that makes it anew (lambda: ...)."
            )
        if isinstance(phase.model, Module) and any(map(is_lazy, phase.model.parameters())):
            raise RuntimeError(
                f"{verb}: weights of {phase.name}'s model have no shape yet (LazyLinear and the like), so they could "
                "not be put back. Let it see a batch first: model(batch)."
            )


class _Kept:
    """Copies of all that."""

    def __init__(self, cursor: Cursor, also: Iterable[Any]) -> None:
        found = inventory(cursor)
        modules = {id(m): m for module in found.modules.values() for m in module.modules()}.values()
        parameters = {id(p): p for m in modules for p in m.parameters(recurse=False)}.values()
        self.flags = [(module, module.training) for module in modules]
        self.buffers = [(m, name, b, b.detach().clone()) for m in modules for name, b in m.named_buffers(recurse=False)]
        self.empty = [(m, name) for m in modules for name, buffer in m._buffers.items() if buffer is None]
        self.weights = [(p, p.detach().clone(), p.grad, p.requires_grad) for p in parameters]
        objects = [*found.optimizers.values(), *found.scalers.values(), *found.schedulers.values(), *also]
        self.objects = [_kept(thing) for thing in {id(thing): thing for thing in objects}.values()]
        self.sources = [(source, source.own_generators()) for source in cursor.passes.sources.values()]
        self.generators = get_generators()
        loaders = {id(s.given): s.given for s in cursor.passes.sources.values() if isinstance(s.given, DataLoader)}
        self.workers = [(loader, loader._iterator) for loader in loaders.values() if loader._iterator is not None]
        for loader, _ in self.workers:
            loader._iterator = None  # a loader with persistent workers would begin the pass that is under way anew
        for parameter, *_ in self.weights:
            parameter.grad = None  # the tensor itself is kept, so that nobody adds to it

    def put_back(self) -> None:
        for module, name, buffer, value in self.buffers:
            buffer.data.copy_(value)
            if getattr(module, name, None) is not buffer:  # some layers assign a new tensor
                setattr(module, name, buffer)
        for module, name in self.empty:
            setattr(module, name, None)
        for parameter, value, grad, requires_grad in self.weights:
            parameter.data.copy_(value)
            parameter.grad = grad
            parameter.requires_grad_(requires_grad)
        for module, training in self.flags:
            module.training = training
        for put_back in self.objects:
            put_back()
        for source, own in self.sources:
            source.set_own_generators(own)
        for loader, iterator in self.workers:
            loader._iterator = iterator
        set_generators(self.generators)


PutBack = Callable[[], Any]


def _kept(thing: Any) -> PutBack:
    """Keep the state of an optimizer, a scaler, a scheduler: returns what puts it back."""
    kind = type(thing)
    if isinstance(thing, Optimizer) and kind.load_state_dict is Optimizer.load_state_dict:
        return _optimizer(thing)
    state = copy.deepcopy(thing.state_dict())
    return lambda: thing.load_state_dict(state)


def _optimizer(optimizer: Optimizer) -> PutBack:
    """Keep an optimizer's state in place: its load_state_dict casts to the weights' dtype, and makes new groups."""
    groups = list(optimizer.param_groups)
    puts = [_value(optimizer.state), *map(_value, groups)]

    def put_back() -> None:
        optimizer.param_groups[:] = groups
        for put in puts:
            put()

    return put_back


def _value(value: Any) -> PutBack:
    """Keep a value: returns what puts it back, the same tensors, dictionaries and lists, and gives it."""
    if isinstance(value, Parameter):
        return lambda: value  # it is among the weights
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, dict):
        items = {key: _value(item) for key, item in value.items()}
        return lambda: _filled(value, value.update, {key: put() for key, put in items.items()})
    if isinstance(value, list):
        elements = list(map(_value, value))
        return lambda: _filled(value, value.extend, [put() for put in elements])
    copied = copy.deepcopy(value)
    return lambda: copied


def _tensor(tensor: Tensor) -> PutBack:
    copied = tensor.detach().clone()

    def put_back() -> Tensor:
        tensor.data.copy_(copied)
        return tensor

    return put_back


def _filled(container: Any, fill: Callable[[Any], Any], content: Any) -> Any:
    container.clear()
    fill(content)
    return container
