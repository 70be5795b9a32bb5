"""How long a run is, and how to make it longer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
from torch.optim import Optimizer

from ..checks import whole_number
from ..cursor import Cursor

if TYPE_CHECKING:
    from ..run import Run


def length(cursor: Cursor) -> int:
    """States of the whole run.

    Raises:
        TypeError: If a source does not know its length.
    """
    total = 0
    for entry, n in cursor.passes.agenda.walk(cursor.passes.lengths):
        if n is None:
            name = cursor.passes.names[id(entry.phase)]
            raise TypeError(f"len(run): the source of {name} has no length, or none that can be trusted.")
        total += n
    return total


def total(cursor: Cursor, by: str, optimizer: Optimizer | None) -> int | None:
    """How many updates, iterations or epochs the whole run has; None if that cannot be known."""
    if by != "update":
        return cursor.passes.epochs if by == "epoch" else cursor.passes.iterations
    windows: dict[int, list[Any]] = {
        key: [s.part for s in line if hasattr(s.part, "updates_in") and getattr(s.part, "optimizer", None) is optimizer]
        for key, line in cursor.lines.items()
    }
    if not any(windows.values()):  # somebody else moves it; once an iteration, we must suppose
        return cursor.passes.iterations
    updates = 0
    for entry, n in cursor.passes.agenda.walk(cursor.passes.lengths):
        parts = windows[id(entry.phase)]
        if n is not None:
            updates += sum(part.updates_in(n) for part in parts)
        elif entry.trains:
            everywhere = all(windows[id(e.phase)] for e in cursor.passes.agenda.entries if e.trains)
            one_each = all(part.updates_in(2) == 2 for parts in windows.values() for part in parts)
            return cursor.passes.iterations if everywhere and one_each else None
    return updates


def extend(run: Run, max_epochs: int | None, max_iterations: int | None, max_rounds: int | None) -> None:
    """Move the end of the run; schedules stretch to the new one.

    Raises:
        ValueError: If neither bound is given, or the run has gone past it.
    """
    cursor = run.cursor
    bounds = {"max_epochs": max_epochs, "max_iterations": max_iterations, "max_rounds": max_rounds}
    given = {name: whole_number(f"extend: {name}", bound) for name, bound in bounds.items() if bound is not None}
    if not given:
        raise ValueError("extend: give max_epochs=, max_iterations= or max_rounds=.")
    progress = cursor.progress
    done = {"max_epochs": progress.epoch, "max_iterations": progress.iteration, "max_rounds": progress.round}
    for name, bound in given.items():
        if bound < done[name]:
            raise ValueError(f"extend: {name}={bound} is already behind: {done[name]} are done.")
    cursor.passes.agenda = run._agenda = attrs.evolve(
        cursor.passes.agenda,
        max_epochs=given.get("max_epochs", cursor.passes.agenda.max_epochs),
        max_iterations=given.get("max_iterations", cursor.passes.agenda.max_iterations),
        max_rounds=given.get("max_rounds", cursor.passes.agenda.max_rounds),
    )
    cursor.passes.stretch()
    cursor.ended = cursor.stopping = ""
    for slot in cursor.slots:
        if hasattr(slot.part, "on_build"):
            slot.part.on_build(run)
