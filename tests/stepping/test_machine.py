"""Anything in any order: the same bits as the plain loop that does once each what was really done."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import attrs
import torch
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from loops import Planted
from plainly import EPOCHS, NORM, TRAIN, Case, Op, Plainly, Trips, built, by_hand, differences, facts_of, line, step_of

import looptools as lt
from looptools.links import Link

LONG = int(os.environ.get("LOOPTOOLS_MACHINE", "0"))  # examples, for a long campaign: other ones each time

CASES = st.builds(
    Case,
    snapshots=st.sampled_from([(3, 4, True), (1, 3, True), (50, 2, True), (4, 9, True), (2, 4, False), None]),
    optimizer=st.sampled_from(["SGD", "AdamW"]),
    accumulate=st.sampled_from([1, 2]),
    scaler=st.booleans(),
    length_known=st.booleans(),
    validates=st.booleans(),
    draws=st.booleans(),
    own_generator=st.booleans(),
    drops=st.sampled_from(["", "", "early", "late"]),
    schedule=st.booleans(),
)
PLACES = ["loader", "model", "loss", "schedule", "gradient", "own", "clip", "optimizer", "moved", "ema", "sink"]
PLACES += ["boundary", *(f"into {name}" for name in [*line(Case(drops="late"), True)])]
TRIPS = st.none() | st.builds(
    lambda where, what, after: (where, what, after),
    st.sampled_from(PLACES),
    st.sampled_from(["raise", "press", "press twice"]),
    st.sampled_from([0, 0, 1, 2]),
)
HANDS = st.sampled_from(["weight", "buffer", "lr", "decay", "gradient", "draw"])
VALUES = st.sampled_from([0.5, 1.5])
STOPS = ["forward", "drops", "schedule_lr", "backward", "own", "clip_grad_norm", "update", "ema", "average", "log"]
DRAWN = "torch", "python", "numpy", "order"
NEVER = "cannot be undone", "next(run) and run.retry() call the step again"


@attrs.define(eq=False)
class Batch:
    """What was done with one batch, and what became of it: handed, dropped (by a part) or skipped (by the user)."""

    number: int
    before: list[Op]
    did: list[Op] = attrs.field(factory=list)
    fate: str = ""

    def script(self) -> list[Op]:
        return [*self.before, *self.did]


class Machine(RuleBasedStateMachine):
    """A run on one side, a list of what it has done on the other."""

    # Setting up

    @initialize(case=CASES)
    def build(self, case: Case) -> None:
        self.handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.case, self.trips = case, Trips()
        self.clean = contextlib.ExitStack()
        self.clean.enter_context(mock.patch.object(Link, "__next__", self._tripping(Link.__next__)))
        self.clean.enter_context(
            mock.patch("torch.nn.utils.clip_grad_norm_", self._clipping(torch.nn.utils.clip_grad_norm_))
        )
        self.version, self.max_norm, self.muted = 0, NORM, False
        self.run, self.bench = built(case, self.trips)
        self.plain = Plainly(case)
        self.done: list[Batch] = []
        self.open: Batch | None = None
        self.before: list[Op] = []  # by hand, since the last iteration
        self.settled = 0  # how many of them were there before the run went back here
        self.at = 0  # the part that comes next
        self.failed = self.rolled_back = self.unseen = self.inexact = False
        self.half: tuple[Batch | None, int] | None = None  # the place of a part that has done its work by half

    def _tripping(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        trips = self.trips

        def __next__(link: Any) -> Any:
            if link.state is not None:
                trips(f"into {link._slot.short}")
            return original(link)

        return __next__

    def _clipping(self, original: Callable[..., Any]) -> Callable[..., Any]:
        trips = self.trips

        def clip_grad_norm_(params: Any, *options: Any) -> Any:
            if trips.due("clip"):
                params[0].grad.mul_(0.5)
                trips("clip")
                params[0].grad.mul_(2.0)
            return original(params, *options)

        return clip_grad_norm_

    def teardown(self) -> None:
        if not hasattr(self, "clean"):
            return
        try:
            self.close()
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        finally:
            self.clean.close()
            signal.signal(signal.SIGINT, self.handler)

    # What is known of it

    @property
    def rolls_back(self) -> bool:
        return self.case.snapshots is not None and self.case.snapshots[2]

    def place(self, number: int) -> tuple[bool, int, int]:
        """Whether batch *number* of the run is one to train with, its pass, and its number there."""
        passes, index = divmod(number, self.case.round)
        return (True, passes, index) if index < TRAIN else (False, passes, index - TRAIN)

    def iteration(self, number: int) -> int:
        """Training iterations before batch *number*."""
        passes, index = divmod(number, self.case.round)
        return passes * TRAIN + min(index, TRAIN)

    def starts(self, number: int, iteration: int) -> bool:
        return self.place(number)[0] and self.iteration(number) == iteration

    @property
    def total(self) -> int:
        return EPOCHS * self.case.round

    def parts(self, number: int) -> list[str]:
        return line(self.case, self.place(number)[0])

    def is_last(self, number: int) -> bool:
        trains, _, index = self.place(number)
        return index + 1 == (TRAIN if trains else self.case.round - TRAIN)

    def number_of(self, state: lt.State) -> int:
        return state.epoch * self.case.round + state.index + (0 if state.trains else TRAIN)

    def stands(self) -> int:
        """Number of the batch that the run is at, or that comes next."""
        cursor, progress = self.run.cursor, self.run.progress
        if cursor.state is not None:
            return self.number_of(cursor.state)
        begun = progress.round * self.case.round
        if progress.epoch > progress.round:
            begun += TRAIN
        return begun + (0 if cursor.passes.phase is None else cursor.passes.index)

    # What it does, said once more

    def begin(self) -> Batch:
        assert self.open is None
        self.open = Batch(len(self.done), self.before)
        self.open.before.append(("fetch",))
        self.before, self.settled, self.at = [], 0, 0
        return self.open

    def part(self) -> None:
        """The next part does its turn."""
        batch, name = self.open, self.parts(self.open.number)[self.at]
        self.at += 1
        if batch.fate:  # dropped: who closes a pass still learns of its end
            if name in ("average", "log", "asks") and self.is_last(batch.number):
                batch.did.append(("unaveraged",) if name == "average" else (name,))
        elif name == "drops":
            if self.case.drops_it(self.iteration(batch.number)):
                batch.fate = "dropped"
                batch.did.append(("look_ahead",))
        elif name != "clip_grad_norm" or not self.muted:
            how = {"forward": (self.version,), "clip_grad_norm": (self.max_norm,)}
            batch.did.append((name, *how.get(name, ())))

    def count(self) -> None:
        """The boundary: the iteration is counted first."""
        if not any(op[0] == "over" for op in self.open.did):
            self.open.did.append(("over", not self.open.fate))

    def finish(self) -> None:
        batch = self.open
        self.count()
        batch.did += [("boundary",)] if ("asks",) in batch.did else []
        batch.fate = batch.fate or "handed"
        self.done.append(batch)
        self.open, self.failed, self.rolled_back, self.at = None, False, False, 0

    def complete(self) -> None:
        """Finish the open iteration, or do the next one; one more for each that a part drops."""
        handed = False
        while not handed:
            batch = self.open or self.begin()
            while self.at < len(self.parts(batch.number)):
                self.part()
            self.finish()
            handed = batch.fate == "handed"
            if len(self.done) == self.total:
                return

    def going_on(self) -> None:
        """After a failure, a backward is redone from the forward."""
        parts = [] if self.open is None or not self.failed else self.parts(self.open.number)
        if self.at < len(parts) and parts[self.at] == "backward":
            assert not self.rolls_back
            self.at = 0
        self.failed = self.rolled_back = False

    def catch_up(self, rolled_back: bool = False) -> None:
        """Get where the run stands."""
        cursor, number = self.run.cursor, self.stands()
        assert number >= len(self.done), (number, len(self.done))
        while len(self.done) < number:
            batch = self.open or self.begin()
            self.part() if self.at < len(self.parts(batch.number)) else self.finish()
        if cursor.state is None:
            assert self.open is None
            return
        if self.open is None:
            self.begin()
        parts = self.parts(number)
        if rolled_back:
            self.open.did, self.at, self.rolled_back = [], 0, True
            return
        over = cursor.at >= len(cursor.line)
        until = len(parts) if over else parts.index(cursor.line[cursor.at].short)
        while self.at < until:
            self.part()
        assert self.at == until or self.muted, (self.at, until)

    # Verbs, and what may come of them

    def go(self, verb: Callable[[], Any], trip: tuple[str, str, int] | None = None) -> tuple[Any, BaseException | None]:
        self.trips.arm(*(trip or ()))
        self.samples = trip[2] if trip else 0  # samples of the batch in front of one that cannot be loaded
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return verb(), None
            except (Planted, KeyboardInterrupt, LookupError) as error:
                return None, error
            except RuntimeError as error:
                if not str(error).startswith(("retry:", "skip:", "back:", "replay:")):
                    raise
                return None, error
            finally:
                self.trips.arm(hit=self.trips.hit)

    def handed(self, state: lt.State) -> None:
        """A state came out; each comes once."""
        if self.unseen:
            assert self.number_of(state) == self.done[-1].number
            self.unseen = False
            return
        self.complete()
        assert self.done[-1].number == self.number_of(state)
        assert not state.replayed

    def struck(self, error: BaseException | None, *, hands_out: bool = True) -> None:
        """Something was raised, or nothing: see where the run stands."""
        failed, before, self.unseen = self.run.failed, len(self.done), False
        if self.trips.hit == "loader" and self.case.draws and self.case.snapshots is None:
            self.inexact = True  # what the first samples of the batch have drawn is drawn
        notes = " ".join(getattr(error, "__notes__", [])) if failed is not None else ""
        rolled_back = "It was rolled back" in notes
        assert self.rolls_back or not rolled_back
        self.catch_up(rolled_back)
        if error is None or failed is None:
            finished = error is not None and self.open is None and len(self.done) > before
            self.unseen = finished and hands_out and self.done[-1].fate == "handed"
            return
        self.failed, middle = True, not self.trips.hit.startswith("into")
        self.half = (self.open, self.at) if middle else self.half
        note(f"{failed.part}: {notes}")
        if self.open is None:
            self.settled, self.broken = len(self.before), self.samples
            if self.run.cursor.passes.phase is not None and self.run.cursor.passes.index == 0:
                self.before += [("begin_pass",)] if ("begin_pass",) not in self.before else []
        elif self.at == len(self.parts(self.open.number)):
            self.count()
        elif not rolled_back:
            told = any(words in notes for words in NEVER)
            assert not (told and self.rolls_back), notes
            self.inexact = self.inexact or (middle and (told or "stays changed" in notes))

    # Rules: going on

    def walk(self, states: Iterator[lt.State], trip: Any) -> None:
        found: list[lt.State] = []
        self.going_on()
        _, error = self.go(lambda: found.extend(states), trip)
        for state in found:
            self.handed(state)
        self.struck(error)

    @rule(trip=TRIPS)
    def next(self, trip: Any) -> None:
        self.walk(itertools.islice(iter(lambda: next(self.run, None), None), 1), trip)

    @rule(n=st.integers(1, 4), trip=TRIPS)
    def take(self, n: int, trip: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            states = self.run.take(n)
        self.walk(states, trip)

    @rule(index=st.integers(0, 2), trip=TRIPS)
    def until(self, index: int, trip: Any) -> None:
        self.going_on()
        state, error = self.go(lambda: self.run.until(lambda state: state.index == index), trip)
        self.struck(error)
        assert state is None or self.number_of(state) == self.done[-1].number

    # Rules: part by part

    @rule(count=st.integers(1, 13), trip=TRIPS)
    def stages(self, count: int, trip: Any) -> None:
        self.going_on()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stages = self.run.stages()
        _, error = self.go(lambda: list(itertools.islice(stages, count)), trip)
        self.struck(error, hands_out=False)

    @rule(verb=st.sampled_from(["before", "after"]), name=st.sampled_from(STOPS), trip=TRIPS)
    def stop_at(self, verb: str, name: str, trip: Any) -> None:
        if name not in line(self.case, True) or (self.muted and name == "clip_grad_norm"):
            return
        self.going_on()
        state, error = self.go(lambda: getattr(self.run, verb)(name), trip)
        self.struck(error, hands_out=False)
        if state is not None:
            assert state is self.run.cursor.state
            parts = self.parts(self.open.number)
            assert parts[self.at - (verb == "after")] == name or (self.muted and parts[self.at - 2] == name)

    # Rules: once more, or not at all

    @rule(trip=TRIPS)
    def retry(self, trip: Any) -> None:
        batch, complete = self.open, self.is_complete and self.failed
        state, error = self.go(self.run.retry, trip)
        if isinstance(error, RuntimeError):
            assert batch is None or complete or not self.rolls_back
            return
        if self.rolls_back and not self.rolled_back:
            batch.did = []
        batch.fate, self.at, self.failed, self.rolled_back = "", 0, False, False
        if state is not None:
            self.handed(state)
        self.struck(error)

    @property
    def is_complete(self) -> bool:
        """Whether the open iteration is through with all of its parts."""
        return self.open is not None and self.at == len(self.parts(self.open.number))

    @rule()
    def skip(self) -> None:
        if self.failed and self.open is not None and self.run.failed.part.endswith("batches"):
            return  # a batch is passed over without an iteration; the pass is a shorter one then
        batch, failed, complete = self.open, self.failed, self.is_complete
        _, error = self.go(self.run.skip)
        if isinstance(error, RuntimeError):
            assert batch is None
            assert not failed
            return
        if complete:
            self.count()
            batch.did.remove(("asks",))
            self.finish()
            self.unseen = batch.fate == "handed"
            return
        if batch is None:
            batch = self.begin()
            batch.before[-1] = ("pass_over", self.broken)
        elif not self.rolls_back:
            self.drop_window()
        elif not self.rolled_back:
            batch.did = []
        batch.fate, self.at = "skipped", 0 if self.rolls_back else self.at
        self.at += failed
        batch.did.append(("look_ahead",))
        while self.at < len(self.parts(batch.number)):
            self.part()
        self.finish()

    def drop_window(self) -> None:
        parts = self.parts(self.open.number)
        if "backward" in parts and self.at > parts.index("backward"):
            self.open.did.append(("drop_window",))

    # Rules: back

    @rule(n=st.integers(0, 7))
    def back(self, n: int) -> None:
        count = sum(batch.fate == "handed" for batch in self.done)
        reach = self.run.snapshots.reach if self.case.snapshots else -1
        _, error = self.go(lambda: self.run.back(n))
        if isinstance(error, (LookupError, RuntimeError)):
            assert n > reach or not len(self.run.snapshots)  # none before its first iteration
            return
        if n == 0 and self.open is None:
            return  # it stands there
        if isinstance(error, KeyboardInterrupt):
            return  # pressed before, within an iteration that is open still: nothing was done
        number = self.stands()
        kept = sum(batch.fate == "handed" for batch in self.done[:number])
        assert kept == count - n
        behind = itertools.takewhile(lambda batch: batch.fate != "handed", self.done[number:])
        assert not any(batch.fate == "skipped" for batch in behind)  # these stay so
        self.stand_at(number)

    @rule(data=st.data())
    def replay(self, data: Any) -> None:
        iteration = data.draw(st.integers(max(0, self.run.progress.iteration - 6), self.run.progress.iteration))
        _, error = self.go(lambda: self.run.replay(iteration))
        if isinstance(error, (LookupError, RuntimeError)):
            return
        if self.open is None and iteration == self.iteration(len(self.done)):
            return
        if isinstance(error, KeyboardInterrupt):
            return
        number = self.stands()  # before it, or before what is dropped in front of it; behind it if it is dropped itself
        wanted = next(n for n in range(self.total + 1) if n == self.total or self.starts(n, iteration))
        between = self.done[min(number, wanted) : max(number, wanted)]
        assert number == len(self.done) or all(batch.fate == "dropped" for batch in between)
        self.stand_at(number)

    def stand_at(self, number: int) -> None:
        """All that was done since is forgotten."""
        batches = [*self.done, *([self.open] if self.open else [])]
        begun = self.run.cursor.passes.phase is not None
        if number < len(batches):
            self.before = [op for op in batches[number].before if op[0] not in ("fetch", "pass_over")]
        else:
            self.before = self.before[: self.settled]
        if not begun and ("begin_pass",) in self.before:
            self.before = self.before[: self.before.index(("begin_pass",))]
        self.done, self.open, self.settled = batches[:number], None, len(self.before)
        self.at, self.failed, self.rolled_back, self.unseen = 0, False, False, False

    # Rules: other parts, other steps

    @rule(version=st.sampled_from([0, 1, 2]), by_name=st.booleans())
    def replace_step(self, version: int, by_name: bool) -> None:
        step = step_of(version, self.trips)
        self.run.replace(*([step] if by_name else ["train/forward", step]))
        self.version = version

    @rule(max_norm=st.sampled_from([0.1, 0.5]))
    def replace_clip(self, max_norm: float) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.run.replace("clip_grad_norm", lt.clip_grad_norm(self.bench.model.parameters(), max_norm))
        self.max_norm = max_norm

    @rule()
    def mute(self) -> None:
        on, failed = not self.muted, self.run.failed
        self.run.mute("clip_grad_norm", on)
        self.muted = on
        if failed is not None and self.run.failed is None:
            self.failed = self.rolled_back = False
        batch = self.open
        if not on and batch is not None and self.place(batch.number)[0]:
            parts = self.parts(batch.number)
            passed = any(op[0] == "clip_grad_norm" for op in batch.did)
            if parts[self.at : self.at + 1] == ["update"] and not self.failed and not passed:
                self.at -= 1

    # Rules: by hand

    @rule(kind=HANDS, value=VALUES)
    def hand(self, kind: str, value: float) -> None:
        if kind == "buffer" and self.open is not None:
            return  # backward may need it as it was
        if kind == "gradient" and self.open is None:
            return  # those of an open window may be laid aside until the next backward
        if kind == "draw" and self.open is None and self.failed:
            return  # what the batch, or the order of the pass, has drawn is put back or not
        by_hand(self.bench, kind, value)
        (self.before if self.open is None else self.open.did).append(("hand", kind, value))

    @precondition(lambda self: self.open is None and not self.failed)
    @rule()
    def validate(self) -> None:
        _, error = self.go(lambda: self.run.validate(self.bench.judged))
        assert error is None
        self.before.append(("validate",))

    @rule()
    def sleep(self) -> None:
        with contextlib.suppress(KeyboardInterrupt), self.run:
            pass

    @precondition(lambda self: self.open is None and not self.failed)
    @rule()
    def resume(self) -> None:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not self.run.progress.iteration or self.run.ended:
                return
            self.run.save(folder)
            run, bench = built(self.case, self.trips, self.version, self.max_norm)
            run.resume(folder)
            self.close()
            self.run, self.bench = run, bench
        self.unseen = False

    def close(self) -> None:
        with contextlib.suppress(KeyboardInterrupt), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.run.close()

    # The promise

    @invariant()
    def same_bits(self) -> None:
        if not hasattr(self, "run") or self.inexact:
            return
        if self.failed and not self.rolled_back and self.half == (self.open, self.at):
            return
        script = [op for batch in self.done for op in batch.script()] + (self.open.script() if self.open else [])
        script += self.before
        played = len(self.plain.played)
        if script[:played] != self.plain.played:
            self.plain = Plainly(self.case)
        self.plain.play(script)
        found = differences(facts_of(self.run, self.bench), self.plain.facts())
        if self.failed:  # what it has drawn for nothing is put back when it goes on
            found = [name for name in found if name not in DRAWN]
        assert found == []


Machine.TestCase.settings = settings(
    max_examples=LONG or 120,
    stateful_step_count=12,
    deadline=None,
    derandomize=not LONG,
    suppress_health_check=list(HealthCheck),
)
TestMachine = Machine.TestCase
