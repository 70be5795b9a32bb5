"""A run's pipe as it stands: with what was replaced, put in and taken out, to be run once more beside it."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from ..cursor import Cursor
from ..links import Slot
from ..middleware.forward import forward
from ..phases import Phase
from ..pipeline import Chain, Middleware, flatten, fresh, numbered


@attrs.frozen(eq=False, kw_only=True, repr=False)
class Mended(Phase):
    """A phase whose middlewares are all of its parts, its `forward` too: something was put in before that."""

    def parts(self) -> list[tuple[str, Middleware]]:
        """New instances of its parts, with their names."""
        parts = list(flatten(self.middlewares))
        names = numbered(name for name, _ in parts)
        return [(name, fresh(part)) for name, (_, part) in zip(names, parts, strict=True)]


def mended(cursor: Cursor, phase: Phase) -> Phase:
    """A phase of the workflow with the parts that it has by now, as options, without those that are muted.

    One of another run is as it is.
    """
    line = cursor.lines.get(id(phase))
    if line is None:
        return phase
    first, *others = [slot for slot in line if not slot.muted]
    if isinstance(first.part, forward):
        return attrs.evolve(phase, step=fresh(first.part), middlewares=piped(others))
    facts = {field.name: getattr(phase, field.name) for field in attrs.fields(Phase)}
    return Mended(**{**facts, "middlewares": piped(line)})


def piped(slots: Iterable[Slot]) -> tuple[Middleware, ...]:
    """The parts of *slots* as they would be piped: new instances, under the name of their recipe; no muted ones."""
    return tuple(
        Chain((fresh(slot.part),), slot.name.rpartition("/")[2].rpartition(".")[0]) for slot in slots if not slot.muted
    )
