"""The verbs of a run that look into it or change it, each in its own file."""

from .explain import describe, explain
from .horizon import batches_after, extend, length, total
from .html import html_of_run
from .lazily import Lazily
from .names import find_slot
from .rehearse import rehearse
from .replace import replace
from .stages import after, before, stages
from .surviving import drop, redo
from .validate import validate

__all__ = [
    "Lazily",
    "after",
    "batches_after",
    "before",
    "describe",
    "drop",
    "explain",
    "extend",
    "find_slot",
    "html_of_run",
    "length",
    "redo",
    "rehearse",
    "replace",
    "stages",
    "total",
    "validate",
]
