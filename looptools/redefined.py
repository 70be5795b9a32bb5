"""Find out whether what a run calls has another definition by now, as when a cell was run again."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import attrs

from .links import Slot
from .middleware.forward import forward
from .pipeline import name_of
from .warn import warn

LIBRARY = __name__.partition(".")[0]
PLAIN = {int, float, bool, str, type(None)}


@attrs.frozen(eq=False)
class New:
    """A definition that is newer than the one that runs.

    Args:
        what: What is defined anew, as one would type it.
        cure: The call that puts it into the run.
        found: The new definition.
    """

    what: str
    cure: str
    found: Any


def redefined(line: Iterable[Slot]) -> Iterator[New]:
    """What steps and parts of the user's own have been redefined; looked up by module and name.

    Functions within functions and lambdas cannot be looked up. One that says the same as before is the same.
    """
    seen: set[int] = set()
    for slot in line:
        with contextlib.suppress(Exception):  # a module may do anything when it is asked
            new = _newer(slot)
            if new is not None and id(new.found) not in seen:
                seen.add(id(new.found))
                yield new


def warn_of_redefined(line: Iterable[Slot]) -> None:
    """Warn of what has been redefined but still runs as it was, once for each new definition."""
    for new in list(redefined(line)):
        if new.found not in _told:
            _told.add(new.found)
            warn(f"run: {new.what} has been redefined, but the old one still runs. {new.cure} puts the new one in.")


_told: weakref.WeakSet[Any] = weakref.WeakSet()


def _newer(slot: Slot) -> New | None:
    used = slot.part.step if isinstance(slot.part, forward) else slot.part
    inner = used
    while isinstance(inner, functools.partial):
        inner = inner.func
    made = not (inspect.isfunction(inner) or inspect.ismethod(inner))  # an object: its class is what was defined
    old: Any = inner.__func__ if inspect.ismethod(inner) else type(inner) if made else inner
    if f"{old.__module__}.".startswith(f"{LIBRARY}."):
        return None
    found = _look_up(old.__module__, old.__qualname__)
    if not callable(found) or (made and not isinstance(found, type)) or _same(old, found):
        return None
    typed = old.__qualname__ if old.__module__ == "__main__" else f"{old.__module__}.{old.__qualname__}"
    name = name_of(used) if isinstance(slot.part, forward) else slot.name.rpartition("/")[2]
    if inspect.ismethod(inner):
        owner, _, method = typed.rpartition(".")
        cure = f'run.replace("{name}", {owner}(...).{method})'
    elif made:
        cure = f'run.replace("{name}", {typed}(...))'
    elif inner is not used:
        cure = f'run.replace("{name}", functools.partial({typed}, ...))'
    else:
        cure = f"run.replace({typed})" if name_of(found) == name else f'run.replace("{name}", {typed})'
    return New(typed, cure, found)


def _look_up(module: str, qualname: str) -> Any:
    """What stands there now; None if nothing does, or it cannot be known (``<locals>``, ``<lambda>``)."""
    thing: Any = sys.modules.get(module)
    for name in qualname.split("."):
        thing = getattr(thing, name, None)
    return thing


def _same(old: Any, new: Any) -> bool:
    """Whether they are one, or functions that say the same: the cell was only run again."""
    old, new = inspect.unwrap(old), inspect.unwrap(new)
    if old is new or not (inspect.isfunction(old) and inspect.isfunction(new)):
        return old is new
    return bool(old.__code__ == new.__code__) and _defaults(old) == _defaults(new)


def _defaults(function: Any) -> list[Any]:
    """Plain values by what they are, others by which they are: comparing tensors gives a tensor."""
    given = {**dict(enumerate(function.__defaults__ or ())), **(function.__kwdefaults__ or {})}
    return [(name, value if type(value) in PLAIN else id(value)) for name, value in given.items()]
