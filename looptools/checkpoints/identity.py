"""By what a run's folders are known as its own."""

from __future__ import annotations

import uuid
from typing import Any
from weakref import WeakKeyDictionary

import attrs

from ..cursor import Cursor


@attrs.define
class Identity:
    """What stands in all that a run saves, and comes back when it is resumed.

    Args:
        id: Random; torch's and Python's generators are not asked for it.
        number: Of the last checkpoint: those of all its folders are counted through.
    """

    id: str = attrs.field(factory=lambda: uuid.uuid4().hex)
    number: int = 0


_IDENTITIES: WeakKeyDictionary[Cursor, Identity] = WeakKeyDictionary()


def identity(cursor: Cursor) -> Identity:
    """The run's own; made when it is first asked for."""
    return _IDENTITIES.setdefault(cursor, Identity())


def resume_identity(cursor: Cursor, tree: dict[str, Any]) -> None:
    """Be the run that saved *tree*; older ones do not say."""
    _IDENTITIES[cursor] = Identity(**tree["run"]) if "run" in tree else Identity()
