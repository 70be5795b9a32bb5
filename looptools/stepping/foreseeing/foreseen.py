"""What parts will do, and at which iterations, as far as that hangs on where the run stands alone."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

from ...archives.files import free_name, stem_of
from ...checkpoints.best import stems
from ...checkpoints.manifest import MANIFEST, Broken, read_list
from ...cursor import Cursor
from ...intervals import epochs, iterations, rounds, samples, seconds, target
from ...links import Slot
from ...middleware.checkpoint import checkpoint
from ...middleware.early_stop import early_stop
from ...middleware.ema import ema
from ...middleware.freeze import freeze
from ...middleware.log import log
from ...middleware.nan_guard import nan_guard
from ...middleware.stop_after import stop_after
from ...middleware.swa import swa
from ...middleware.update import update
from ...options import given
from ...state import Progress
from .legs import Leg
from .simulation import Event, Rows

COUNTED = (iterations, epochs, rounds)


def due(every: Any, leg: Leg) -> Sequence[int | None] | None:
    """The indices at which an interval is due; None if that hangs on more than where the run stands."""
    if type(every) is iterations:
        if not leg.trains or leg.length is None:
            return ()
        first = -(leg.iteration + 1) % every.n
        return range(leg.index + first, leg.index + leg.length, every.n)
    if type(every) in (epochs, rounds):
        return (leg.last,) if leg.whole and every(leg.state(leg.last)) else ()
    return None


def hangs_on(interval: Any) -> str:
    """What an interval that cannot be foreseen looks at."""
    words = {seconds: "on time", samples: "on the sizes of batches", target: "on results"}
    return words.get(type(interval), "on a function of the state")


class Foreseen:
    """What one part of the run will do.

    Args:
        slot: Its place.
        cursor: The run's machine.
    """

    def __init__(self, slot: Slot, cursor: Cursor) -> None:
        self.name = slot.name
        self.key = id(slot)
        self.part: Any = slot.part
        self.unknown: list[str] = []
        self.begin(cursor)

    def begin(self, cursor: Cursor) -> None:
        """Stand where the part stands."""

    def stops(self, leg: Leg) -> tuple[int | None, str] | None:
        """After which index the run ends in this pass, and why."""

    def rows(self, leg: Leg) -> Iterator[Rows]:
        """The rows that it writes in this pass."""
        yield from ()

    def marks(self, leg: Leg) -> Iterator[Event]:
        """What else it does in this pass."""
        yield from ()

    def ends(self, leg: Leg) -> Iterator[Event]:
        """What it does when the run ends, behind the pass that was the last one."""
        yield from ()

    def event(self, kind: str, leg: Leg, index: int | None, text: str) -> Event:
        """What it does at one state."""
        iteration = leg.iteration_at(index)
        return Event(kind, leg.phase, leg.epoch, iteration, index, self.name, text)

    def about(self, text: str) -> None:
        """Note what cannot be foreseen."""
        self.unknown.append(f"{self.name}: {text}")


class ForeseenLog(Foreseen):
    """`log`: its rows."""

    def begin(self, cursor: Cursor) -> None:
        if type(self.part.every) not in COUNTED:
            self.about(f"when it writes its rows within passes hangs {hangs_on(self.part.every)}")

    def rows(self, leg: Leg) -> Iterator[Rows]:
        at = due(self.part.every, leg)
        yield Rows(self.name, at or (), leg.whole)


class ForeseenCheckpoint(Foreseen):
    """`checkpoint`: its files, by name."""

    def begin(self, cursor: Cursor) -> None:
        part = self.part
        self.trained = part._saver.trained
        self.names: list[str] = []
        resumed = cursor.resumed_from is not None and cursor.resumed_from.parent.resolve() == part.folder.resolve()
        if resumed and not cursor.started:
            self.trained = cursor.progress.iteration
        if resumed or cursor.started:
            with contextlib.suppress(OSError, Broken):
                listed = read_list(part.folder / MANIFEST).checkpoints
                self.names = [entry["file"] for entry in listed if (part.folder / entry["file"]).exists()]
        if type(part.every) not in COUNTED:
            self.about(f"when it saves hangs {hangs_on(part.every)}")
        for metric, stem in stems(part.best).items():
            self.about(f"{stem}.pt is written when {metric} is better than before")

    def marks(self, leg: Leg) -> Iterator[Event]:
        for index in due(self.part.every, leg) or ():
            within = Progress(epoch=leg.before.epoch, iteration=leg.iteration_at(index) + 1)
            yield self.save(leg, index, leg.after if leg.whole and index == leg.last else within)

    def save(self, leg: Leg, index: int | None, done: Progress) -> Event:
        """A file, by its name if that is known."""
        self.trained = done.iteration
        if leg.open:
            return self.event("checkpoint", leg, index, "")
        name = free_name(stem_of(done), set(self.names))
        self.names.append(name)
        if self.part.keep:
            del self.names[: -self.part.keep]
        return self.event("checkpoint", leg, index, name)

    def ends(self, leg: Leg) -> Iterator[Event]:
        known = type(self.part.every) in COUNTED
        wanted = known if self.part.at_end is None else self.part.at_end
        if wanted and known and self.trained != leg.after.iteration:
            yield self.save(leg, leg.last, leg.after)


class ForeseenFreeze(Foreseen):
    """`freeze`: when it begins, and when it thaws."""

    def begin(self, cursor: Cursor) -> None:
        self.part = copy.copy(self.part)  # its flags are neither read nor put back here
        self.names = ", ".join(self.part.names)
        self.told = False
        self.known = self.part.until is None or type(self.part.until) in COUNTED
        if not self.known and not self.part.thawed:
            self.about(f"when it thaws {self.names} hangs {hangs_on(self.part.until)}")

    def is_over(self, done: Progress) -> bool:
        return self.known and self.part._is_over(cast(Any, SimpleNamespace(progress=done)))

    def marks(self, leg: Leg) -> Iterator[Event]:
        part = self.part
        if part.thawed:
            return
        if self.is_over(leg.before):
            part.thawed = True
            if self.told:
                yield self.event("thaw", leg, leg.index, f"{self.names}, before this pass")
            return
        if not self.told:
            self.told = True
            yield self.event("freeze", leg, leg.index, self.names)
        if self.is_over(leg.after):
            part.thawed = True
            within = type(part.until) is iterations
            index = leg.index + part.until.n - 1 - leg.iteration if within else leg.last
            yield self.event("thaw", leg, index, self.names)


class ForeseenAverage(Foreseen):
    """`ema`, by arithmetic, and `swa`, by asking it."""

    def begin(self, cursor: Cursor) -> None:
        self.part = copy.copy(self.part)
        self.count = 0
        if isinstance(self.part, swa) and type(self.part.every) not in COUNTED:
            self.about(f"when it averages hangs {hangs_on(self.part.every)}")

    def marks(self, leg: Leg) -> Iterator[Event]:
        if not leg.trains:
            return
        at = list(self._ema(leg) if isinstance(self.part, ema) else self._swa(leg))
        if at and not self.count:
            yield self.event("average", leg, at[0], "its first one")
        self.count += len(at)

    def _ema(self, leg: Leg) -> Sequence[int]:
        part, length = self.part, leg.length or 0
        by_update = part.by == "update"
        at = leg.updating.get(self.key, ()) if by_update else range(leg.index, leg.index + length)
        done = part.updates if by_update else leg.iteration
        if by_update:
            part.updates += len(at)
        first = part.start + part.every * max(1, -(-(done + 1 - part.start) // part.every))
        return at[first - done - 1 :: part.every]

    def _swa(self, leg: Leg) -> Iterator[int]:
        part = self.part
        every = range(leg.index, leg.index + (leg.length or 0)) if type(part.every) is iterations else [leg.last]
        for index in every if type(part.every) in COUNTED else ():
            state = leg.state(index)
            if index is not None and part._has_begun(state) and part._is_due(state):
                yield index


class ForeseenStop(Foreseen):
    """`stop_after`: where the run ends."""

    def begin(self, cursor: Cursor) -> None:
        self.part = copy.copy(self.part)
        if type(self.part.when) not in COUNTED:
            self.about(f"when it stops the run hangs {hangs_on(self.part.when)}; it is taken not to")

    def stops(self, leg: Leg) -> tuple[int | None, str] | None:
        when, said = self.part.when, list[str]()
        if type(when) not in COUNTED:
            return None
        index = leg.last
        if type(when) is iterations and leg.trains:
            index = max(leg.index, leg.index + when.n - 1 - leg.iteration)
        if index is None or leg.last is None or index <= leg.last:
            for _ in self.part([leg.state(index, SimpleNamespace(stop=said.append))]):  # the part's own code
                pass
        return (index, said[0]) if said else None


class ForeseenGuess(Foreseen):
    """Parts that may end the run or drop batches, by what they see; they are taken not to."""

    def begin(self, cursor: Cursor) -> None:
        if isinstance(self.part, early_stop):
            self.about(f"whether it stops the run hangs on {self.part.best.metric}; it is taken not to")
        elif isinstance(self.part, nan_guard):
            if self.part.skip:
                self.about("it may drop batches; it is taken not to")
        elif getattr(self.part, "scaler", None) is not None:
            self.about("its GradScaler may skip updates; it is taken not to")
        else:
            self.about(f"it is your own, and taken to hand on every state ({given(self.part) or 'no options'})")


def foreseen(slots: Iterable[Slot], cursor: Cursor) -> list[Foreseen]:
    """One for each part of which something can be said."""
    return [kind(slot, cursor) for slot in slots if not slot.muted and (kind := _kind(slot.part)) is not None]


def _kind(part: Any) -> type[Foreseen] | None:
    if not f"{getattr(part, '__module__', '')}.".startswith("looptools."):
        return ForeseenGuess
    for kind, found in KINDS.items():
        if isinstance(part, kind):
            return found
    return ForeseenGuess if isinstance(part, update) and part.scaler is not None else None


KINDS: dict[Any, type[Foreseen]] = {
    log: ForeseenLog,
    checkpoint: ForeseenCheckpoint,
    freeze: ForeseenFreeze,
    ema: ForeseenAverage,
    swa: ForeseenAverage,
    stop_after: ForeseenStop,
    early_stop: ForeseenGuess,
    nan_guard: ForeseenGuess,
}
