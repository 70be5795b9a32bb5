"""The pass under way: its phase, its data, and how far it goes."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from .agenda import Agenda, Entry, Place
from .data.sources import END, Source
from .devices import model_device
from .phases import Phase
from .pipeline import numbered
from .state import Plan, Progress, State


class Passes:
    """Sets out on one pass of the workflow after another, and fetches their batches.

    Args:
        agenda: The workflow.
        progress: The run's counters; `end` moves those of passes and rounds.
    """

    def __init__(self, agenda: Agenda, progress: Progress) -> None:
        self.agenda = agenda
        self.progress = progress
        self.place = Place()
        self.phase: Phase | None = None  # of the pass under way; None between passes
        self.plan = Plan(phase="", trains=False)
        self.began = 0.0  # the run's seconds when the pass began
        self.began_at = 0  # training iterations before the pass
        phases = agenda.phases
        self.names = {id(p): name for p, name in zip(phases, numbered(p.name for p in phases), strict=True)}
        self.sources = {id(p): Source(p.source, self.names[id(p)], p.max_batches, p.non_blocking) for p in phases}
        self.lengths = {key: source.length for key, source in self.sources.items()}
        self.stretch()
        self._entry: Entry
        self._source: Source
        self.index = 0  # of the batch that comes next
        self._exact: int | None = None  # iterations of the pass, if that is known,
        self._most: int | None = None  # and how many there may be at most
        self._set_out_at: tuple[Any, int, int, bool]  # where the source stood before the pass
        self._done = 0  # passes of the entry before the one under way
        self.mark: tuple[int, Any, int, int] | None = None  # where it stood before the batch was fetched,
        self.ready: State | None = None  # and the state that was made of it

    def stretch(self) -> None:
        """Measure the whole run, now and when its bounds have changed."""
        self.epochs = self.agenda.epochs(self.lengths)
        self.iterations = self.agenda.iterations(self.lengths)
        if self.phase is not None:
            self.measure()

    def upcoming(self) -> Entry | None:
        """The entry whose pass comes next; None if the run is over."""
        done = self.progress
        return self.agenda.upcoming(self.place, done.epoch, done.iteration, done.round)

    def set_out(self, entry: Entry, phase: Phase, seconds: float) -> None:
        """Begin the next pass of *entry*."""
        source = self.sources[id(phase)]
        self._set_out_at = _place(source)
        self.open(entry, phase)
        if not (source.under_way and phase.trains and entry.batches is not None):
            source.begin()
        self.index, self.began, self.began_at = 0, seconds, self.progress.iteration
        self.measure()

    def turn_back(self) -> None:
        """The pass could not be set out on: as if that had not been tried."""
        if self.phase is not None:
            self._source.back_to(*self._set_out_at)
            self.phase = None

    def open(self, entry: Entry, phase: Phase) -> Source:
        """Look at *phase* and its source, wherever in the pass."""
        self._done, self.mark, self.ready = self.place.done, None, None
        self._source, self._entry, self.phase = self.sources[id(phase)], entry, phase
        self._source.device = _device(phase)
        self.plan = Plan(phase=self.names[id(phase)], trains=phase.trains, round=self.progress.round)
        return self._source

    def measure(self) -> None:
        """Find out how far the pass under way goes."""
        self._exact, self._most = self.agenda.length(self._entry, self._source.length, self.began_at)
        self.plan = attrs.evolve(
            self.plan,
            length=self._exact,
            max_epochs=self.agenda.max_epochs,
            max_iterations=self.agenda.max_iterations,
            epochs=self.epochs,
            iterations=self.iterations,
        )

    def fetch(self, run: Any, *, skip: bool = False) -> State:
        """Fetch the next batch of the pass, and make its state; *skip* passes over one that could not be fetched.

        Raises:
            RuntimeError: If the source has none.
        """
        source = self._source
        self.mark = self.index, source.at_start, source.begun, source.taken
        batch = None
        if skip:
            self._source.skip_failed()
        else:
            batch = self._source.fetch()
        if batch is END and self._entry.batches is not None:  # such a pass begins its source again and again
            self._source.begin()
            batch = self._source.fetch()
        if batch is END:
            once = " It is spent after one pass: give a function that makes it anew (lambda: ...), or a list."
            why = once if hasattr(self._source.given, "__next__") else ""
            raise RuntimeError(f"{self.plan.phase}: its source gave no batch.{why}")
        phase, progress, index = self.phase, self.progress, self.index
        assert phase is not None
        self.index = index + 1
        back = 0 if phase.trains else 1  # a validation state bears the numbers of the last training state
        state = State(
            phase=self.plan.phase,
            trains=phase.trains,
            epoch=max(progress.epoch - back, 0),
            index=index,
            iteration=max(progress.iteration - back, 0),
            first=not index,
            last=index + 1 == self._exact,
            model=phase.model,
            batch=batch,
            plan=self.plan,
            run=run,
        )
        if self._exact is None:
            del state.last, state.round_last  # found out when they are asked for
        elif state.last:
            del state.round_last
        self.ready = state
        return state

    def unfetch(self, error: BaseException) -> State | None:
        """The batch got lost on its way to the cursor, if Ctrl-C struck: the source finds its place again.

        Returns:
            The state, if it had been made.
        """
        if self.mark is not None and self.ready is None and not isinstance(error, Exception):
            self.index, start, begun, taken = self.mark
            self._source.back_to(start, begun, taken, under_way=True)
        return self.ready

    @property
    def source(self) -> Source:
        """That of the pass under way, or of the last one."""
        return self._source

    @property
    def is_unknown(self) -> bool:
        """Whether only the source can tell where the pass ends."""
        return self._exact is None

    def is_last(self) -> bool:
        """Whether the batch that was fetched last ends the pass; fetches one ahead if only that can tell."""
        if self._exact is not None:
            return self.index == self._exact
        if self.index == self._most:
            return True
        place = _place(self._source)
        try:
            return not self._source.peek()
        except KeyboardInterrupt:
            self._source.back_to(*place)
            raise

    def is_round_last(self) -> bool:
        """Whether the pass under way is the last one of its round."""
        done, trains = self.progress, self.plan.trains
        iteration = done.iteration + 1 if trains else done.iteration
        return self.agenda.closes_round(self.place, done.epoch + trains, iteration)

    def skip_failed(self) -> None:
        """Go on behind the batch that could not be fetched."""
        self._source.skip_failed()

    def end(self, state: State) -> None:
        """The pass is over with *state*: count it. Done once more, it comes to the same."""
        round_last = state.round_last
        if not (self.plan.trains and self._entry.batches is not None):
            self._source.end()
        self.phase = None
        self.place.done = self._done + 1
        self.progress.epoch = state.epoch + 1 if self.plan.trains else self.progress.epoch
        self.progress.round = self.plan.round + round_last


def _place(source: Source) -> tuple[Any, int, int, bool]:
    return source.at_start, source.begun, source.taken, source.under_way


def _device(phase: Phase) -> torch.device | None:
    """Where the phase's batches are moved to."""
    if phase.device == "model":
        return model_device(phase.model)
    return None if phase.device is None else torch.device(phase.device)
