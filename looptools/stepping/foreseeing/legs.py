"""The passes that a run has still to make, walked through in integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import attrs

from ...agenda import Agenda, Entry
from ...cursor import Cursor
from ...links import Slot
from ...phases import Phase
from ...pipeline import name_of
from ...state import Plan, Progress, State

if TYPE_CHECKING:
    from ...run import Run


@attrs.define(eq=False, kw_only=True)
class Leg:
    """What is still to come of one pass; or a function of the workflow.

    Args:
        phase: Name of the phase, or of the function.
        trains: Whether it trains.
        before: What the run has done before it,
        after: and when it is over.
        index: The number that its first state has within the pass.
        length: How many states it has; None if that is unknown.
        whole: Whether it ends its pass, and is not broken off within it.
        round_last: Whether it ends its round.
        slots: The parts that its states go through.
        open: Whether it stands for passes whose ends are unknown, until the training is over.
        final: Parts through which no other pass goes.
        function: What of the workflow is called here, if it is no pass.
        updating: At which of its indices ``state.updates`` is seen, by the part that looks.
    """

    phase: str
    trains: bool = False
    before: Progress
    after: Progress
    index: int = 0
    length: int | None = 0
    whole: bool = True
    round_last: bool = False
    slots: list[Slot] = attrs.field(factory=list)
    open: bool = False
    final: set[int] = attrs.field(factory=set)
    function: Callable[[Run], Any] | None = None
    updating: dict[int, Any] = attrs.field(factory=dict)

    @property
    def epoch(self) -> int:
        """What its states call their epoch: in validation, that of the last training state."""
        return self.before.epoch if self.trains else max(self.before.epoch - 1, 0)

    @property
    def iteration(self) -> int:
        """What its first state calls its iteration."""
        return self.before.iteration if self.trains else max(self.before.iteration - 1, 0)

    @property
    def last(self) -> int | None:
        """Index of its last state; None if that is unknown."""
        return None if self.length is None else self.index + self.length - 1

    def iteration_at(self, index: int | None) -> int:
        """What the state with this index calls its iteration."""
        return self.iteration + (index - self.index if self.trains and index is not None else 0)

    def state(self, index: int | None, run: Any = None) -> State:
        """What intervals and parts are asked about: the state with this index, as far as it is known beforehand."""
        last = self.whole and index == self.last
        return State(
            phase=self.phase,
            trains=self.trains,
            epoch=self.epoch,
            index=index or 0,
            iteration=self.iteration_at(index),
            first=index == 0,
            last=last,
            round_last=last and self.round_last,
            plan=Plan(phase=self.phase, trains=self.trains, round=self.before.round),
            run=run,
        )

    def cut(self, index: int) -> None:
        """Break it off after the state with this index."""
        if index == self.last:
            return
        self.length, self.whole, self.round_last = index + 1 - self.index, False, False
        self.after = attrs.evolve(self.before, iteration=self.before.iteration + (self.length if self.trains else 0))


def legs(cursor: Cursor) -> list[Leg]:
    """All that comes from where the run stands, between two iterations, to its end.

    Raises:
        TypeError: If a training source has no length, and where passes end matters for where the run does.
    """
    found = list(_walk(cursor))
    seen: set[int] = set()
    for leg in reversed(found):
        leg.final = {id(slot) for slot in leg.slots} - seen
        seen |= {id(slot) for slot in leg.slots}
    return found


def _walk(cursor: Cursor) -> Iterator[Leg]:
    passes = cursor.passes
    agenda, place, done = passes.agenda, attrs.evolve(passes.place), cursor.progress
    done = Progress(epoch=done.epoch, iteration=done.iteration, round=done.round)
    under_way = passes.phase is not None
    while True:
        entry = agenda.entries[place.entry] if under_way else _upcoming(agenda, place, done)
        if entry is None:
            return
        if not isinstance(entry.phase, Phase):
            yield Leg(phase=name_of(entry.phase), before=done, after=done, function=entry.phase)
        else:
            leg = _leg(cursor, entry, entry.phase, done, under_way)
            done = leg.after
            leg.round_last = not leg.open and agenda.closes_round(place, done.epoch, done.iteration)
            done.round += leg.round_last
            yield leg
            if leg.open:
                return
        place.done += 1
        under_way = False


def _upcoming(agenda: Agenda, place: Any, done: Progress) -> Entry | None:
    return agenda.upcoming(place, done.epoch, done.iteration, done.round)


def _leg(cursor: Cursor, entry: Entry, phase: Phase, done: Progress, under_way: bool) -> Leg:
    """The pass of *entry* that comes next, or the rest of the one that is under way."""
    passes = cursor.passes
    name, index = passes.names[id(phase)], 0
    if under_way:
        index, length = passes.index, passes.plan.length
        length = None if length is None else length - index
    else:
        length = passes.agenda.length(entry, passes.lengths[id(phase)], done.iteration)[0]
    is_open = length is None and phase.trains
    if is_open:
        length = _until_the_end(passes.agenda, phase, name, done)
    epochs = phase.trains and not is_open
    after = attrs.evolve(done, epoch=done.epoch + epochs, iteration=done.iteration + (length or 0) * phase.trains)
    return Leg(
        phase=name,
        trains=phase.trains,
        before=done,
        after=after,
        index=index,
        length=length,
        whole=not is_open,
        slots=[slot for slot in (*cursor.lines[id(phase)], *cursor.run_slots) if not slot.muted],
        open=is_open,
    )


def _until_the_end(agenda: Agenda, phase: Phase, name: str, done: Progress) -> int:
    """Training iterations that are left, where passes are of unknown length."""
    alone = all(entry.phase is phase for entry in agenda.entries if entry.trains)
    only = agenda.max_iterations is not None and agenda.max_epochs is None and agenda.max_rounds is None
    if not (alone and only and agenda.max_iterations is not None):
        raise TypeError(
            f"simulate: the source of {name} has no length, or none that can be trusted, so nobody knows where its "
            "passes end. Give the entry a length, (train, lt.iterations(1000)), or bound the run by max_iterations= "
            "alone."
        )
    return agenda.max_iterations - done.iteration
