"""Iterators that complain when nobody iterates over them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Lazily(Generic[T]):
    """An iterator that warns if it is dropped without ever having been asked, as Python does for coroutines.

    ``iter`` gives the stream itself, so that a ``for`` over it costs nothing more.

    Args:
        stream: What it stands for; nothing of it has happened yet.
        verb: What was typed, as in ``run.take(3)``.
        loop: How it would be iterated over.

    Example:
        >>> three = Lazily(iter([1, 2, 3]), "run.take(3)", "for state in run.take(3)")
        >>> three
        <run.take(3): nothing has happened yet. Write `for state in run.take(3)` or list(run.take(3)).>
        >>> list(three)
        [1, 2, 3]
    """

    __slots__ = ("_asked", "_loop", "_stream", "_verb")

    def __init__(self, stream: Iterator[T], verb: str, loop: str) -> None:
        self._stream, self._verb, self._loop, self._asked = stream, verb, loop, False

    def __iter__(self) -> Iterator[T]:
        self._asked = True
        return self._stream

    def __next__(self) -> T:
        self._asked = True
        return next(self._stream)

    def close(self) -> None:
        """Leave it, as a generator is left."""
        self._asked = True
        if hasattr(self._stream, "close"):
            self._stream.close()

    def __repr__(self) -> str:
        if self._asked:
            return f"<{self._verb}>"
        return f"<{self._verb}: nothing has happened yet. Write `{self._loop}` or list({self._verb}).>"

    def __del__(self, warn: Any = warnings.warn) -> None:  # at exit the module's own names may be gone
        if not self._asked:
            text = f"{self._verb} was never iterated, so nothing has happened."
            warn(f"{text} Write `{self._loop}` or list({self._verb}).", RuntimeWarning, stacklevel=2)
