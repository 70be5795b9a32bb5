"""Parts that write files, in a run that stands beside the one that they were piped onto."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from ...cursor import Cursor
from ...middleware.log import log
from ...middleware.profile import profile
from ...options import given
from ...pipeline import name_of
from ...state import State
from ..elsewhere import elsewhere


@attrs.define(eq=False)
class silent:  # noqa: N801 (a part)
    """Stands in the place of a part that writes files: does nothing, and keeps what that remembers.

    Args:
        name: What the part is called.
        options: What it was given.
        only_looks: Whether the training is the same without it.
    """

    name: str
    options: str
    only_looks: bool = attrs.field(repr=False)
    memory: dict[str, Any] = attrs.field(factory=dict, init=False, repr=False)

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        for state in states:
            yield state

    def state_dict(self) -> dict[str, Any]:
        """What the part that it stands for had kept."""
        return self.memory

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep it."""
        self.memory = dict(state)


def writes(part: Any) -> bool:
    """Whether a part writes files, or sends what it sees somewhere; torch can profile one run at a time only."""
    return (
        isinstance(part, profile)
        or getattr(part, "folder", None) is not None
        or bool(isinstance(part, log) and part.to)
    )


def silenced(part: Any) -> silent:
    """What stands in its place."""
    return silent(name_of(part), given(part), bool(getattr(part, "only_looks", False)))


def folders_of(cursor: Cursor) -> list[Path]:
    """Where the parts of a run write to."""
    given_folders = (getattr(slot.part, "folder", None) for slot in cursor.slots)
    return [Path(folder).resolve() for folder in given_folders if folder is not None]


def in_folder(part: Any, folder: Path, others: list[Path]) -> Any:
    """The same part writing into *folder*; below it, if *others*, where all parts wrote to, are not one folder."""
    if isinstance(part, profile) or not attrs.has(type(part)):
        return silenced(part)
    top = Path(os.path.commonpath(others)) if others else Path()
    return elsewhere(part, lambda own: folder / own.resolve().relative_to(top))
