"""The verbs of a run that look into it or change it, each in its own file."""

from .explain import describe, explain
from .horizon import extend, length, total
from .names import find_slot
from .rehearse import rehearse
from .replace import replace
from .stages import after, before, stages
from .surviving import drop, redo

__all__ = [
    "after",
    "before",
    "describe",
    "drop",
    "explain",
    "extend",
    "find_slot",
    "length",
    "redo",
    "rehearse",
    "replace",
    "stages",
    "total",
]
