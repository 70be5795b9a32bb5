"""A second pipe like that of a run, which shares no weights, optimizers or generators with it."""

from __future__ import annotations

import copy
import functools
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ...agenda import Entry
from ...checkpoints.around import generators_around
from ...checkpoints.inventory import inventory
from ...cursor import Cursor
from ...data.seeded import is_seeded
from ...generators import generators_within
from ...links import Slot
from ...middleware.forward import forward
from ...middleware.freeze import _ours
from ...middleware.log import log
from ...modes import _displaced, _exceptions
from ...phases import Phase
from ...pipeline import Chain, Middleware, fresh, name_of
from ..mended import Mended
from .entangled import Root
from .outlets import folders_of, in_folder, silenced, writes

if TYPE_CHECKING:
    from ...run import Run

MOST_ITEMS = 256  # of a container: a longer one is data
ATOMS = (str, bytes, int, float, complex, type(None), type, torch.dtype, torch.device)


class Twins:
    """Copies a pipe: everything once, so that what two parts share is shared by their copies too.

    Functions are shared, and data sets, unless they hold a random generator or a state.

    Args:
        run: The run whose pipe it is, as it stands.
        new: A run that has not been built; parts that hold *run* get it.
        folder: Where the copy's parts write to; None mutes those that do.
    """

    def __init__(self, run: Run, new: Run, folder: Path | None) -> None:
        self.cursor: Cursor = run.cursor
        self.new = new
        self.folder = folder
        self.folders = folders_of(run.cursor)
        self.shared: list[Any] = []  # data
        self.roots: list[Root] = []  # all that was copied
        self._memo: dict[int, Any] = {id(run): new, id(run.progress): new.progress, id(run.results): new.results}
        self._memo |= {id(state): None for state in (self.cursor.handed, self.cursor.unseen) if state is not None}

    def make(self) -> None:
        """Give the new run the copies."""
        passes, found = self.cursor.passes, inventory(self.cursor)
        phases = passes.agenda.phases
        _require_no_hooks(found.modules)
        for phase in phases:
            self._share_data(phase.source)
        for generator in generators_around(self.cursor).values():
            self._generator(generator)
        for name, module in found.modules.items():
            self.roots.append((name, self.copied(module, name)))
        for name, optimizer in found.optimizers.items():
            self._optimizer(optimizer, name)
        for things in (found.scalers, found.schedulers):
            for name, thing in things.items():
                self.roots.append((name, self.copied(thing, name)))
        copies = {id(phase): self._phase(phase, passes.names[id(phase)]) for phase in phases}
        entries = tuple(self._entry(entry, copies) for entry in passes.agenda.entries)
        self.new._agenda = attrs.evolve(passes.agenda, entries=entries)
        self.new._middlewares = tuple(map(self._part, self.cursor.run_slots))
        self._copy_modes()

    def copied(self, thing: Any, what: str) -> Any:
        """The copy of *thing*, made when it is first asked for.

        Raises:
            RuntimeError: If it cannot be copied, naming it.
        """
        try:
            return copy.deepcopy(thing, self._memo)
        except Exception as error:
            raise RuntimeError(
                f"fork: {what} could not be copied ({type(error).__name__}: {error}). Keep out of it what belongs to "
                "one run only (open files, locks, tensors with a graph), or give its class a __deepcopy__."
            ) from error

    def copy_of(self, thing: Any) -> Any:
        """The copy of *thing*, if one was made; else None."""
        return self._memo.get(id(thing))

    # The pieces

    def _phase(self, phase: Phase, name: str) -> Phase:
        slots = self.cursor.lines[id(phase)]
        model = self.copied(phase.model, f"the model of {name}")
        source = self._source(phase.source, f"the source of {name}")
        self.roots += [(f"the model of {name}", model), (f"the source of {name}", source)]
        parts = [self._copy_of(slot) for slot in slots]
        piped = tuple(map(_piped, slots, parts))
        if isinstance(slots[0].part, forward) and not isinstance(phase, Mended):
            return attrs.evolve(phase, model=model, source=source, step=parts[0], middlewares=piped[1:])
        facts = {field.name: getattr(phase, field.name) for field in attrs.fields(Phase)}
        step = fresh(self.copied(phase.step, f"the step of {name}"))
        return Mended(**facts | {"model": model, "source": source, "step": step, "middlewares": piped})

    def _entry(self, entry: Entry, phases: dict[int, Phase]) -> Entry:
        if isinstance(entry.phase, Phase):
            return attrs.evolve(entry, phase=phases[id(entry.phase)])
        name = f"the workflow's {name_of(entry.phase)}"
        function = self.copied(entry.phase, name)
        self.roots.append((name, function))
        return attrs.evolve(entry, phase=function)

    def _part(self, slot: Slot) -> Middleware:
        return _piped(slot, self._copy_of(slot))

    def _copy_of(self, slot: Slot) -> Any:
        part = fresh(slot.part)
        if writes(part):
            part = silenced(part) if self.folder is None else in_folder(part, self.folder, self.folders)
        if not isinstance(part, log):  # it holds nothing of the run, but maybe the user's list of lines
            part = fresh(self.copied(part, slot.name))
        self.roots.append((slot.name, part))
        return part

    def _optimizer(self, optimizer: Optimizer, name: str) -> None:
        """Copy all its attributes: torch's own way of copying leaves out those of subclasses, and its hooks."""
        kind = type(optimizer)
        if hasattr(kind, "__deepcopy__"):
            self.copied(optimizer, name)
            return
        new = self._memo[id(optimizer)] = kind.__new__(kind)
        for key, value in vars(optimizer).items():
            if key != "step":
                vars(new)[key] = self.copied(value, f"{key!r} of {name}")
        self.roots.append((name, dict(vars(new))))
        step = vars(optimizer).get("step")
        if hasattr(step, "_wrapped_by_lr_sched"):
            vars(new)["step"] = _counted(new)
        elif step is not None:
            vars(new)["step"] = self.copied(step, f"the step of {name}")
            self.roots.append((f"the step of {name}", vars(new)["step"]))

    def _generator(self, generator: Any) -> None:
        """Copy it by its state: older versions of torch cannot do otherwise."""
        if isinstance(generator, torch.Generator) and id(generator) not in self._memo:
            new = torch.Generator(generator.device)
            new.set_state(generator.get_state())
            self._memo[id(generator)] = new

    # Data

    def _source(self, source: Any, what: str) -> Any:
        if hasattr(source, "__next__"):
            raise RuntimeError(
                f"fork: {what} can be walked through only once, so runs would take batches from each other. Give a "
                "function that makes it anew (lambda: ...), or a list."
            )
        return source if isinstance(source, list | tuple | range | Tensor) else self.copied(source, what)

    def _share_data(self, source: Any) -> None:
        """See that copies of a loader have its data set, but generators and workers of their own."""
        if isinstance(source, list | tuple | range | Tensor):
            return
        for generator in generators_within(source).values():
            self._generator(generator)
        if isinstance(source, DataLoader):
            iterator, context = source._iterator, source.multiprocessing_context
            if iterator is not None:
                self._memo[id(iterator)] = None
            if context is not None:
                self._memo[id(context)] = context
            data = source.dataset
            keeps = isinstance(data, IterableDataset) or hasattr(data, "state_dict") or generators_within(data)
            if is_seeded(source) or not keeps:
                self._share(data)
                return
        self._share_within(source)

    def _share_within(self, thing: Any) -> None:
        """Of a source that has a state of its own, share what is plain data."""
        waiting, seen = [thing], {id(thing)}
        for value in waiting:
            items = list(value.values()) if isinstance(value, dict) else value
            if isinstance(value, Module) or isinstance(items, str):
                continue
            if not isinstance(items, list | tuple):
                items = list(getattr(value, "__dict__", {}).values())
            for inner in items:
                if isinstance(inner, ATOMS) or id(inner) in seen or id(inner) in self._memo:
                    continue
                seen.add(id(inner))
                if _is_data(inner):
                    self._share(inner)
                else:
                    waiting.append(inner)

    def _share(self, data: Any) -> None:
        self._memo[id(data)] = data
        self.shared.append(data)

    # What hangs on the objects, but is kept elsewhere

    def _copy_modes(self) -> None:
        """Which submodules stand the other way once the model is back in its other mode; what `freeze` holds; grads."""
        for name, module in inventory(self.cursor).modules.items():
            new = self.copied(module, name)
            for old, its in zip(module.modules(), new.modules(), strict=True):
                if old in _exceptions:
                    notes = _exceptions[old]
                    _exceptions[its] = {mode: [self.copied(m, name) for m in ms] for mode, ms in notes.items()}
                flag, by = _displaced.get(old, (False, None))
                if by is not None and (outer := by()) is not None and id(outer) in self._memo:
                    _displaced[its] = flag, weakref.ref(self._memo[id(outer)])
                if module.training and old in _ours:
                    its.training = True
            for parameter, its_own in zip(module.parameters(), new.parameters(), strict=True):
                if parameter in _ours:  # a freeze of the copy will take them
                    its_own.requires_grad_(True)
                if parameter.grad is not None:  # torch leaves it out
                    its_own.grad = parameter.grad.detach().clone()


def _piped(slot: Slot, part: Any) -> Middleware:
    """The part as it is piped, under the name of its recipe."""
    return Chain((part,), slot.name.rpartition("/")[2].rpartition(".")[0])


def _counted(optimizer: Optimizer) -> Any:
    """The optimizer's step as torch's schedulers have it: they warn if it does not say that it was called."""
    step, me = type(optimizer).step, weakref.ref(optimizer)

    @functools.wraps(step)
    def counted(*given: Any, **options: Any) -> Any:
        alive: Any = me()
        alive._opt_called = True
        return step(alive, *given, **options)

    counted._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return counted


def _is_data(value: Any) -> bool:
    """Whether it is shared: tensors, arrays, data sets without a state, long lists."""
    if isinstance(value, Tensor) or (hasattr(value, "tobytes") and hasattr(value, "shape")):
        return True
    if isinstance(value, list | tuple | dict | set):
        return len(value) > MOST_ITEMS
    if isinstance(value, Dataset) and not isinstance(value, IterableDataset):
        return not hasattr(value, "state_dict") and not generators_within(value)
    return False


def _require_no_hooks(modules: dict[str, Module]) -> None:
    """Refuse hooks on parameters, which no copy of a model has."""
    for word, module in modules.items():
        for name, parameter in module.named_parameters():
            if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                raise RuntimeError(
                    f"fork: {word}.{name} has a hook (register_hook), which a copy would not have. Make it a part "
                    "behind backward, or remove the hook, fork, and register it for each fork's own parameter."
                )
