"""Everything that an iteration changes, kept on its device, to be put back in place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import Parameter, is_lazy
from torch.optim import Optimizer

from ..checkpoints.around import generators_around
from ..checkpoints.inventory import Inventory, inventory
from ..cursor import Cursor
from ..generators import get_generator, get_generators, set_generator, set_generators
from ..gradients import optimizers_of, parameters_of
from ..middleware.forward import forward
from ..scaling import noted
from .copies import Copies, PutBack, attributes_of, loaded, own_of, refilled

LIBRARY = __name__.partition(".")[0]


class Moment:
    """A copy of what training changes, noted again and again into the same memory.

    Weights, buffers, modes, ``requires_grad``, optimizers, scalers, schedulers, what parts, steps and models remember,
    the process's random generators and those that hang on models and parts. Not where the run stands in its data.

    Of gradients those that are part of the training's state are kept: of open accumulation windows, and those that no
    ``backward`` fills. The others are gone when it is put back.

    Args:
        cursor: The run's machine.
        also: Optimizers and other things with a ``state_dict`` that the run does not hold.
    """

    def __init__(self, cursor: Cursor, also: Iterable[Any] = ()) -> None:
        self.cursor = cursor
        self.also = list(also)
        self._copies = Copies()
        self._puts: list[PutBack] = []
        self._pipe: list[Any] = []
        self._found: Inventory
        self._modules: list[Module]
        self._files = True
        self._around: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Memory of the copies."""
        return self._copies.bytes

    def note(self) -> None:
        """Copy everything as it is now; what was noted before is gone."""
        cursor, self._puts = self.cursor, []
        self._look()
        value = self._copies.begin().value
        puts = [self._weights(), self._buffers(), self._flags()]
        known = {id(one) for one in self._found.optimizers.values()}
        more = [thing for thing in self.also if id(thing) not in known]
        optimizers = [*self._found.optimizers.values(), *(thing for thing in more if isinstance(thing, Optimizer))]
        puts += map(self._optimizer, optimizers)
        puts += [value(vars(scaler)) for scaler in self._found.scalers.values()]  # its state_dict reads the device
        puts += [noted(scaler) for scaler in self._found.scalers.values()]
        puts += map(loaded, self._found.schedulers.values())
        puts += [loaded(thing) for thing in more if not isinstance(thing, Optimizer)]
        puts += [self._part(slot.part) for slot in cursor.slots]
        run, progress = cursor.run, cursor.progress
        puts += [value(held) for held in (progress.updates, run.results, run.best, cursor.at_boundary)]
        puts.append(refilled(run.history, run.history.extend, list(run.history), None))  # rows stay as they are
        stopping, states = cursor.stopping, {path: get_generator(g) for path, g in self._around.items()}
        generators = get_generators()

        def last() -> None:
            cursor.stopping = stopping
            for path, state in states.items():
                set_generator(self._around[path], state)
            set_generators(generators)

        self._copies.copy()
        self._puts = [*puts, last]

    def put_back(self, *, files: bool = True) -> None:
        """Have everything be as it was noted; that can be done several times.

        Args:
            files: Whether parts that write files are to go on where these stood.
        """
        self._files = files
        with torch.no_grad():
            self._copies.put_back()
            for put_back in self._puts:
                put_back()

    def _look(self) -> None:
        """Find what there is, again if the pipe has changed."""
        pipe = [part for slot in self.cursor.slots for part in (slot.part, getattr(slot.part, "step", None))]
        if len(pipe) == len(self._pipe) and all(map(lambda one, other: one is other, pipe, self._pipe)):
            return
        self._found = inventory(self.cursor)
        modules = (module for root in self._found.modules.values() for module in root.modules())
        self._modules = list({id(module): module for module in modules}.values())
        self._around = generators_around(self.cursor)
        self._copies.known = set(map(id, self._modules))
        self._pipe = pipe  # from here on it is known

    # Each of these notes one kind of thing

    def _weights(self) -> PutBack:
        mine = {id(p): (m, name, p) for m in self._modules for name, p in m._parameters.items() if p is not None}
        held = [found for found in mine.values() if not is_lazy(found[2])]
        for *_, parameter in held:
            self._copies.of(parameter)
        asked = [(parameter, parameter.requires_grad) for *_, parameter in held]
        grads = self._gradients([parameter for *_, parameter in held])

        def put_back() -> None:
            for module, name, parameter in held:
                module._parameters[name] = parameter
            for parameter, requires_grad in asked:
                parameter.requires_grad_(requires_grad)
            for parameter, grad in grads:
                parameter.grad = grad

        return put_back

    def _gradients(self, parameters: Iterable[Parameter]) -> list[tuple[Parameter, Tensor | None]]:
        """The gradients that count, which are copied, and None for the others."""
        still: set[int] = set()
        fillers = [slot.part for slot in self.cursor.slots if hasattr(slot.part, "updates_in")]
        for part in sorted(fillers, key=lambda part: bool(getattr(part, "filled", 0))):
            own = set(map(id, parameters_of(optimizers_of(part))))
            still = still - own if getattr(part, "filled", 0) else still | own
        found = []
        for parameter in parameters:
            grad = None if id(parameter) in still else parameter.grad
            found.append((parameter, None if grad is None else self._copies.of(grad)))
        return found

    def _buffers(self) -> PutBack:
        held = [(m, name, b) for m in self._modules for name, b in m._buffers.items()]
        for *_, buffer in held:
            if buffer is not None:
                self._copies.of(buffer)

        def put_back() -> None:
            for module, name, buffer in held:
                module._buffers[name] = buffer  # some layers assign a new tensor

        return put_back

    def _flags(self) -> PutBack:
        flags = [(module, module.training) for module in self._modules]
        own = [m for m in self._modules if type(m).__module__.partition(".")[0] != "torch"]
        puts = [attributes_of(module, self._copies) for module in own]

        def put_back() -> None:
            for module, training in flags:
                module.training = training
            for put in puts:
                put()

        return put_back

    def _optimizer(self, optimizer: Optimizer) -> PutBack:
        """In place: its load_state_dict casts to the weights' dtype, and makes new groups."""
        if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
            return loaded(optimizer)
        groups = list(optimizer.param_groups)
        puts = [self._copies.value(optimizer.state), *map(self._copies.value, groups), own_of(optimizer, self._copies)]

        def put_back() -> None:
            optimizer.param_groups[:] = groups
            for put in puts:
                put()

        return put_back

    def _forward(self, part: forward) -> PutBack:
        """What its step remembers; it is not to think of the open state that it comes a second time."""
        step, seen = getattr(part.step, "__self__", part.step), part._seen
        put = self._part(step) if step is not None and not isinstance(step, Module) else _nothing

        def put_back() -> None:
            put()
            part._seen = seen  # the generators are put back already

        return put_back

    def _part(self, part: Any) -> PutBack:
        """What a part, or the step that a `forward` calls, remembers."""
        if isinstance(part, forward):
            return self._forward(part)
        if inspect.isroutine(part) or isinstance(part, functools.partial | type):
            return _nothing
        if attrs.has(type(part)):
            ours = type(part).__module__.partition(".")[0] == LIBRARY
            names = [field.name for field in attrs.fields(type(part)) if not (ours and field.init)]
        else:
            names = list(getattr(part, "__dict__", ()))
        puts = {name: self._copies.value(getattr(part, name, None)) for name in names}
        marks = getattr(part, "marks", None) if hasattr(part, "rewind") else None

        def put_back() -> None:
            if self._files and marks is not None and part.marks is not marks:
                part.rewind(marks)
            for name, put in puts.items():
                object.__setattr__(part, name, put())

        return put_back


def _nothing() -> None:
    """For what remembers nothing."""
