"""What the user's own parts and steps use from around them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import attrs

from ..middleware.forward import forward


def surroundings(name: str, part: Any) -> Iterator[tuple[str, str, Any]]:
    """What a part that is not looptools' own has within reach, or the step of a `forward`.

    Yields:
        The prefix of its recipe (``"D."``), the variable's name, and what it holds.
    """
    recipe = name.rpartition("/")[2].rpartition(".")[0]
    prefix = f"{recipe}." if recipe else ""
    for word, value in _reach(part.step if isinstance(part, forward) else part):
        yield prefix, word.lstrip("_"), value


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
        yield from ((word, thing.__globals__[word]) for word in thing.__code__.co_names if word in thing.__globals__)
    elif not attrs.has(type(thing)) and not isinstance(thing, type):
        yield from getattr(thing, "__dict__", {}).items()
