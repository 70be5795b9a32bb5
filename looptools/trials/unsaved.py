"""What a run's objects remember that no checkpoint holds: where to look when a resumed run goes another way."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from ..cursor import Cursor
from ..generators import generators_within, get_generator
from ..pipeline import Chain
from ..state import State
from .digests import Leaves, digest

if TYPE_CHECKING:
    from ..run import Run

MOST_OBJECTS, MOST_ITEMS, MOST_ELEMENTS = 2000, 256, 1 << 20
_OF_TORCH = {*vars(Module()), *vars(DataLoader(TensorDataset(torch.zeros(1))))}
_VALUES = (int, float, complex, str, bytes, Tensor)
_SKIPPED = (type, types.ModuleType, torch.nn.Parameter, Optimizer, State, Cursor)
_LIBRARIES = {"torch", "builtins", "numpy", "torchvision", "typing", "collections", "functools"}
_LIBRARIES |= {__name__.partition(".")[0]}


def unsaved(run: Run) -> Leaves:
    """Plain values that hang on models, steps, sources and parts of *run*: attributes, those of classes, globals.

    By where they are. What `generators_within` finds of the sources is saved, and left out, as are weights and buffers.
    """
    cursor = run.cursor
    roots: dict[str, Any] = {}
    for phase in cursor.passes.agenda.phases:
        name = cursor.passes.names[id(phase)]
        roots |= {f"{name}: model": phase.model, f"{name}: source": phase.source, f"{name}: step": phase.step.step}
    roots |= {slot.name: slot.part for slot in cursor.slots if not _of_library(type(slot.part))}
    saved = {id(g) for source in cursor.passes.sources.values() for g in generators_within(source.given).values()}
    found: Leaves = {}
    waiting, seen = list(roots.items()), {id(root) for root in roots.values()} | saved | {id(run)}
    for path, value in waiting:  # it grows meanwhile
        for name, inner in _held_by(value):
            where = f"{path}.{name}"
            if isinstance(inner, _VALUES) or inner is None:
                if not isinstance(inner, Tensor) or inner.numel() < MOST_ELEMENTS:
                    found[where] = digest(inner)
            elif id(inner) not in seen and not isinstance(inner, _SKIPPED) and len(seen) < MOST_OBJECTS:
                seen.add(id(inner))
                waiting.append((where, inner))
                if (generator := generators_within(inner).get("")) is not None:
                    found[where] = digest(get_generator(generator))
    return found


def _of_library(thing: Any) -> bool:
    """Whether a class or function is not the user's own."""
    return str(thing.__module__).partition(".")[0] in _LIBRARIES


def _held_by(value: Any) -> Iterator[tuple[str, Any]]:
    """What *value* holds, by name."""
    if isinstance(value, Mapping) or type(value) in (list, tuple, set):
        items = list(value.items()) if isinstance(value, Mapping) else list(enumerate(value))
        yield "length", len(items)
        yield from [(str(key), item) for key, item in items[:MOST_ITEMS]]
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value)
    elif isinstance(value, types.MethodType):
        yield from (("self", value.__self__), ("function", value.__func__))
    elif not isinstance(value, Chain):
        if isinstance(value, Module):
            yield from value.named_children()
        inner = [(name, item) for name, item in vars(value).items()] if hasattr(value, "__dict__") else []
        yield from [(name, item) for name, item in inner if name not in _OF_TORCH or name in ("dataset", "collate_fn")]
        yield from _slots(value)
        yield from _of_classes(type(value))


def _slots(value: Any) -> Iterator[tuple[str, Any]]:
    for kind in type(value).__mro__:
        names = kind.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if not name.startswith("__") and hasattr(value, name):
                yield name, getattr(value, name)


def _of_classes(kind: type) -> Iterator[tuple[str, Any]]:
    """Attributes of the user's own classes, and the methods, which may use globals."""
    for one in kind.__mro__:
        if not _of_library(one):
            for name, value in vars(one).items():
                if not name.startswith("__") or name in ("__call__", "__getitem__", "__iter__"):
                    yield f"{name} (of the class {one.__name__})", value


def _of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function of the user's own holds on to, and the globals that it uses."""
    if _of_library(function):
        return
    yield from vars(function).items()
    yield "defaults", function.__defaults__
    known = inspect.getclosurevars(function)
    yield from known.nonlocals.items()
    for name, value in known.globals.items():
        yield f"{name} (a global)", value
