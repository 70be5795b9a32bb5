"""Keep everything that a training changes, to try something and put it back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

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
    new workers; those that they keep come back, with the gradients' own tensors.
    """
    everything = _Kept(cursor, also)
    try:
        yield
    finally:
        everything.put_back()


def require_repeatable(verb: str, phases: Iterable[Phase]) -> None:
    """Refuse a source that trying something out would use up.

    Raises:
        RuntimeError: If a source can be walked through only once.
    """
    for phase in phases:
        if hasattr(phase.source, "__next__"):
            raise RuntimeError(
                f"{verb}: the source of {phase.name} can be walked through only once; {verb} would use it up. "
                "Give a function that makes it anew (lambda: ...)."
            )


class _Kept:
    """Copies of all that."""

    def __init__(self, cursor: Cursor, also: Iterable[Any]) -> None:
        found = inventory(cursor)
        modules = {id(m): m for module in found.modules.values() for m in module.modules()}.values()
        parameters = {id(p): p for m in modules for p in m.parameters(recurse=False)}.values()
        self.flags = [(module, module.training) for module in modules]
        self.buffers = [(m, name, b, b.detach().clone()) for m in modules for name, b in m.named_buffers(recurse=False)]
        self.weights = [(p, p.detach().clone(), p.grad, p.requires_grad) for p in parameters]
        objects = [*found.optimizers.values(), *found.scalers.values(), *found.schedulers.values(), *also]
        self.objects: list[Any] = list({id(thing): thing for thing in objects}.values())
        self.states = [copy.deepcopy(thing.state_dict()) for thing in self.objects]
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
        for parameter, value, grad, requires_grad in self.weights:
            parameter.data.copy_(value)
            parameter.grad = grad
            parameter.requires_grad_(requires_grad)
        for module, training in self.flags:
            module.training = training
        for thing, state in zip(self.objects, self.states, strict=True):
            thing.load_state_dict(state)
        for source, own in self.sources:
            source.set_own_generators(own)
        for loader, iterator in self.workers:
            loader._iterator = iterator
        set_generators(self.generators)
