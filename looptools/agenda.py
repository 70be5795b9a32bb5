"""A workflow walked through in integers: which pass comes next, and how long the whole will be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from .checks import whole_number
from .intervals import epochs, iterations
from .phases import Phase
from .pipeline import name_of
from .state import Progress

if TYPE_CHECKING:
    from .run import Run


@attrs.frozen(eq=False)
class Entry:
    """One entry of a workflow: a phase and how often, or a callable that is given the run."""

    phase: Phase | Callable[[Run], Any]
    passes: int
    batches: int | None = None  # of one pass, if it is given as lt.iterations(n)

    @property
    def trains(self) -> bool:
        return isinstance(self.phase, Phase) and self.phase.trains

    @property
    def passes_data(self) -> bool:
        """Whether it is a phase, and not a function of the run."""
        return isinstance(self.phase, Phase)


@attrs.define
class Place:
    """Where in the workflow a run stands: the entry's number, and its passes that are done."""

    entry: int = 0
    done: int = 0


@attrs.frozen(eq=False)
class Agenda:
    """The entries of a workflow and the bounds of the run."""

    entries: tuple[Entry, ...]
    max_epochs: int | None = None
    max_iterations: int | None = None
    max_rounds: int | None = None

    @property
    def phases(self) -> list[Phase]:
        """Each phase once, in order."""
        return list({id(e.phase): e.phase for e in self.entries if isinstance(e.phase, Phase)}.values())

    def trained(self, epoch: int, iteration: int) -> bool:
        """Whether training is over after so many passes and iterations."""
        return (self.max_epochs is not None and epoch >= self.max_epochs) or (
            self.max_iterations is not None and iteration >= self.max_iterations
        )

    def upcoming(self, place: Place, epoch: int, iteration: int, round: int) -> Entry | None:
        """Move *place* on to the entry whose pass comes next, and return it; None if the run is over."""
        while True:
            if place.entry == len(self.entries):
                place.entry = place.done = 0
            if place.entry == place.done == 0 and self._over(epoch, iteration, round):
                return None
            entry = self.entries[place.entry]
            if place.done < entry.passes and not (entry.trains and self.trained(epoch, iteration)):
                return entry
            place.entry, place.done = place.entry + 1, 0

    def _over(self, epoch: int, iteration: int, round: int) -> bool:
        return self.trained(epoch, iteration) or (self.max_rounds is not None and round >= self.max_rounds)

    def closes_round(self, place: Place, epoch: int, iteration: int) -> bool:
        """Whether the pass at *place* is the round's last one, once *epoch* and *iteration* are done."""
        rest = [(self.entries[place.entry], place.done + 1), *((entry, 0) for entry in self.entries[place.entry + 1 :])]
        over = self.trained(epoch, iteration)
        return not any(
            isinstance(entry.phase, Phase) and done < entry.passes and not (entry.trains and over)
            for entry, done in rest
        )

    def length(self, entry: Entry, source_length: int | None, iteration: int) -> tuple[int | None, int | None]:
        """Iterations of the entry's next pass: how many exactly, if that is known, and how many at most."""
        exact = source_length if entry.batches is None else entry.batches
        most = None
        if entry.trains and self.max_iterations is not None:
            most = self.max_iterations - iteration
        if exact is not None and most is not None:
            exact = min(exact, most)
        return exact, most

    def walk(
        self, lengths: Mapping[int, int | None], place: Place | None = None, done: Progress | None = None
    ) -> Iterator[tuple[Entry, int | None]]:
        """All passes of the run with their lengths, or those from *place* on when so much is *done*.

        Ends early at a training pass of unknown length, since the rest depends on it.

        Args:
            lengths: Those of the sources by ``id`` of the phase.
            place: Where the walk begins.
            done: What is done by then.
        """
        place, done = place or Place(), done or Progress()
        epoch, iteration, round = done.epoch, done.iteration, done.round
        while (entry := self.upcoming(place, epoch, iteration, round)) is not None:
            length: int | None = 0
            if isinstance(entry.phase, Phase):
                length = self.length(entry, lengths[id(entry.phase)], iteration)[0]
                yield entry, length
            if entry.trains:
                if length is None:
                    return
                epoch, iteration = epoch + 1, iteration + length
            if isinstance(entry.phase, Phase) and self.closes_round(place, epoch, iteration):
                round += 1
            place.done += 1

    def iterations(self, lengths: Mapping[int, int | None]) -> int | None:
        """Training iterations of the whole run; None if they cannot be known."""
        total = 0
        for entry, length in self.walk(lengths):
            if length is None and entry.trains:
                only = self.max_epochs is None and self.max_rounds is None
                return self.max_iterations if only else None
            total += length or 0 if entry.trains else 0
        return total

    def epochs(self, lengths: Mapping[int, int | None]) -> int | None:
        """Training passes of the whole run; None if they cannot be known."""
        total = 0
        for entry, length in self.walk(lengths):
            if length is None and entry.trains:
                return self.max_epochs if self.max_iterations is None and self.max_rounds is None else None
            total += entry.trains
        return total


def agenda(
    entries: Iterable[Any], max_epochs: int | None, max_iterations: int | None, max_rounds: int | None
) -> Agenda:
    """Read the arguments of `workflow`.

    Raises:
        TypeError: If an entry is not a pair of a phase or callable and a count.
        ValueError: If the run could never end.
    """
    if isinstance(entries, Phase | str) or not hasattr(entries, "__iter__") or hasattr(entries, "__next__"):
        kind = "a phase" if isinstance(entries, Phase) else repr(entries)
        raise TypeError(f"workflow: give a list of pairs (phase, n), as in workflow([(train, 1)]), got {kind}.")
    read = tuple(_entry(number, entry) for number, entry in enumerate(entries, 1))
    bounds = {"max_epochs": max_epochs, "max_iterations": max_iterations, "max_rounds": max_rounds}
    for name, bound in bounds.items():
        if bound is not None:
            whole_number(f"workflow: {name}", bound)
    if not any(isinstance(entry.phase, Phase) for entry in read):
        raise ValueError("workflow: there is no phase in it. Give entries such as (lt.train(...), 1).")
    if max_rounds is None and not any(entry.trains for entry in read):
        raise ValueError("workflow: without a training phase it would never end. Give max_rounds=.")
    if max_rounds is None and max_epochs is None and max_iterations is None:
        raise ValueError("workflow: it would never end. Give max_epochs=, max_iterations= or max_rounds=.")
    return Agenda(read, max_epochs, max_iterations, max_rounds)


def _entry(number: int, entry: Any) -> Entry:
    where = f"workflow: entry {number}"
    if isinstance(entry, Phase):
        raise TypeError(f"{where} is a phase without a count. Write ({entry.name}, 1).")
    try:
        phase, count = entry
    except (TypeError, ValueError):
        raise TypeError(f"{where} must be a pair (phase, n), got {entry!r}.") from None
    if isinstance(phase, type) or not (isinstance(phase, Phase) or callable(phase)):
        raise TypeError(f"{where} must begin with a phase or a function of the run, got {phase!r}.")
    if isinstance(count, epochs):
        count = count.n
    if not isinstance(count, iterations):
        return Entry(phase, whole_number(f"{where}: the number of passes", count))
    if not isinstance(phase, Phase):
        raise TypeError(f"{where}: lt.iterations(n) counts the batches of a phase; {name_of(phase)} has none.")
    return Entry(phase, 1, count.n)
