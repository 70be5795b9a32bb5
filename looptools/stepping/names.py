"""Find parts by name, full or short."""

from __future__ import annotations

from collections.abc import Iterable

from ..cursor import Cursor
from ..links import Slot


def matches(names: Iterable[str], wanted: str) -> list[str]:
    """The full names that *wanted* stands for: the one it is, or those it abbreviates.

    Example:
        >>> matches(["train/D.backward", "train/G.backward", "train/update"], "backward")
        ['train/D.backward', 'train/G.backward']
        >>> matches(["train/log", "train/log#2"], "train/log")
        ['train/log']
    """
    names = list(names)
    if wanted in names:
        return [wanted]
    return [name for name in names if wanted in (_tail(name), _tail(name).rpartition(".")[2].partition("#")[0])]


def _tail(name: str) -> str:
    return name.rpartition("/")[2]


def find_one(names: Iterable[str], wanted: str, verb: str) -> str | None:
    """The one name that *wanted* stands for, or None.

    Raises:
        LookupError: If it stands for several.
    """
    found = matches(names, wanted)
    if len(found) > 1:
        raise LookupError(f"{verb}: {wanted!r} matches {', '.join(found)}. Give the full name.")
    return found[0] if found else None


def find_slot(cursor: Cursor, wanted: str, verb: str = "run[...]") -> Slot:
    """The slot of the part called *wanted*.

    Raises:
        LookupError: If there is none, or several.
    """
    slots = {slot.name: slot for slot in cursor.slots}
    name = find_one(slots, wanted, verb)
    if name is None:
        raise LookupError(f"{verb}: there is no part {wanted!r}. There are: {', '.join(slots)}.")
    return slots[name]
