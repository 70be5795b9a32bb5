"""Two runs that do the same, one part after another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from ...checkpoints.around import generators_around
from ...checkpoints.inventory import inventory
from ...cursor import Cursor
from ...generators import (
    generators_within,
    get_generator,
    get_generators,
    same_states,
    set_generator,
    set_generators,
)
from ...state import State
from ..forking.own_generators import OWN, OwnGenerators
from ..stages import stages
from .apart import Gap, Tolerance
from .differences import Differences, of_module
from .listening import Comparer, Event, Listener

if TYPE_CHECKING:
    from ...run import Run

T = TypeVar("T")


@attrs.frozen(eq=False)
class Place:
    """Where two runs differ.

    Args:
        part: Behind which part.
        what: What differs.
        gap: How.
        state: The first run's.
    """

    part: str
    what: str
    gap: Gap
    state: State | None


class LockStep:
    """Has one run do what comes next, then the other one, and compares.

    Args:
        a: The first run.
        b: The second.
        tolerance: How far apart values may be.
    """

    def __init__(self, a: Run, b: Run, tolerance: Tolerance) -> None:
        self.a, self.b = _Side(a), _Side(b)
        self.tolerance = tolerance
        self.draws = _Draws(a, b)
        self.differences = Differences((inventory(a.cursor).modules, inventory(b.cursor).modules), tolerance)

    def go(self, iterations: int | None) -> Place | None:
        """At most so many iterations; the place where they differ, if they do."""
        found = self.differences.weights(forced=True)
        if found is not None:
            return Place("", *found, None)
        for _ in itertools.count() if iterations is None else range(iterations):
            a, b = self._both(_Side.begin)
            if a is None or b is None:
                ends = [side.run.ended or "goes on" for side in (self.a, self.b)]
                return None if a is b else Place("batches", "the end of the run", Gap(ends[0], ends[1]), a or b)
            place = self._iterate(a, b)
            if place is not None:
                return place
        return None

    def _iterate(self, a: State, b: State) -> Place | None:
        """The rest of an iteration of both."""
        compare, name = self.differences, self.a.cursor.part_names[0]
        compare.begin()
        found = compare.facts(a, b) or compare.nested("batch", a.batch, b.batch)
        if found is not None:
            return Place(name, *found, a)
        for name, other in self._common():
            heard = self._hear(name, other)
            if self.a.state is None or self.b.state is None:  # a part dropped it, and there was no other
                break
            a, b = self.a.state, self.b.state
            part = next(slot.part for slot in self.a.cursor.line if slot.name == name)
            found = compare.facts(a, b) or of_module(heard) or compare.behind(a, b, part)
            if found is not None:
                return Place(name, *found, a)
        self._both(_Side.finish)
        found = compare.weights(forced=True) or compare.results(self.a.run, self.b.run)
        return None if found is None else Place("boundary", *found, a)

    def _hear(self, name: str, other: str) -> tuple[Event, Gap] | None:
        """Have both go on until behind a part, and compare what their modules are given and give."""
        listener = Listener()
        comparer = Comparer(listener, self.tolerance)

        def go_on(side: _Side) -> None:
            first = side is self.a
            with (listener if first else comparer).listening(side.model):
                side.go_to(name if first else other)

        self._both(go_on)
        order = self.differences.order
        order |= {module: len(order) + number for module, number in listener.order.items()}
        return comparer.found

    def _common(self) -> list[tuple[str, str]]:
        """Full names of the parts that both have, in their order, without the batches."""
        matcher = SequenceMatcher(None, self.a.parts, self.b.parts, autojunk=False)
        pairs = [(m.a + n, m.b + n) for m in matcher.get_matching_blocks() for n in range(m.size)]
        names = self.a.cursor.part_names, self.b.cursor.part_names
        return [(names[0][i], names[1][j]) for i, j in pairs if i and j]

    def _both(self, action: Callable[[_Side], T]) -> tuple[T, T]:
        """Do it with the first one, then with the second one from where the generators stood."""
        before = self.draws.now(0)
        a = _do(action, self.a, "first")
        after = self.draws.now(0)
        self.draws.put(1, before)
        try:
            b = _do(action, self.b, "second")
        finally:
            self.draws.settle(before, after)
        return a, b


def _do(action: Callable[[_Side], T], side: _Side, which: str) -> T:
    try:
        return action(side)
    except Exception as error:
        error.add_note(f"first_divergence: this was the {which} of the two runs.")
        raise


class _Side:
    """One of the two."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.cursor: Cursor = run.cursor
        self.state: State | None = None
        self._stages: Iterator[tuple[str, State]] = iter(())

    def begin(self) -> State | None:
        """Fetch the next batch; None at the end of the run."""
        self._stages = stages(self.cursor)
        self.state = next((state for _, state in self._stages), None)
        return self.state

    def go_to(self, part: str) -> None:
        """Go on until *part* has seen a state; there is none if the iteration ended first."""
        self.state = next((state for name, state in self._stages if name == part), None)

    def finish(self) -> None:
        """Go on to the boundary."""
        for _ in self._stages:
            pass

    @property
    def model(self) -> Any:
        """That of the pass under way."""
        phase = self.cursor.passes.phase
        return None if phase is None else phase.model

    @property
    def parts(self) -> list[str]:
        """Names of the parts of the pass, without that of the phase."""
        own = f"{self.cursor.passes.plan.phase}/"
        return [name.removeprefix(own) for name in self.cursor.part_names]


class _Draws:
    """The random generators that the runs draw from: the process's, or a fork's own, and others that both reach."""

    def __init__(self, a: Run, b: Run) -> None:
        mine, others = _generators(a.cursor), _generators(b.cursor)
        self._shared = [generator for key, generator in mine.items() if key in others]
        self._own: list[OwnGenerators | None] = [vars(run.cursor).get(OWN) for run in (a, b)]

    def now(self, side: int) -> list[Any]:
        """Where they stand for one of the runs."""
        own = self._own[side]
        return [get_generators() if own is None else own.state, *map(get_generator, self._shared)]

    def put(self, side: int, states: list[Any]) -> None:
        """Have them stand there for that run."""
        own = self._own[side]
        if own is None:
            set_generators(states[0])
        else:
            own.state = states[0]
        self._put_shared(states[1:])

    def settle(self, before: list[Any], after: list[Any]) -> None:
        """Both are done: those that the first has drawn from stand where it left them."""
        drawn = [not same_states(*states) for states in zip(before, after, strict=True)]
        final = [mine if new else its for new, mine, its in zip(drawn, after, self.now(1), strict=True)]
        if self._own == [None, None]:
            set_generators(final[0])
        self._put_shared(final[1:])

    def _put_shared(self, states: list[Any]) -> None:
        for generator, state in zip(self._shared, states, strict=True):
            set_generator(generator, state)


def _generators(cursor: Cursor) -> dict[int, Any]:
    found = list(generators_around(cursor).values())
    for source in cursor.passes.sources.values():
        found += generators_within(source.given).values()
    return {id(generator): generator for generator in found}
