"""Try a whole run on a few batches, and put everything back."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from ..agenda import Agenda, Entry
from ..checkpoints.inventory import inventory
from ..checks import whole_number
from ..cursor import Cursor
from ..generators import get_generators, set_generators
from ..intervals import iterations, rounds
from ..phases import Phase
from ..pipeline import Chain, Middleware, name_of

if TYPE_CHECKING:
    from ..run import Run


def rehearse(run: Run, batches: int) -> dict[str, float]:
    """Run *batches* batches of every phase of the workflow, once; then put everything back as it was.

    Weights, buffers, gradients, optimizers, schedulers, modes and random generators come back; parts with a
    ``folder`` write into a temporary one. What a part of your own does outside these is not undone.

    Returns:
        The results of the rehearsal.

    Raises:
        RuntimeError: If a source can be walked through only once, or an iteration is open.
    """
    whole_number("rehearse: batches", batches)
    cursor = run.cursor
    if cursor.state is not None:
        raise RuntimeError("rehearse: an iteration is open. Finish it first: next(run).")
    phases = {}
    for phase in cursor.passes.agenda.phases:
        if hasattr(phase.source, "__next__"):
            raise RuntimeError(
                f"rehearse: the source of {phase.name} can be walked through only once; the rehearsal would use it up. "
                "Give a function that makes it anew (lambda: ...)."
            )
        phases[id(phase)] = phase.limit(batches)
    lengths = cursor.passes.lengths
    entries = [
        Entry(phases[id(e.phase)], 1, min(batches, e.batches or batches, lengths[id(e.phase)] or batches))
        for e in cursor.passes.agenda.entries
        if isinstance(e.phase, Phase)
    ]
    with tempfile.TemporaryDirectory() as folder:
        middlewares = tuple(_into(part, Path(folder)) for part in run._middlewares)
        for source in cursor.passes.sources.values():
            source.release()  # workers that a loader keeps would serve the rehearsal
        kept = _Kept(cursor)
        trial = type(run)(Agenda(tuple(entries), max_rounds=1), middlewares)
        try:
            return dict(trial.to_end())
        finally:
            try:
                trial.close()
            finally:
                kept.put_back()


def _into(middleware: Middleware, folder: Path) -> Middleware:
    """The same part, writing into another folder."""
    if isinstance(middleware, Chain):
        return attrs.evolve(middleware, parts=tuple(_into(part, folder) for part in middleware.parts))
    if attrs.has(type(middleware)) and getattr(middleware, "folder", None) is not None:
        often = {"log": iterations(1), "checkpoint": rounds(1)}.get(name_of(middleware))
        return attrs.evolve(middleware, folder=folder, **({"every": often} if often else {}))  # type: ignore[misc]
    return middleware


class _Kept:
    """Copies of everything that a training changes."""

    def __init__(self, cursor: Cursor) -> None:
        found = inventory(cursor)
        self.modules = list(found.modules.values())
        self.objects: list[Any] = [*found.optimizers.values(), *found.scalers.values(), *found.schedulers.values()]
        self.values = [[(t, _clone(t)) for t in (*m.parameters(), *m.buffers())] for m in self.modules]
        self.states = [copy.deepcopy(thing.state_dict()) for thing in self.objects]
        self.grads = [[_clone(p.grad) for p in module.parameters()] for module in self.modules]
        self.flags = [[(m, m.training) for m in module.modules()] for module in self.modules]
        self.own = [source.own_generators() for source in cursor.passes.sources.values()]
        self.sources = list(cursor.passes.sources.values())
        self.generators = get_generators()

    def put_back(self) -> None:
        for module, values, grads, flags in zip(self.modules, self.values, self.grads, self.flags, strict=True):
            for tensor, value in values:
                tensor.data.copy_(value)
            for parameter, grad in zip(module.parameters(), grads, strict=True):
                parameter.grad = grad
            for submodule, training in flags:
                submodule.training = training
        for thing, state in zip(self.objects, self.states, strict=True):
            thing.load_state_dict(state)
        for source, own in zip(self.sources, self.own, strict=True):
            source.set_own_generators(own)
        set_generators(self.generators)


def _clone(tensor: Any) -> Any:
    return None if tensor is None else tensor.detach().clone()
