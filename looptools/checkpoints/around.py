"""What the user's own parts and steps use from around them."""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
from torch.nn import Module
from torch.optim import Optimizer

from ..cursor import Cursor
from ..generators import generators_within
from ..middleware.forward import forward

LIBRARY = __name__.partition(".")[0]
KNOWN = (Optimizer, Module, Path, str, int, float, bool, type(None))


def surroundings(name: str, part: Any) -> Iterator[tuple[str, str, Any]]:
    """What a part that is not looptools' own has within reach, or the step of a `forward`.

    Yields:
        The prefix of its recipe (``"D."``), the variable's name, and what it holds.
    """
    recipe = name.rpartition("/")[2].rpartition(".")[0]
    prefix = f"{recipe}." if recipe else ""
    for word, value in _reach(part.step if isinstance(part, forward) else part):
        yield prefix, word.lstrip("_"), value


def generators_around(cursor: Cursor) -> dict[str, Any]:
    """Random generators that hang on models, steps and parts, each once, by where they are; sources keep theirs."""
    within = (generators_within(source.given) for source in cursor.passes.sources.values())
    seen = {id(generator) for found in within for generator in found.values()}
    names = cursor.passes.names
    roots = [(f"{names[id(phase)]}/model", phase.model) for phase in cursor.passes.agenda.phases]
    for slot in cursor.slots:
        if attrs.has(type(slot.part)) and not isinstance(slot.part, forward):
            ours = type(slot.part).__module__.partition(".")[0] == LIBRARY  # whose memory holds the run itself
            fields = [field.name for field in attrs.fields(type(slot.part)) if field.init or not ours]
            roots += [(f"{slot.name}/{name}", getattr(slot.part, name, None)) for name in fields]
        roots += [(f"{slot.name}/{word}", value) for _, word, value in surroundings(slot.name, slot.part)]
    found: dict[str, Any] = {}
    for path, root in roots:
        if isinstance(root, KNOWN) and not path.endswith("/model"):
            continue  # it has none, or is looked into as a model
        for where, generator in generators_within({path: root}).items():  # wrapped: modules among globals are leaves
            if id(generator) not in seen:
                seen.add(id(generator))
                found[where] = generator
    return found


def _reach(thing: Any) -> Iterator[tuple[str, Any]]:
    """Attributes of an object of a plain class; the arguments, closure and globals of a function."""
    while isinstance(thing, functools.partial):
        yield from thing.keywords.items()
        yield from (("argument", value) for value in thing.args)
        thing = thing.func
    if inspect.ismethod(thing):
        yield from getattr(thing.__self__, "__dict__", {}).items()
        thing = thing.__func__
    if inspect.isfunction(thing):
        for word, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
            try:
                yield word, cell.cell_contents
            except ValueError:  # not filled yet
                continue
        space = thing.__globals__
        yield from ((word, space[word]) for word in globals_in(thing.__code__) if word in space)
    elif not attrs.has(type(thing)) and not isinstance(thing, type):
        yield from getattr(thing, "__dict__", {}).items()


@functools.lru_cache(512)
def globals_in(code: types.CodeType) -> tuple[str, ...]:
    """Names of the globals that some code reads, and the functions in it; attributes of the same name do not count."""
    reads = [str(one.argval) for one in dis.get_instructions(code) if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    inner = [word for part in code.co_consts if isinstance(part, types.CodeType) for word in globals_in(part)]
    return tuple(dict.fromkeys([*reads, *inner]))
