"""The machine: takes one state after another through the parts, and survives what they raise.

A pass has a line of parts: those of its phase, then those of the run. Each is a generator over its own link.
To push a state through a part, its link is filled and the part is asked for its next state; nothing is nested.
So an exception ends one generator only, tracebacks are short, and the cursor knows at any time which part comes
next: `state` and `at` are all there is to know between two parts.
"""

from __future__ import annotations

import signal
from _signal import getsignal  # type: ignore[import-not-found]  # C; the wrapper in signal makes 7 calls of it
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import get_ident
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from torch import is_autocast_enabled, is_grad_enabled, is_inference_mode_enabled

from .agenda import Agenda
from .failures import Failed, add_notes, asked_by, not_the_state, stopped_by_user_code, what_now
from .interrupts import MAIN, interrupts
from .links import Slot, close_streams, raise_all
from .modes import put_back
from .passes import Passes
from .phases import Phase
from .pipeline import Middleware, flatten, fresh, name_of, numbered
from .state import Progress, State

if TYPE_CHECKING:
    from .run import Run

T = TypeVar("T")


class Cursor:
    """Where a run stands, and how it gets on."""

    def __init__(self, run: Run, agenda: Agenda, middlewares: Iterable[Middleware], progress: Progress) -> None:
        self.run = run
        self.progress = progress
        self.passes = Passes(agenda, progress)
        self.state: State | None = None  # the open iteration; None at a boundary
        self.at = 0  # number of the part of the line that comes next
        self.line: list[Slot] = []
        self.failed: Failed | None = None
        self.handed: State | None = None  # the last one that was finished
        self.unseen: State | None = None  # finished, but Ctrl-C came before it could be handed out
        self.at_boundary: list[Callable[[Run], Any]] = []
        self.keeper: Any = None  # keeps the run's state in memory, if that was asked for
        self.unsure: Callable[[], None] | None = None  # asks, before each iteration, whether anybody trains
        self.stopping = ""
        self.ended = ""
        self.started = False
        self.resumed_from: Path | None = None
        self.began = self.began_before = self.fetched = 0.0  # seconds: this iteration, the one before, its batch
        self.hears = self._counted = self._closing = self._working = False  # hears: signals' handlers were set for it
        self._entered = 0.0
        self._samples = 0  # before the open iteration
        self.lines = {id(phase): self._line(phase) for phase in agenda.phases}
        parts = list(flatten(middlewares))
        names = numbered(name for name, _ in parts)
        self.run_slots = [
            Slot(f"run/{name}", fresh(part), self._refill, True) for name, (_, part) in zip(names, parts, strict=True)
        ]

    def _line(self, phase: Phase) -> list[Slot]:
        name = self.passes.names[id(phase)]
        return [Slot(f"{name}/{part_name}", part, self._refill, False) for part_name, part in phase.parts()]

    @property
    def slots(self) -> list[Slot]:
        """All parts of the run, those of the phases first."""
        return [*(slot for line in self.lines.values() for slot in line), *self.run_slots]

    @property
    def part_names(self) -> list[str]:
        """Full names of the parts of the pass under way, its batches first."""
        return [f"{self.passes.plan.phase}/batches", *(slot.name for slot in self.line)]

    # Getting on

    def work(self, action: Callable[[], T]) -> T:
        """Do *action* as the run's own work: meanwhile Ctrl-C waits, and nobody else may enter.

        Raises:
            RuntimeError: If the run is at work already.
        """
        if self._working and interrupts.calls(self) > 1:  # a Ctrl-C as it ended may have left the mark behind
            raise RuntimeError("run: it is at work already, within this iteration or in another thread.")
        deaf = not self.hears or getsignal(signal.SIGINT) is not interrupts.handler
        if deaf and get_ident() == MAIN and not self.ended:  # at the end nobody would put the handler before it back
            interrupts.install(self)
        modes = is_grad_enabled(), is_inference_mode_enabled(), is_autocast_enabled("cpu"), is_autocast_enabled("cuda")
        self._entered = perf_counter() - self.progress.seconds
        self._working = True
        try:
            if self.keeper is not None and self.state is not None:
                self.keeper.entered(self.state)
            return action()
        except BaseException:
            put_back(modes)  # a `with` that Ctrl-C struck as it was left may not have
            raise
        finally:
            if self.keeper is not None and self.state is not None:
                self.keeper.left(self.state)
            self.progress.seconds = perf_counter() - self._entered
            self._working = False

    def require_rest(self, verb: str) -> None:
        """Refuse a *verb* that closes parts while one of them is at work."""
        if self._working and interrupts.calls(self):
            raise RuntimeError(f"{verb}: the run is at work, within this iteration. End it with state.stop(...).")

    @property
    def seconds(self) -> float:
        """Seconds at work until now."""
        return perf_counter() - self._entered if self._working else self.progress.seconds

    def iterate(self) -> State:
        """Finish the open iteration, or do the next one, and return its state.

        Raises:
            StopIteration: At the end of the run.
        """
        state = self.unseen
        if state is not None:
            self.unseen = None
            return state
        if self.failed is not None:
            self.go_on()
        while self.state is not None or self.begin():
            self.advance()
            state = self.state
            if state is None:  # the run ended while a part that dropped its state asked for another
                continue
            self.finish()
            self.unseen = None if state.dropped else state  # whatever strikes now, it will be handed out
            if interrupts.pending:
                interrupts.deliver(self)
            if not state.dropped:
                self.unseen = None
                return state
        self.conclude()
        raise StopIteration

    def begin(self) -> bool:
        """Fetch a batch and open its iteration; False at the end of the run, which `conclude` then closes."""
        if self.unsure is not None and not self.ended:
            self.unsure()
        if self.ended or self.stopping:
            return False
        if not self.started:
            self.start()
        if self.keeper is not None:
            self.keeper.at_boundary()
        if self.passes.phase is None and not self._open_pass():
            return False
        if self.keeper is not None:
            self.keeper.fetching()
        self.began_before, self.began = self.began, perf_counter() - self._entered
        self.at, self._counted, self._samples = 0, False, self.progress.samples
        try:
            self.state = self.passes.fetch(self.run)
        except BaseException as error:
            self.state = self.passes.unfetch(error)
            raise self._fail(f"{self.passes.plan.phase}/batches", error)
        self.fetched = perf_counter() - self._entered
        if self.keeper is not None:
            self.keeper.fetched(self.state)
        return True

    def advance(self, until: Slot | None = None) -> None:
        """Give the open state to the parts that come next, up to *until*; or to all of them."""
        while self.state is not None and self.at < len(self.line):
            slot = self.line[self.at]
            if slot is until or slot.waiting:
                return
            if self.state.dropped and not slot.closes:  # only who closes the pass learns of its end
                self.at += 1
                continue
            slot.link.state = self.state
            try:
                out = next(slot.begin() if slot.stream is None else slot.stream)
                if out is not self.state or slot.link.state is not None:  # one that drops states has moved self.state
                    raise not_the_state(slot.name, out)
                self.at += 1  # from here on the part has done its work
            except StopIteration:
                self._stream_ended(slot)
            except BaseException as error:
                raise self._fail(slot.name, error, slot)

    def finish(self) -> None:
        """The boundary: count the iteration, then do what parts asked to be done here."""
        state = self.state
        assert state is not None
        try:
            if not self._counted:  # if Ctrl-C strikes in here, all of it is done once more
                if state.last:
                    self.passes.end(state)
                if state.trains:
                    self.progress.iteration = state.iteration + 1
                    self.progress.samples = self._samples + (0 if state.dropped else state.num_samples)
                self.passes.mark, self.passes.ready = None, None
                self._counted = True
            while self.at_boundary:
                self.at_boundary[0](self.run)
                del self.at_boundary[0]
        except BaseException as error:
            raise self._fail(asked_by(self.at_boundary, self.slots), error)
        if not state.dropped:
            self.handed = state
        self.state, self.at = None, 0

    def start(self) -> None:
        """From here on the run has begun: files may be written."""
        for slot in () if self.started else self.slots:
            if hasattr(slot.part, "on_start") and not slot.muted:  # else when it hears again
                slot.part.on_start(self.run)
        self.started = True

    def _open_pass(self) -> bool:
        """Go on to the next pass; False if there is none."""
        self.close(slot for slot in self.slots if not slot.of_run)  # those that were muted meanwhile too
        self.line = []
        while (entry := self.passes.upcoming()) is not None and not self.stopping:
            phase = entry.phase
            try:
                if isinstance(phase, Phase):
                    self.passes.set_out(entry, phase, self.seconds)
                    self.line_up(phase)
                    for slot in self.line:
                        if hasattr(slot.part, "on_pass"):
                            slot.part.on_pass(self.run)
                    return True
                phase(self.run)
                self.passes.place.done += 1
            except BaseException as error:
                self.passes.turn_back()
                name = f"{phase.name}/batches" if isinstance(phase, Phase) else f"workflow/{name_of(phase)}"
                raise self._fail(name, error)
        return False

    def line_up(self, phase: Phase) -> None:
        """Put the parts that a pass of *phase* goes through beside each other."""
        self.line = [slot for slot in (*self.lines[id(phase)], *self.run_slots) if not slot.muted]

    def conclude(self) -> None:
        """There is no further iteration: end the run, if it has not ended yet."""
        if not self.ended:
            for slot in self.slots:
                if hasattr(slot.part, "on_end") and not slot.muted:
                    slot.part.on_end(self.run)
            epochs = "1 epoch" if self.progress.epoch == 1 else f"{self.progress.epoch} epochs"
            self.end(self.stopping or f"finished: {epochs}, {self.progress.iteration} iterations")

    def is_last(self, state: State) -> bool:
        """What ``state.last`` asks."""
        if state is not self.state:
            return False  # asked of a state that was overtaken
        if self.keeper is not None and self.passes.is_unknown:
            self.keeper.fetching()
        try:
            return self.passes.is_last()
        except BaseException as error:
            raise self._fail(f"{self.passes.plan.phase}/batches", error)

    def stop(self, why: str) -> None:
        """End the run at the next boundary."""
        self.stopping = self.stopping or why

    # What parts may do instead of handing their state on

    def _refill(self, slot: Slot) -> State:
        """*slot* asks again: it dropped the open state. Give it the next one.

        Raises:
            StopIteration: If there is none in its scope; this ends the part's loop.
        """
        if slot.starting:
            raise TypeError(f"{slot.name} asked for a state before it returned an iterator. Does it `yield state`?")
        dropped = self.state
        if self._closing or dropped is None:
            raise StopIteration
        last = dropped.last  # may fetch a batch, and fail: then the state comes once more
        dropped.dropped = True
        if last and not slot.of_run:
            raise StopIteration
        slot.waiting = True
        try:
            if last:
                self.at = self.line.index(slot) + 1  # those behind it still learn that the pass has ended
                self.advance()
            if self.state is dropped and (not dropped.last or self.at >= len(self.line)):
                self.finish()
                if self.begin():
                    self.advance()
        finally:
            slot.waiting = False
        state = self.state  # none: the run is over; of another part: that one waits for it, or ended the pass
        if state is None or self.line[self.at : self.at + 1] != [slot] or (state.dropped and not slot.closes):
            raise StopIteration
        return state

    def _stream_ended(self, slot: Slot) -> None:
        """A part's loop is over: its pass ends with the open state, which it dropped; or the run does."""
        slot.forget()
        state = self.state
        if state is None or self.line[self.at : self.at + 1] != [slot]:
            return
        state.dropped = True
        if slot.of_run:
            self.stop(f"{slot.name} ended the stream")
            self.at = self.line.index(slot) + 1 if state.last else len(self.line)
        else:
            state.last = True
            state.round_last = self.passes.is_round_last()
            self.at = self.line.index(slot) + 1

    # Failing and closing

    def _fail(self, name: str, error: BaseException, slot: Slot | None = None) -> BaseException:
        """Remember what failed, say so in notes on the exception, and return it to be raised."""
        if slot is not None:
            slot.forget()
        if self.failed is not None and self.failed.exception is error:
            return error  # on its way out through a part that had asked for another state
        error = stopped_by_user_code(name, error)
        interrupts.failed()  # this stops the run already
        kept = self.keeper is not None and self.keeper.undoes
        self.failed = Failed(name, self.state, error, what_now(name, self.state, slot is not None, kept), self.line)
        rolled_back = self.keeper is not None and self.keeper.failed(self.failed, slot)
        add_notes(self.failed, self.part_names, self.progress, slot, kept=kept, rolled_back=rolled_back)
        return error

    def overcome(self, *, again: bool = False) -> None:
        """The failure, if there is one, is behind: nothing keeps its iteration alive.

        Args:
            again: Whether what failed is done once more; then it is said if that has been redefined but not replaced.
        """
        failed, self.failed = self.failed, None
        if failed is not None:
            failed.overcome(again=again)

    def go_on(self) -> None:
        """After a failure: stand where the part that failed says that it can be redone from."""
        self.overcome(again=True)
        if self.keeper is not None:
            self.keeper.go_on()
        if self.state is not None and self.at < len(self.line):
            origin = getattr(self.line[self.at].part, "redo_from", None)
            self.at = max((n for n in range(self.at) if self.line[n].short == origin), default=self.at)

    def close(self, slots: Iterable[Slot]) -> None:
        """Close the generators of *slots*.

        Raises:
            BaseException: What they raised; all are closed all the same.
        """
        self._closing = True
        try:
            raise_all(close_streams(slots))
        finally:
            self._closing = False

    def end(self, why: str) -> None:
        """The run is over: drop what is open, and close every part."""
        self.ended = why
        self.overcome()
        self.state = self.unseen = self.passes.mark = self.passes.ready = None
        self.at_boundary.clear()
        self.at = 0
        self.rest()

    def rest(self) -> None:
        """Close all generators, flush and close files, let workers go. The next iteration starts them again."""
        errors: list[BaseException] = []
        slots = self.slots
        closers = [slot.part.close for slot in slots if hasattr(slot.part, "close")]
        releasers = [source.release for source in self.passes.sources.values()]
        for close in [lambda: self.close(slots), *closers, *releasers, lambda: interrupts.release(self)]:
            try:
                close()
            except BaseException as error:
                errors.append(error)
        raise_all(errors)


interrupts.work = Cursor.work.__code__
