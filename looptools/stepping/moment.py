"""Everything that an iteration changes, kept on its device, to be put back in place."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterable
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
from ..gradients import Gradients, optimizers_of, parameters_of
from ..means import Means
from ..middleware.forward import forward
from ..scaling import noted

PutBack = Callable[[], Any]  # puts a value back, and gives it

LIBRARY = __name__.partition(".")[0]
SCALARS = (int, float, bool, str, bytes, complex, type(None))
CONTAINERS = (list, dict, set, deque)
OURS = (Means, Gradients)  # what parts of ours keep their memory in


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
        puts += map(_loaded, self._found.schedulers.values())
        puts += [_loaded(thing) for thing in more if not isinstance(thing, Optimizer)]
        puts += [self._part(slot.part) for slot in cursor.slots]
        run, progress = cursor.run, cursor.progress
        puts += [value(held) for held in (progress.updates, run.results, run.best, cursor.at_boundary)]
        puts.append(_refilled(run.history, run.history.extend, list(run.history), None))  # rows stay as they are
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
        puts = [self._attributes(module) for module in own]

        def put_back() -> None:
            for module, training in flags:
                module.training = training
            for put in puts:
                put()

        return put_back

    def _attributes(self, module: Module) -> PutBack:
        """Numbers and tensors that a module of the user's keeps beside its buffers."""
        names = {n: v for n, v in vars(module).items() if type(v) in SCALARS or isinstance(v, Tensor)}
        puts = {name: self._copies.value(value) for name, value in names.items()}

        def put_back() -> None:
            for name, put in puts.items():
                object.__setattr__(module, name, put())

        return put_back

    def _optimizer(self, optimizer: Optimizer) -> PutBack:
        """In place: its load_state_dict casts to the weights' dtype, and makes new groups."""
        if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
            return _loaded(optimizer)
        groups = list(optimizer.param_groups)
        puts = [self._copies.value(optimizer.state), *map(self._copies.value, groups)]

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


class Copies:
    """Memory that tensors are copied into, in one go, and that is used again for the same ones."""

    def __init__(self) -> None:
        self.known: set[int] = set()  # modules that are seen to already
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # the tensor itself keeps its id taken
        self._now: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def bytes(self) -> int:
        return sum(copied.numel() * copied.element_size() for _, copied in self._now.values())

    def begin(self) -> Copies:
        """From here on, what is to be copied is named."""
        self._kept, self._now = self._now or self._kept, {}
        return self

    def of(self, tensor: Tensor) -> Tensor:
        """Have *tensor* copied with the others; returns itself."""
        if id(tensor) not in self._now:
            kept = self._kept.get(id(tensor))
            if kept is None or kept[0] is not tensor or not _alike(*kept):
                copied = torch.empty_like(tensor, requires_grad=False) if _is_simple(tensor) else tensor.detach()
                kept = tensor, copied
            self._now[id(tensor)] = kept
        return tensor

    def copy(self) -> None:
        """Copy all that was named."""
        simple = [pair for pair in self._now.values() if _is_simple(pair[0])]
        with torch.no_grad():
            if simple:
                torch._foreach_copy_([copied for _, copied in simple], [tensor.detach() for tensor, _ in simple])
            for tensor, _ in self._now.values():
                if not _is_simple(tensor):
                    self._now[id(tensor)] = (tensor, tensor.detach().clone())
        self._kept = {}

    def put_back(self) -> None:
        """Give all of them the values that were copied."""
        changed = [(tensor, copied) for tensor, copied in self._now.values() if _alike(tensor, copied)]
        for tensor, copied in changed:
            tensor.data.copy_(copied)

    def value(self, value: Any, depth: int = 3) -> PutBack:
        """Keep a value: returns what puts it back, the same containers with the same content, and gives it."""
        kind = type(value)
        if kind in SCALARS:
            return lambda: value
        if isinstance(value, Tensor):
            if not value.requires_grad or value.is_leaf:
                self.of(value)
            return lambda: value
        if isinstance(value, dict):
            items = {key: self.value(item, depth - 1) for key, item in value.items()} if depth else None
            return _refilled(value, value.update, dict(value), items)
        if kind is list or kind is deque:
            deep = depth and any(isinstance(item, (Tensor, *CONTAINERS)) for item in list(value)[:8])
            elements = [self.value(item, depth - 1) for item in value] if deep else None
            return _refilled(value, value.extend, list(value), elements)
        if kind is set:
            return _refilled(value, value.update, set(value), None)
        if kind is bytearray or (hasattr(value, "tobytes") and hasattr(value, "__setitem__")):
            copied = copy.copy(value)
            return lambda: _written(value, copied)
        if isinstance(value, Module) and id(value) not in self.known:  # such as a metric
            return self._held_by(value, [vars(module) for module in value.modules()], 2)
        if isinstance(value, OURS) or (depth and _is_own(value)):
            return self._held_by(value, [vars(value)], depth - 1)
        return lambda: value

    def _held_by(self, thing: Any, attributes: Iterable[dict[str, Any]], depth: int) -> PutBack:
        puts = [self.value(held, depth) for held in attributes]

        def put_back() -> Any:
            for put in puts:
                put()
            return thing

        return put_back


def _refilled(container: Any, fill: Callable[[Any], Any], plain: Any, puts: Any) -> PutBack:
    def put_back() -> Any:
        if puts is None:
            content = plain
        elif isinstance(puts, dict):
            content = {key: put() for key, put in puts.items()}
        else:
            content = [put() for put in puts]
        container.clear()
        fill(content)
        return container

    return put_back


def _written(array: Any, copied: Any) -> Any:
    array[:] = copied
    return array


def _is_own(value: Any) -> bool:
    """Whether it is a plain object of a class of the user's."""
    home = type(value).__module__.partition(".")[0]
    known = isinstance(value, Module | Optimizer | type) or callable(value)
    return hasattr(value, "__dict__") and not known and home not in (LIBRARY, "torch", "builtins", "numpy")


def _loaded(thing: Any) -> PutBack:
    """Keep what has a state of its own: returns what puts it back."""
    state = copy.deepcopy(thing.state_dict())

    def put_back() -> Any:
        thing.load_state_dict(copy.deepcopy(state))
        return thing

    return put_back


def _nothing() -> None:
    """For what remembers nothing."""


def _is_simple(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested or tensor.is_meta)


def _alike(tensor: Tensor, copied: Tensor) -> bool:
    return tensor.shape == copied.shape and tensor.dtype == copied.dtype and tensor.device == copied.device
