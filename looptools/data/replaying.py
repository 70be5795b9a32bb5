"""Get to a place in a stream of batches: by number, or through all that come before, which is said if it takes time."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any

from .loaders import END, FewerError

QUIET, EVERY = 0.5, 5.0  # seconds that nothing is said for, and between two lines


def is_sequence(source: Any) -> bool:
    """Whether its elements can be had by their number."""
    kind = type(source)
    if kind in (list, tuple, range):
        return True
    own = getattr(kind, "__iter__", None)  # which may do more than go through the numbers
    return hasattr(kind, "__getitem__") and (own is None or own is Sequence.__iter__)


def elements(sequence: Any, start: int) -> Iterator[Any]:
    """Those from number *start* on, as ``iter`` gives them.

    Example:
        >>> list(elements([5, 6, 7], 1))
        [6, 7]
    """
    iterator: Any = iter(_ByNumber(sequence) if start and isinstance(sequence, Sequence) else sequence)
    if start:
        iterator.__setstate__(start)
    return iterator  # type: ignore[no-any-return]


class _ByNumber:
    """A sequence without its own way to iterate: Python's can begin anywhere."""

    def __init__(self, sequence: Any) -> None:
        self.sequence = sequence

    def __getitem__(self, number: int) -> Any:
        return self.sequence[number]


def walk_again(name: str, iterator: Iterator[Any], batches: int, look: Callable[[], object] = lambda: None) -> None:
    """Take *batches* out of *iterator* and throw them away; *look* is called behind the first.

    What takes more than half a second shows a bar on stderr, or where tqdm is not installed a line every few seconds.
    A batch that failed and was skipped fails again, which is passed over.

    Raises:
        FewerError: If there are fewer.
    """
    told = _Told(name, batches)
    try:
        for done in range(batches):
            try:
                if next(iterator, END) is END:
                    raise FewerError
            except (FewerError, KeyboardInterrupt, SystemExit):
                raise
            except Exception:
                if isinstance(iterator, types.GeneratorType):  # it has ended
                    raise
            if not done:
                look()
            told.tell(done + 1)
    finally:
        told.close()


class _Told:
    def __init__(self, name: str, batches: int) -> None:
        self.text = f"{name}: walking through its batches again, up to where it stood"
        self.batches = batches
        self.due = perf_counter() + QUIET
        self.bar: Any = None

    def tell(self, done: int) -> None:
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
        elif perf_counter() >= self.due and done < self.batches:
            if importlib.util.find_spec("tqdm") is not None:
                from tqdm import tqdm

                self.bar = tqdm(desc=self.text, total=self.batches, initial=done, unit="batch", file=sys.stderr)
            else:
                print(f"{self.text}: {done} of {self.batches}", file=sys.stderr, flush=True)
                self.due = perf_counter() + EVERY

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
