"""The verbs of a run that look into it or change it, each in its own file."""

from .explain import describe, explain
from .foreseeing.simulation import Simulation
from .fork import fork
from .horizon import batches_after, extend, length, total
from .html import html_of_run
from .keeper import keep_snapshots
from .lazily import Lazily
from .ledger import Ledger, ledger
from .names import find_slot
from .rehearse import rehearse
from .replace import replace
from .simulate import simulate
from .snapshots import Ring, require_snapshots, ring, snapshots
from .stages import after, before, stages
from .surviving import drop, redo
from .swap import changes, insert, mute, remove
from .trace import Trace, trace
from .travel import back, replay
from .until import nonfinite, until, until_nonfinite
from .validate import validate

__all__ = [
    "Lazily",
    "Ledger",
    "Ring",
    "Simulation",
    "Trace",
    "after",
    "back",
    "batches_after",
    "before",
    "changes",
    "describe",
    "drop",
    "explain",
    "extend",
    "find_slot",
    "fork",
    "html_of_run",
    "insert",
    "keep_snapshots",
    "ledger",
    "length",
    "mute",
    "nonfinite",
    "redo",
    "rehearse",
    "remove",
    "replace",
    "replay",
    "require_snapshots",
    "ring",
    "simulate",
    "snapshots",
    "stages",
    "total",
    "trace",
    "until",
    "until_nonfinite",
    "validate",
]
