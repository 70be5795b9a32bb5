"""A run's pipe as it stands: with the steps and parts that were replaced, to be run once more beside it."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from ..cursor import Cursor
from ..links import Slot
from ..phases import Phase
from ..pipeline import Chain, Middleware, fresh


def mended(cursor: Cursor, phase: Phase) -> Phase:
    """A phase of the workflow with the parts that it has by now, as options; one of another run as it is."""
    line = cursor.lines.get(id(phase))
    if line is None:
        return phase
    step, *others = line  # in the place of `forward` stands another one at most
    return attrs.evolve(phase, step=fresh(step.part), middlewares=piped(others))


def piped(slots: Iterable[Slot]) -> tuple[Middleware, ...]:
    """The parts of *slots* as they would be piped: new instances, under the name of their recipe."""
    return tuple(Chain((fresh(slot.part),), slot.name.rpartition("/")[2].rpartition(".")[0]) for slot in slots)
