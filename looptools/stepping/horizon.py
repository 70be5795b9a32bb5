"""How long a run is, and how to make it longer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
from torch.optim import Optimizer

from ..agenda import Agenda
from ..checks import whole_number
from ..cursor import Cursor
from ..gradients import optimizers_of
from ..state import Progress

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


def total(cursor: Cursor, by: str, optimizer: Optimizer | None, epochs: int | None = None) -> int | None:
    """How many updates, iterations or epochs the whole run has, or its first *epochs*; None if that cannot be known."""
    agenda = cursor.passes.agenda
    if epochs is not None:
        agenda = attrs.evolve(agenda, max_epochs=min(epochs, agenda.max_epochs or epochs))
    lengths = cursor.passes.lengths
    if by != "update":
        return agenda.epochs(lengths) if by == "epoch" else agenda.iterations(lengths)
    windows: dict[int, list[Any]] = {
        key: [s.part for s in line if hasattr(s.part, "updates_in") and optimizer in optimizers_of(s.part)]
        for key, line in cursor.lines.items()
    }
    if not any(windows.values()):  # somebody else moves it; once an iteration, we must suppose
        return agenda.iterations(lengths)
    updates = 0
    walked: dict[int, tuple[Any, list[int]]] = {id(p): (p, []) for parts in windows.values() for p in parts}
    for entry, n in agenda.walk(lengths):
        parts = windows[id(entry.phase)]
        if n is not None:
            for part in parts:
                walked[id(part)][1].append(n)
        elif entry.trains:
            return _of_iterations(
                agenda.iterations(lengths), [windows[id(e.phase)] for e in agenda.entries if e.trains]
            )
    for part, passes in walked.values():
        updates += part.updates_in(passes)
    return updates


def _of_iterations(iterations: int | None, phases: list[list[Any]]) -> int | None:
    """Updates in so many iterations, by the parts that make them in each training phase, if passes do not matter."""
    parts = [part for phase in phases for part in phase]
    if iterations is None or not all(phases):
        return None
    if all(part.updates_in([2]) == 2 for part in parts):
        return iterations
    one = len(parts) == 1 and getattr(parts[0], "across_epochs", False)
    return int(parts[0].updates_in([iterations])) if one else None


def batches_after(cursor: Cursor, part: Any) -> int | None:
    """Iterations that go through *part* after the pass under way; None if they cannot be known, though there are some.

    Asked for between two passes, it counts from the next one on.
    """
    passes, progress = cursor.passes, cursor.progress
    agenda, place = passes.agenda, attrs.evolve(passes.place)
    done = Progress(epoch=progress.epoch, iteration=progress.iteration, round=progress.round)
    if passes.phase is not None:
        done.epoch += passes.plan.trains
        if passes.plan.trains:
            done.iteration = passes.began_at + (passes.plan.length or 0)
        done.round += agenda.closes_round(place, done.epoch, done.iteration)
        place.done += 1
    through = {key for key, line in cursor.lines.items() if any(slot.part is part for slot in line)}
    lengths = dict(passes.lengths)
    if agenda.max_iterations is None:  # which passes come does not depend on how long they are
        lengths = {key: n or 0 for key, n in lengths.items()}
    count = 0
    for entry, n in agenda.walk(lengths, place, done):
        here = id(entry.phase) in through
        unknown = entry.batches is None and passes.lengths[id(entry.phase)] is None
        if (n is None and entry.trains) or (here and unknown):
            return None
        count += (n or 0) if here else 0
    return count


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
    before, ended, stopping = cursor.passes.agenda, cursor.ended, cursor.stopping
    cursor.ended = cursor.stopping = ""
    try:
        stretch(run, cursor, attrs.evolve(before, **given))  # type: ignore[arg-type]
    except BaseException:  # a schedule cannot do so many steps: the run ends where it did
        cursor.ended, cursor.stopping = ended, stopping
        stretch(run, cursor, before)
        raise


def stretch(run: Run, cursor: Cursor, agenda: Agenda) -> None:
    """Have the run go through *agenda*, which has other bounds."""
    cursor.passes.agenda = run._agenda = agenda
    cursor.passes.stretch()
    for slot in cursor.slots:
        if hasattr(slot.part, "on_build"):
            slot.part.on_build(run)
