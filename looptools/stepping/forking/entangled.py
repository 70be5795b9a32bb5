"""What a copied pipe still shares with the run that it was copied from: functions are not copied, nor what they use."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import attrs
from torch import Tensor
from torch.nn import Module
from torch.utils.data import DataLoader, Dataset

from ...checkpoints.around import generators_around, globals_in
from ...checkpoints.inventory import inventory
from ...cursor import Cursor
from ...data.loaders import keeps_workers
from ...generators import generators_within

MOST = 100_000  # objects that are looked at
MOST_ITEMS = 4096  # of one container
LEAVES = (str, bytes, int, float, complex, type(None), type, types.ModuleType, types.BuiltinFunctionType)
FOREIGN = {*sys.stdlib_module_names, "torch", "torchvision", "numpy", __name__.partition(".")[0]} - {"__main__"}
CURES = {
    "model": "Use the model that it is given: step(model, batch), state.model in a part",
    "optimizer": "Take it from the state: state.run.optimizer",
    "run": "Take it from the state: state.run",
    "generator": "Keep the generator in the model, the loader or a part",
    "loader": "Give the DataLoader itself as the source",
}
INSTEAD = "or bind it as an argument, which is copied: functools.partial(function, name=value)"

Root = tuple[str, Any]


@attrs.frozen(eq=False)
class Owned:
    """Something that belongs to one run alone.

    Args:
        thing: What.
        name: What it is, in words.
        kind: Which of `CURES` fits.
    """

    thing: Any
    name: str
    kind: str


@attrs.frozen(eq=False)
class Found:
    """What is looked at, and how it was come to.

    Args:
        value: What.
        root: The part, step or source that leads to it.
        function: The function that uses it; empty if none does.
        word: What it is called there.
    """

    value: Any
    root: str
    function: str = ""
    word: str = ""


def owned_by(cursor: Cursor) -> dict[int, Owned]:
    """Models with all that is in them, optimizers, generators and so on of a run, by ``id``."""
    found, own = inventory(cursor), list[Owned]()
    for word, module in found.modules.items():
        inner = [*module.named_modules(), *module.named_parameters(), *module.named_buffers()]
        own += [
            Owned(thing, f"this run's {word}.{path}" if path else f"this run's {word}", "model")
            for path, thing in inner
        ]
    models = (phase.model for phase in cursor.passes.agenda.phases)
    own += [Owned(model, "this run's model", "model") for model in models if hasattr(model, "__dict__")]
    for things in (found.optimizers, found.scalers, found.schedulers):
        own += [Owned(thing, f"this run's {name}", "optimizer") for name, thing in things.items()]
    generators = dict(generators_around(cursor))
    for key, source in cursor.passes.sources.items():
        name = cursor.passes.names[key]
        within = generators_within(source.given).items()
        generators |= {f"{name}'s {place.rpartition('.')[2] or 'generator'}": one for place, one in within}
    own += [Owned(thing, f"this run's random generator ({path})", "generator") for path, thing in generators.items()]
    own += [Owned(cursor.run, "this run", "run"), Owned(cursor, "this run's cursor", "run")]
    return {id(owned.thing): owned for owned in own if not _is_function(owned.thing)}


def require_apart(own: dict[int, Owned], roots: Iterable[Root], skip: Iterable[Any]) -> None:
    """Refuse what leads from a copied pipe to something of the run that it was copied from.

    Args:
        own: What the run owns.
        roots: The parts, steps, sources, models of the copy, with their names.
        skip: What is not looked into: shared data.

    Raises:
        RuntimeError: Naming the function and its variable.
    """
    seen = {id(thing) for thing in skip}
    kept = []  # so that no id is used twice: bound methods are made as they are looked at
    waiting = deque(Found(thing, name) for name, thing in roots)
    while waiting and len(seen) < MOST:
        found = waiting.popleft()
        value = found.value
        if isinstance(value, LEAVES) or id(value) in seen:
            continue
        owned = own.get(id(value))
        if owned is None and isinstance(value, DataLoader) and found.function and keeps_workers(value):
            owned = Owned(value, "a loader that keeps its workers", "loader")
        if owned is not None:
            raise RuntimeError(_said(found, owned))
        seen.add(id(value))
        kept.append(value)
        if not isinstance(value, Tensor | Dataset):
            waiting.extend(_inside(found))


def _said(found: Found, owned: Owned) -> str:
    uses = f"{found.function} uses {found.word!r}" if found.function else f"it holds {found.word or 'it'!r}"
    return (
        f"fork: {found.root}: {uses}, which is {owned.name}; functions are shared, so a fork would use it too. "
        f"{CURES[owned.kind]}, {INSTEAD}."
    )


def _inside(found: Found) -> Iterator[Found]:
    """What a value holds."""
    value = found.value
    if isinstance(value, types.FunctionType):
        name = value.__name__.strip("<>")
        for word, inner in used_by(value):
            yield Found(inner, found.root, name, word)
        return
    for word, inner in _held(value):
        yield Found(inner, found.root, found.function, found.word if found.function else word)


def used_by(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Variables of a closure, defaults, and globals that a function uses; those of libraries are not looked at."""
    code = function.__code__
    for word, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield word, cell.cell_contents
        except ValueError:  # not filled yet
            continue
    positional = code.co_varnames[: code.co_argcount]
    defaults = function.__defaults__ or ()
    yield from zip(positional[len(positional) - len(defaults) :], defaults, strict=True)
    yield from (function.__kwdefaults__ or {}).items()
    yield from vars(function).items()
    space = function.__globals__
    if str(space.get("__name__", "")).partition(".")[0] not in FOREIGN:
        yield from ((word, space[word]) for word in globals_in(code) if word in space)


def _held(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, types.MethodType):
        return ("self", value.__self__), ("function", value.__func__)
    if isinstance(value, functools.partial):
        return ("function", value.func), *(("argument", one) for one in value.args), *value.keywords.items()
    if isinstance(value, weakref.ref):
        return (("a weak reference", value()),)
    if isinstance(value, dict):
        return [(str(key), inner) for key, inner in list(dict.items(value))[:MOST_ITEMS]]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return [(str(number), inner) for number, inner in zip(range(MOST_ITEMS), value)]  # noqa: B905 (cut)
    held = list(getattr(value, "__dict__", {}).items())
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else slots
        held += [(n, getattr(value, n)) for n in names if not n.startswith("__") and hasattr(value, n)]
    called = "forward" if isinstance(value, Module) else "__call__"
    function = getattr(type(value), called, None)
    if isinstance(function, types.FunctionType):
        held.append((called, function))
    return held


def _is_function(thing: Any) -> bool:
    return isinstance(thing, types.FunctionType | types.BuiltinFunctionType | types.MethodType)
