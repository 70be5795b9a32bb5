"""A run's pipe that writes somewhere else: to be tried beside the real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from ..middleware.log import log
from ..pipeline import Chain, Middleware, name_of


def elsewhere(
    middleware: Middleware, folder: Callable[[Path], Path], often: dict[str, Any] | None = None
) -> Middleware:
    """The same part, writing into another folder; one that has no folder is itself.

    A `log` loses its ``to=``: a tracking service need not hear of a trial.

    Args:
        middleware: A part, or a chain of them.
        folder: Says, for the folder of a part, into which one it writes instead.
        often: By the name of a part with a folder, another ``every``.
    """
    if isinstance(middleware, Chain):
        parts = tuple(elsewhere(part, folder, often) for part in middleware.parts)
        return attrs.evolve(middleware, parts=parts)
    if isinstance(middleware, log):
        middleware = attrs.evolve(middleware, to=())
    own = getattr(middleware, "folder", None)
    if not attrs.has(type(middleware)) or own is None:
        return middleware
    every = (often or {}).get(name_of(middleware))
    changes: dict[str, Any] = {"folder": folder(Path(own)), **({"every": every} if every else {})}
    return attrs.evolve(middleware, **changes)  # type: ignore[misc]
