"""Try a whole run on a few batches, and put everything back."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from ..agenda import Agenda, Entry
from ..checks import whole_number
from ..cursor import Cursor
from ..intervals import iterations, rounds
from ..phases import Phase
from ..pipeline import Middleware
from .elsewhere import elsewhere
from .kept import kept, require_repeatable
from .mended import mended, piped

if TYPE_CHECKING:
    from ..run import Run


def rehearse(run: Run, batches: int) -> dict[str, float]:
    """Run *batches* batches of every phase of the workflow, once; then put everything back as it was.

    Weights, buffers, gradients, optimizers, schedulers, modes and random generators come back; parts with a
    ``folder`` write into a temporary one. What a part of your own does outside these is not undone; a generator that
    hides in a function given as the source is not found.

    Returns:
        The results of the rehearsal.

    Raises:
        RuntimeError: If a source can be walked through only once, a model has lazy layers that have not seen a batch,
            or an iteration is open.
    """
    whole_number("rehearse: batches", batches)
    cursor = run.cursor
    if cursor.state is not None:
        raise RuntimeError("rehearse: an iteration is open. Finish it first: next(run).")
    require_repeatable("rehearse", cursor.passes.agenda.phases)
    lengths = cursor.passes.lengths
    with tempfile.TemporaryDirectory() as folder:
        phases = {id(phase): _trial_of(cursor, phase, batches, folder) for phase in cursor.passes.agenda.phases}
        entries = [
            Entry(phases[id(e.phase)], 1, min(batches, e.batches or batches, lengths[id(e.phase)] or batches))
            for e in cursor.passes.agenda.entries
            if isinstance(e.phase, Phase)
        ]
        middlewares = tuple(_into(part, Path(folder)) for part in piped(cursor.run_slots))
        trial = type(run)(Agenda(tuple(entries), max_rounds=1), middlewares)
        trial.cursor.hears = True  # a signal is not for the trial, whose folder goes
        trial.cursor.unsure = None  # the body of the user's own loop, which may train, is not rehearsed
        with kept(cursor):
            try:
                return dict(trial.to_end())
            finally:
                trial.close()


def _trial_of(cursor: Cursor, phase: Phase, batches: int, folder: str) -> Phase:
    """The phase as it stands, on less data, writing into another folder."""
    phase = mended(cursor, phase).limit(batches)
    return attrs.evolve(phase, middlewares=tuple(_into(part, Path(folder)) for part in phase.middlewares))


def _into(middleware: Middleware, folder: Path) -> Middleware:
    """The same part, writing into another folder, all of it."""
    return elsewhere(middleware, lambda _: folder, {"log": iterations(1), "checkpoint": rounds(1)})
