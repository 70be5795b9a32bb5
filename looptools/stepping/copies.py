"""Memory that values are copied into, to be put back in place."""

from __future__ import annotations

import copy
import functools
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from ..gradients import Gradients
from ..means import Means

PutBack = Callable[[], Any]  # puts a value back, and gives it

LIBRARY = __name__.partition(".")[0]
SCALARS = (int, float, bool, str, bytes, complex, type(None))
CONTAINERS = (list, dict, set, deque)
OURS = (Means, Gradients)  # what parts of ours keep their memory in


PLAIN = frozenset(vars(Module()))  # what each module has


def attributes_of(module: Module, copies: Copies) -> PutBack:
    """What a module of the user's keeps beside its buffers; what is new since is gone when it is put back."""
    kept = {n: v for n, v in vars(module).items() if n not in PLAIN and isinstance(v, (*SCALARS, Tensor, *CONTAINERS))}
    puts = {name: copies.value(value) for name, value in kept.items()}

    def put_back() -> None:
        for name, put in puts.items():
            object.__setattr__(module, name, put())

    return put_back


def own_of(optimizer: Optimizer, copies: Copies) -> PutBack:
    """What an optimizer keeps in attributes of its own, and the state of another one that it has within."""
    puts: dict[str, PutBack] = {}
    for name, value in vars(optimizer).items():
        if name in ("state", "param_groups", "defaults") or (name.startswith("_") and name != "_step_count"):
            continue
        if isinstance(value, Optimizer):
            inner = [copies.value(value.state), *map(copies.value, value.param_groups), own_of(value, copies)]
            puts[name] = functools.partial(_all, value, inner)
        elif isinstance(value, (*SCALARS, Tensor, *CONTAINERS)):
            puts[name] = copies.value(value)

    def put_back() -> None:
        for name, put in puts.items():
            object.__setattr__(optimizer, name, put())

    return put_back


def _all(thing: Any, puts: Iterable[PutBack]) -> Any:
    for put in puts:
        put()
    return thing


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
            where = once(tensor)
            with torch.inference_mode(tensor.is_inference()):
                tensor.data[where].copy_(copied[where])

    def value(self, value: Any, depth: int = 8) -> PutBack:
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
            return refilled(value, value.update, dict(value), items)
        if kind is list or kind is deque:
            deep = depth and any(isinstance(item, (Tensor, *CONTAINERS)) or _is_own(item) for item in list(value)[:8])
            elements = [self.value(item, depth - 1) for item in value] if deep else None
            return refilled(value, value.extend, list(value), elements)
        if kind is tuple and depth and any(isinstance(item, (Tensor, *CONTAINERS)) or _is_own(item) for item in value):
            return functools.partial(_all, value, [self.value(item, depth - 1) for item in value])
        if kind is set:
            return refilled(value, value.update, set(value), None)
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


def refilled(container: Any, fill: Callable[[Any], Any], plain: Any, puts: Any) -> PutBack:
    """Keep a container: returns what clears it and fills it again, with *plain*, or with what *puts* give."""

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


def loaded(thing: Any) -> PutBack:
    """Keep what has a state of its own: returns what puts it back."""
    state = copy.deepcopy(thing.state_dict())

    def put_back() -> Any:
        thing.load_state_dict(copy.deepcopy(state))
        return thing

    return put_back


def _is_simple(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested or tensor.is_meta)


def once(tensor: Tensor) -> Any:
    """Where each number of an expanded tensor stands once: it cannot be written to as a whole."""
    if not _is_simple(tensor) or 0 not in tensor.stride():
        return ...
    return tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())


def _alike(tensor: Tensor, copied: Tensor) -> bool:
    return tensor.shape == copied.shape and tensor.dtype == copied.dtype and tensor.device == copied.device
