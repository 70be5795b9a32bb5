"""How middlewares make a pipe. Read this first.

A middleware is any callable that takes an iterable of states and returns an iterator of them:

    def shout(states):
        for state in states:
            print(state.loss)
            yield state

`pipe` nests middlewares over any iterable of states. `chain` makes one middleware out of several.
A run does the same with the help of a `cursor`, which keeps the parts beside each other instead of
nesting them, so that an exception in one leaves the others alive.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import attrs

from .checks import made_middleware_by
from .state import State

Middleware = Callable[[Iterable[State]], Iterator[State]]
M = TypeVar("M")


def pipe(states: Iterable[State], *middlewares: Middleware) -> Iterator[State]:
    """Nest *middlewares* over *states*, the first one innermost.

    Args:
        states: Any iterable of states; a phase, a run, a list.
        middlewares: Callables stream -> stream, in the order in which they run.

    Returns:
        An iterator of states. Each ``next`` takes one state through all middlewares.

    Raises:
        TypeError: If a middleware is not callable, or does not return an iterator.

    Example:
        >>> def double(states):
        ...     for state in states:
        ...         state.metrics["loss"] *= 2
        ...         yield state
        >>> [state.metrics["loss"] for state in pipe([State(phase="train", metrics={"loss": 3})], double, double)]
        [12]
    """
    stream = iter(states)
    for number, middleware in enumerate(middlewares, 1):
        stream = start(middleware, stream, f"pipe: middleware {number} ({name_of(middleware)})")
    return stream


@attrs.frozen(eq=False)
class Chain:
    """A middleware made of others; a phase or run takes it apart again."""

    parts: tuple[Middleware, ...]
    name: str = ""

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        return pipe(states, *self.parts)


def chain(*middlewares: Middleware, name: str = "") -> Chain:
    """Make one middleware of several, in the order in which they run.

    Args:
        middlewares: Callables stream -> stream.
        name: What the names of its parts begin with: ``"D"`` makes ``D.backward`` of ``backward``.

    Raises:
        TypeError: If one of them is not a middleware.

    Example:
        >>> def count(states):
        ...     for number, state in enumerate(states):
        ...         state.metrics["number"] = number
        ...         yield state
        >>> counted = chain(count)
        >>> [state.metrics for state in counted([State(phase="val"), State(phase="val")])]
        [{'number': 0}, {'number': 1}]
    """
    for middleware in middlewares:
        check(middleware, "chain")
    return Chain(middlewares, name)


def flatten(middlewares: Iterable[Middleware], prefix: str = "") -> Iterator[tuple[str, Middleware]]:
    """Take chains apart: yields each part with its name, not yet numbered."""
    for middleware in middlewares:
        if isinstance(middleware, Chain):
            yield from flatten(middleware.parts, prefix + (f"{middleware.name}." if middleware.name else ""))
        else:
            yield prefix + name_of(middleware), middleware


def numbered(names: Iterable[str]) -> list[str]:
    """Make names unique: the second ``log`` becomes ``log#2``."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return result


def name_of(thing: Any) -> str:
    """The name a reader knows *thing* by: that of its function or class."""
    if isinstance(thing, Chain):
        return thing.name or "chain"
    while isinstance(thing, functools.partial):
        thing = thing.func
    name: str = getattr(thing, "__name__", "") or type(thing).__name__
    return name.strip("<>")


def check(middleware: Any, where: str) -> None:
    """Refuse what can't be a middleware where it is typed.

    Raises:
        TypeError: If *middleware* is not callable, or is a class whose options were forgotten.
    """
    if isinstance(middleware, type):
        raise TypeError(
            f"{where}: {middleware.__name__} is a class. Give it its options first: {middleware.__name__}(...)."
        )
    if not callable(middleware):
        kind, cure = type(middleware).__name__, made_middleware_by(middleware)
        raise TypeError(f"{where}: a middleware is a callable that takes a stream of states, got a {kind}.{cure}")
    if inspect.isfunction(middleware) and f"{middleware.__module__}.".startswith(f"{__package__}.middleware."):
        name = middleware.__name__
        raise TypeError(f"{where}: {name} takes options. Call it first: {name}(...).")


def start(middleware: Middleware, states: Iterable[State], where: str) -> Iterator[State]:
    """Call *middleware* on *states*, and see that it gives an iterator.

    Raises:
        TypeError: If it does not.
    """
    check(middleware, where)
    advice = f"If it takes options, call it first: {name_of(middleware)}(...)."
    try:
        stream: Any = middleware(states)
    except (TypeError, AttributeError) as error:
        error.add_note(
            f"{where} could not be called on a stream of states. {advice} A middleware loops over states and yields "
            "each: `for state in states: ...; yield state`."
        )
        raise
    if stream is None:
        raise TypeError(f"{where} returned None, not an iterator of states. Does it `yield state`?")
    if not hasattr(stream, "__next__"):
        raise TypeError(f"{where} returned a {type(stream).__name__}, not an iterator of states. {advice}")
    return stream  # type: ignore[no-any-return]


def fresh(part: M) -> M:
    """A part with the same options and no memory; of a plain class a shallow copy; a function is itself."""
    if attrs.has(type(part)):
        return attrs.evolve(part)  # type: ignore[misc]
    return part if inspect.isroutine(part) or isinstance(part, functools.partial) else copy.copy(part)
