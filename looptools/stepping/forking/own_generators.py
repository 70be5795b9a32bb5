"""The process's random generators as one of several runs has them, which are stepped in turn."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ...cursor import Cursor
from ...generators import get_generators, set_generators

if TYPE_CHECKING:
    from ...run import Run

T = TypeVar("T")
OWN = "own generators"  # where a cursor has them
VERBS = ("save", "resume", "validate", "rehearse", "fork", "back", "replay")  # they read or set them, or draw


class OwnGenerators:
    """A run's own states of Python's, NumPy's and torch's generators: put in while it is at work, and out after.

    So what it draws does not depend on who else draws in the process. Takes about 0.15 ms each time, most of it for
    reading NumPy's. Entered again within itself, it does nothing.

    Args:
        state: Where they stand for the run, as `get_generators` gives it.

    Example:
        >>> own, before = OwnGenerators(get_generators()), get_generators()
        >>> with own:
        ...     first = torch.rand(1)
        >>> bool(torch.rand(1) == first)
        True
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state
        self._others: dict[str, Any] = {}
        self._depth = 0

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._others = get_generators()
            set_generators(self.state)

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.state = get_generators()
            set_generators(self._others)

    def around(self, action: Callable[..., T]) -> Callable[..., T]:
        """The same action, done with them."""

        @functools.wraps(action)
        def done(*given: Any, **options: Any) -> T:
            with self:
                return action(*given, **options)

        return done

    def look_after(self, run: Run) -> None:
        """Have *run*, which is not built yet, do with them whatever draws numbers or looks where they stand."""
        for verb in VERBS:
            vars(run)[verb] = self.around(getattr(run, verb))
        build = run._build

        def built() -> Cursor:
            cursor = build()
            work = cursor.work
            # within the cursor's own work, so that Ctrl-C cannot come between putting in and out
            vars(cursor)["work"] = lambda action: work(self.around(action))
            vars(cursor)["is_last"] = self.around(cursor.is_last)
            vars(cursor)[OWN] = self
            return cursor

        vars(run)["_build"] = built
