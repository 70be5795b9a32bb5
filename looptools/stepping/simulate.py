"""Walk through a whole run without model and data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from ..checkpoints.inventory import inventory
from ..gradients import optimizers_of
from ..links import Slot
from ..middleware.backward import backward
from ..middleware.schedule import schedule
from ..middleware.update_by_closure import update_by_closure
from .foreseeing.doubles import Course, Double, Movers
from .foreseeing.foreseen import Foreseen, ForeseenAverage, foreseen
from .foreseeing.legs import Leg, legs
from .foreseeing.simulation import Pass, Simulation

if TYPE_CHECKING:
    from ..run import Run


def simulate(run: Run) -> Simulation:
    """Say what *run* will do from where it stands to its end, by its own code over stand-ins.

    No batch is fetched, no function of the workflow called, nothing drawn, written or changed. Learning rates that are
    tensors are read from their device, once.

    Raises:
        RuntimeError: If an iteration is open.
        TypeError: If a training source has no length, and where passes end matters for where the run does.
    """
    cursor = run.cursor
    if cursor.state is not None:
        raise RuntimeError("simulate: an iteration is open. Finish it first: next(run), or run.skip().")
    ended = cursor.ended or cursor.stopping
    return _Walk(run, [] if ended else legs(cursor), ended).simulation()


class _Walk:
    """A walk over the legs of a run, with stand-ins for its optimizers."""

    def __init__(self, run: Run, ahead: list[Leg], ended: str) -> None:
        cursor = run.cursor
        self.run, self.cursor, self.ahead, self.ended = run, cursor, ahead, ended
        held = inventory(cursor).optimizers
        self.doubles: dict[Any, Double] = {one: Double(one) for one in held.values()}
        self.names = {self.doubles[one]: name for name, one in held.items()}
        self.counts: dict[Double, int | None] = {
            double: cursor.progress.updates.get(one, 0) for one, double in self.doubles.items()
        }
        self.updates: dict[Double, list[Sequence[int]]] = {double: [] for double in self.names}
        slots = [slot for slot in cursor.slots if not slot.muted]
        self.parts = {seen.key: seen for seen in foreseen(slots, cursor)}
        fresh, resumed = not cursor.started, run.resumed
        self.courses = {
            id(slot): Course(slot, self.doubles[slot.part.optimizer], fresh, resumed)
            for slot in slots
            if isinstance(slot.part, schedule)
        }
        scheduled = [(course.part.option, course.double) for course in self.courses.values()]
        every = [("lr", double) for double in self.names if all("lr" in group for group in double.param_groups)]
        self.values: dict[tuple[str, Double], list[list[float]]] = {
            key: [[] for _ in key[1].param_groups] for key in dict.fromkeys([*every, *scheduled])
        }
        self.lost: dict[tuple[str, Double], set[int]] = {key: set() for key in self.values}  # groups
        self.filled = {id(slot): slot.part.filled for slot in slots if isinstance(slot.part, backward)}
        self.movers: dict[tuple[int, ...], Movers] = {}
        self.unknown: list[str] = []

    def simulation(self) -> Simulation:
        """Go to the end, and say what came."""
        done = self.cursor.progress
        begins, passes = done.iteration, list[Pass]()
        for leg in self.ahead:
            done = leg.after
            stop = self._stop(leg)
            passes.append(self._pass(leg))
            done = leg.after
            if stop:
                self.ended = stop
                break
        ahead = self.ahead[: len(passes)]
        if ahead:
            ends = [event for part in self.parts.values() for event in part.ends(ahead[-1])]
            passes[-1] = attrs.evolve(passes[-1], marks=(*passes[-1].marks, *ends))
        is_open = any(leg.open for leg in ahead)
        epochs = "1 epoch" if done.epoch == 1 else f"{'?' if is_open else done.epoch} epochs"
        return Simulation(
            begins=begins,
            passes=tuple(passes),
            curves=self._curves(),
            updates={n: _joined(self.updates[d]) for d, n in self.names.items() if self.counts[d] is not None},
            averages={p.name: p.count for p in self.parts.values() if isinstance(p, ForeseenAverage)},
            iterations=done.iteration,
            epochs=None if is_open else done.epoch,
            rounds=None if is_open else done.round,
            ended=self.ended or f"finished: {epochs}, {done.iteration} iterations",
            unknown=tuple(dict.fromkeys(self._doubts(ahead))),
        )

    def _stop(self, leg: Leg) -> str:
        """Break a leg off where a part stops the run; returns why, or nothing."""
        found = [stop for part in self._through(leg) if (stop := part.stops(leg)) is not None]
        if not found:
            return ""
        index, why = min(found, key=lambda stop: math.inf if stop[0] is None else stop[0])
        if index is not None:
            leg.cut(index)
        return why

    def _through(self, leg: Leg) -> list[Foreseen]:
        return [self.parts[id(slot)] for slot in leg.slots if id(slot) in self.parts]

    def _pass(self, leg: Leg) -> Pass:
        """Walk through one leg."""
        counts = self._windows(leg) if leg.trains else {}
        self._follow(leg, counts)
        through = self._through(leg)
        return Pass(
            phase=leg.phase,
            trains=leg.trains,
            round=leg.before.round,
            epoch=leg.epoch,
            iteration=leg.iteration,
            done=leg.before.epoch + leg.trains,
            index=leg.index,
            length=leg.length,
            whole=leg.whole,
            function=leg.function is not None,
            rows=tuple(rows for part in through for rows in part.rows(leg)),
            marks=tuple(event for part in through for event in part.marks(leg)),
        )

    # Updates

    def _windows(self, leg: Leg) -> dict[Double, Sequence[int] | None]:
        """Updates that each optimizer has made before each iteration of a leg; None if they are unknown."""
        n = leg.length or 0
        line = tuple(map(id, leg.slots))
        if line not in self.movers:
            self.movers[line] = Movers(leg.slots, self.doubles)
        movers = self.movers[line]
        windows = [slot for slot in leg.slots if isinstance(slot.part, backward)]
        for slot in windows:
            if not leg.index and not slot.part.across_epochs:
                self.filled[id(slot)] = 0
        blurred = [slot for slot in leg.slots if self._is_blurred(slot, leg)]
        for slot in blurred:
            self.unknown.append(f"{slot.name}: which iterations update is unknown")
            self.counts |= {self.doubles[one]: None for one in optimizers_of(slot.part) if one in self.doubles}
        closings = [self._closings(slot, leg, n) for slot in windows]
        if all(len(closing) == n for closing in closings):
            return self._uniform(leg, movers, n, tuple(1 for _ in closings))
        flags = []
        for closing in closings:
            column = bytearray(n)
            for at in closing:
                column[at] = 1
            flags.append(column)
        return self._varied(leg, movers, list(zip(*flags, strict=True)))

    def _is_blurred(self, slot: Slot, leg: Leg) -> bool:
        """Whether nobody can say in which iterations its optimizers move."""
        part = slot.part
        if isinstance(part, backward):
            return leg.open and part.accumulate > 1 and not part.across_epochs
        return hasattr(part, "updates_in") and not isinstance(part, update_by_closure)

    def _closings(self, slot: Slot, leg: Leg, n: int) -> Sequence[int]:
        """After which of the *n* iterations a window closes."""
        part, filled = slot.part, self.filled[id(slot)]
        found = range(max(0, part.accumulate - 1 - filled), n, part.accumulate)
        left = n - 1 - found[-1] if found else filled + n
        most = self.cursor.passes.agenda.max_iterations
        final = id(slot) in leg.final and leg.whole
        final = final or (most is not None and leg.iteration + n >= most)
        closes = final if part.across_epochs else leg.whole
        self.filled[id(slot)] = 0 if closes else left
        return [*found, n - 1] if closes and left else found

    def _uniform(self, leg: Leg, movers: Movers, n: int, closes: tuple[int, ...]) -> dict[Double, Sequence[int] | None]:
        """All iterations do the same."""
        moves = movers.moves(closes)
        leg.updating = {key: range(leg.index, leg.index + n) for key in moves.seen}
        result: dict[Double, Sequence[int] | None] = {}
        for double, before in self.counts.items():
            each = moves.of.get(double, 0)
            if before is None:
                result[double] = None
                continue
            result[double] = range(before, before + n * each, each) if each else [before] * n
            self.counts[double] = before + n * each
            at = range(leg.iteration, leg.iteration + n)
            self.updates[double].append(at if each == 1 else [i for i in at for _ in range(each)])
        return result

    def _varied(self, leg: Leg, movers: Movers, closes: list[tuple[int, ...]]) -> dict[Double, Sequence[int] | None]:
        """Each iteration does what its windows say."""
        moves = [movers.moves(which) for which in closes]
        leg.updating = {
            id(slot): [n for n, move in enumerate(moves, leg.index) if id(slot) in move.seen] for slot in leg.slots
        }
        result: dict[Double, Sequence[int] | None] = {}
        for double, before in self.counts.items():
            if before is None:
                result[double] = None
                continue
            made = [move.of.get(double, 0) for move in moves]
            *result_here, self.counts[double] = itertools.accumulate(made, initial=before)
            result[double] = result_here
            self.updates[double].append([i for i, n in enumerate(made, leg.iteration) for _ in range(n)])
        return result

    # Values

    def _follow(self, leg: Leg, counts: dict[Double, Sequence[int] | None]) -> None:
        """Move the schedules along a leg, and note what stands in the param groups."""
        n = leg.length or 0
        written: set[tuple[str, Double]] = set()
        for slot in leg.slots:
            course = self.courses.get(id(slot))
            if course is None:
                continue
            key = (course.part.option, course.double)
            if not leg.trains:  # nothing that it counts moves meanwhile
                before = self.counts[course.double]
                course.along(None if before is None else [before], 1, leg.iteration, leg.epoch)
                continue
            epoch = None if leg.open else leg.epoch
            found = course.along(counts[course.double], n, leg.iteration, epoch)
            self.lost[key] = {g for g, column in enumerate(found) if column and math.isnan(column[-1])}
            for column, values in zip(self.values[key], found, strict=True):
                column += values
            written.add(key)
        for key, columns in self.values.items() if leg.trains else ():
            option, double = key
            for g, (column, held) in enumerate(zip(columns, double.held(option), strict=True)):
                if key not in written:
                    column += [math.nan if g in self.lost[key] else held] * n

    def _curves(self) -> dict[str, dict[str, list[list[float]]]]:
        curves: dict[str, dict[str, list[list[float]]]] = {}
        for (option, double), columns in self.values.items():
            curves.setdefault(option, {})[self.names[double]] = columns
        return curves

    def _doubts(self, ahead: list[Leg]) -> Iterable[str]:
        """What cannot be foreseen."""
        through = {id(slot) for leg in ahead for slot in leg.slots}
        for key, course in self.courses.items():
            if course.unknown and key in through:
                yield f"{course.name}: the {course.part.option} is unknown: {course.unknown}"
        yield from self.unknown
        for key, part in self.parts.items():
            yield from part.unknown if key in through else ()
        for leg in ahead:
            if leg.function is not None:
                yield f"workflow: {leg.phase}(run) is not called, whatever it does"
            elif leg.open:
                yield (
                    f"{leg.phase}: its source has no length, so where passes end is unknown, with all that happens "
                    "there: validation, rows and checkpoints"
                )
            elif leg.length is None:
                yield f"{leg.phase}: its source has no length"


def _joined(pieces: list[Sequence[int]]) -> Sequence[int]:
    """One list of several, or the one that there is."""
    return pieces[0] if len(pieces) == 1 else list(itertools.chain.from_iterable(pieces))
