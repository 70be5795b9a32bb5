"""Keep everything that a training changes, to try something and put it back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn import Module
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader

from ..checkpoints.inventory import inventory
from ..cursor import Cursor
from ..phases import Phase
from .moment import Moment


@contextmanager
def kept(cursor: Cursor, *also: Any) -> Iterator[None]:
    """Put back, when the ``with`` is left, whatever training on *cursor*'s phases changes.

    All that a `Moment` keeps, the gradients' own tensors, the loaders' random generators, and what *also* has a state.
    Meanwhile there are no gradients, and loaders make new workers; those that they keep come back.
    """
    moment, sources = Moment(cursor, also), cursor.passes.sources.values()
    moment.note()
    modules = {id(m): m for module in inventory(cursor).modules.values() for m in module.modules()}.values()
    parameters = {id(p): p for m in modules for p in m.parameters(recurse=False)}.values()
    gradients = [(parameter, parameter.grad) for parameter in parameters]
    own = [(source, source.own_generators()) for source in sources]
    loaders = {id(s.given): s.given for s in sources if isinstance(s.given, DataLoader)}.values()
    workers = [(loader, loader._iterator) for loader in loaders if loader._iterator is not None]
    for loader, _ in workers:
        loader._iterator = None  # a loader with persistent workers would begin the pass that is under way anew
    for parameter, _ in gradients:
        parameter.grad = None  # the tensor itself is kept, so that nobody adds to it
    try:
        yield
    finally:
        for source, states in own:
            source.set_own_generators(states)
        moment.put_back()
        for parameter, grad in gradients:
            parameter.grad = grad
        for loader, iterator in workers:
            loader._iterator = iterator


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
