"""What keeps a run's state in memory: the cursor tells it where the run is."""

from __future__ import annotations

from array import array
from collections import deque
from typing import Any

import attrs

from ..checkpoints.background import Buffers
from ..checkpoints.tree import capture
from ..cursor import Cursor
from ..data.sources import Source
from ..failures import Failed
from ..generators import (
    generators_within,
    get_generator,
    get_generators,
    same_states,
    set_generator,
    set_generators,
)
from ..links import Slot
from ..middleware.forward import forward
from ..middleware.update import HAS_MOVED
from ..state import State
from .beyond import Beyond
from .moment import Moment
from .recorder import Recorder
from .snapshots import Pipe, Snapshot, snapshots
from .surviving import clear
from .touches import Looked, Touches

Key = tuple[Any, ...]


class Keeper:
    """Keeps a run's snapshots, and the beginning of its open iteration.

    Args:
        cursor: The run's machine, which calls it.
        options: How often; None keeps only the beginning of the open iteration.
    """

    def __init__(self, cursor: Cursor, options: snapshots | None) -> None:
        self.cursor = cursor
        self.options = options
        self.moment = Moment(cursor) if options is None or options.rollback else None
        self.listeners: list[Recorder] = []  # told of each batch and each failure
        self.ring: deque[Snapshot] = deque()
        self.trail: dict[Key, tuple[int, dict[str, Any], dict[str, Any]]] = {}  # what each boundary came to
        self.count = 0  # states handed out
        self.touched = False  # somebody may have changed something since the last iteration, or within it
        self.replaying = False
        self._handed: State | None = None  # the last one that is counted
        self._noted: State | None = None  # whose beginning is kept
        self._rolled_back = False
        self._touches = Touches(cursor)
        self._versions: Looked | None = None  # when the last iteration was complete
        self._left: Looked | None = None  # when somebody got the prompt within this one
        self._own: dict[str, Any] = {}  # the random generators that hang on the source
        self._before: tuple[dict[str, Any], dict[str, Any]] = ({}, {})  # theirs and the process's, before a fetch
        self._undrawn: tuple[dict[str, Any], dict[str, Any]] = ({}, {})  # the same behind a fetch that failed
        self._generators: dict[str, Any] = {}  # the process's, as they were last noted,
        self._compact: dict[str, Any] = {}  # and in little memory
        self._drawn: dict[str, Any] = {}  # those of the source, behind the fetch
        self._peeked = False

    @property
    def undoes(self) -> bool:
        """Whether the open iteration can be undone."""
        return self.moment is not None and self._noted is not None

    # The cursor says where it is

    def at_boundary(self) -> None:
        """The next iteration is about to begin."""
        cursor = self.cursor
        if any(slot.waiting for slot in cursor.line) or self.options is None:
            return  # a part has dropped its state and waits for this one: the run cannot stand here
        self.count_handed()
        key = self.key()
        if self.replaying:
            if key in self.trail:
                set_generators(self.trail[key][1])
            return
        self._generators, self._compact = _compacted(get_generators(), self._generators, self._compact)
        self.trail[key] = self.count, self._compact, self.marks()
        if self._is_due():
            self._take()
        self._noted = None

    def fetching(self) -> None:
        """A batch is about to be fetched, or looked ahead for."""
        source = self._source()
        if not self._own or self.cursor.passes.index == 0:
            self._own = generators_within(source.given)
        self._before = get_generators(), {path: get_generator(one) for path, one in self._own.items()}

    def fetched(self, state: State) -> None:
        """It is here."""
        state.replayed = self.replaying
        self._noted, self._rolled_back, self._left = None, False, None
        if self.moment is not None and not self.replaying:
            self._peeked = self._source().has_ahead
            self.moment.note()
            self._drawn = {path: get_generator(one) for path, one in self._own.items()}
            self._noted = state
            for listener in self.listeners:
                listener.fetched(state)
        if self.options is not None:
            self.cursor.at_boundary.append(self._ended)

    def left(self, state: State) -> None:
        """Somebody has the prompt, within the iteration."""
        if self.options is not None and not (self.touched or self.replaying):
            self._left = self._touches.look(state)

    def entered(self, state: State) -> None:
        """The run goes on within the iteration."""
        if self._left is not None:
            self.touched = self.touched or self._left != self._touches.look(state)
            self._left = None

    def _ended(self, run: Any) -> None:
        """The iteration is complete."""
        self._versions = self._touches.look()

    def failed(self, failed: Failed, slot: Slot | None) -> bool:
        """Something raised; undo what it has done by half, and tell who listens.

        Returns:
            Whether the iteration was rolled back.
        """
        rolled_back = self._undo(failed, slot)
        after = [listener.failed(failed) for listener in self.listeners]  # each of them, whatever the others do
        return rolled_back or any(after)

    def _undo(self, failed: Failed, slot: Slot | None) -> bool:
        cursor, state = self.cursor, self.cursor.state
        self.touched = True
        if failed.part.endswith("/batches") and cursor.passes.phase is not None and self._before[0]:
            self._undrawn = get_generators(), {path: get_generator(self._own[path]) for path in self._before[1]}
            self._undraw(self._before[1])
            set_generators(self._before[0])
        if state is None or state is not self._noted or cursor.at >= len(cursor.line) or self._rolled_back:
            return False
        redoes_others = hasattr(cursor.line[cursor.at].part, "redo_from")  # the forward, which moves buffers
        halfway = slot is not None and self._may_be_halfway(slot, state)
        if isinstance(failed.exception, Exception) and not (halfway or redoes_others):
            return False
        return self.start_over()

    def go_on(self) -> None:
        """The run goes on after a failure: an iteration that was rolled back begins with its batch."""
        if self._rolled_back and self.cursor.state is not None:
            clear(self.cursor.state)
        self._rolled_back = False

    def start_over(self) -> bool:
        """Undo the open iteration but for its batch; False if its beginning is not kept."""
        cursor, state = self.cursor, self.cursor.state
        if self.moment is None or state is None or state is not self._noted:
            return False
        if not self._rolled_back:
            self.moment.put_back()
            self._unpeek(state)
            for slot in cursor.line:
                if slot.stream is not None and slot.waiting:
                    slot.forget()
        cursor.at, state.committed, state.dropped, self._rolled_back = 0, "", False, True
        return True

    # What it does then

    def _may_be_halfway(self, slot: Slot, state: State) -> bool:
        """Whether a part that raised may have changed something that it would change once more."""
        if isinstance(slot.part, forward):
            return True  # a step may draw from any generator and count for itself before it raises
        if hasattr(slot.part, "leaves"):
            return bool(slot.part.leaves(state))
        ours = type(slot.part).__module__.partition(".")[0] == __name__.partition(".")[0]
        moved = self._versions is not None and self._touches.look().weights != self._versions.weights
        return not ours and moved and state.committed != HAS_MOVED  # else it may have looked only: that stays

    def _unpeek(self, state: State) -> None:
        """Take back that the batch after the next one was looked for, which draws random numbers."""
        source, passes = self._source(), self.cursor.passes
        for name in ("last", "round_last"):  # a part that ended its stream has set them, too
            if name in _set_fields(state):
                delattr(state, name)
        if not passes.is_unknown:
            state.last = passes.is_last()
        if source.has_ahead and not self._peeked and not source.goes_once:  # else that batch would be lost
            source.unpeek()
            for path, drawn in self._drawn.items():
                set_generator(self._own[path], drawn)

    def _undraw(self, own: dict[str, Any]) -> None:
        for path, drawn in own.items():
            set_generator(self._own[path], drawn)
        self._source().undraw()

    def pass_over(self) -> None:
        """The batch that could not be fetched is skipped: what was drawn for it is drawn, as in a loop by hand."""
        process, own = self._undrawn
        for path, drawn in own.items():
            set_generator(self._own[path], drawn)
        if same_states(self._before[0], get_generators()):  # else somebody has drawn since
            set_generators(process)

    def _source(self) -> Source:
        return self.cursor.passes.source

    def _is_due(self) -> bool:
        assert self.options is not None
        new = not self.ring or self.count - self.ring[-1].count >= self.options.every
        if new:
            return True
        return self.touched or self._versions != self._touches.look() or not self.ring[-1].pipe.is_that_of(self.cursor)

    def _take(self) -> None:
        """Take a snapshot, in the memory of the one that goes."""
        assert self.options is not None
        cursor, buffers = self.cursor, Buffers()
        tree = capture(cursor.run, who="snapshots")
        if len(self.ring) == self.options.keep:
            buffers = self.ring.popleft().buffers
        copied = buffers.copy(tree)
        done, pipe, beyond = cursor.progress.iteration, Pipe.of(cursor), Beyond(cursor)
        self.ring.append(Snapshot(self.count, done, copied, buffers, pipe, buffers.bytes, beyond))
        self.touched = False
        oldest = self.ring[0].count
        self.trail = {key: place for key, place in self.trail.items() if place[0] >= oldest}

    def count_handed(self) -> int:
        """States that were handed out."""
        handed = self.cursor.handed
        if handed is not self._handed:
            self._handed = handed
            self.count += handed is not None
        return self.count

    def key(self) -> Key:
        """The boundary where the run stands."""
        passes, done = self.cursor.passes, self.cursor.progress
        index = None if passes.phase is None else passes.index
        return done.round, passes.place.entry, passes.place.done, index, done.epoch, done.iteration

    def marks(self) -> dict[str, Any]:
        """How far parts have written their files."""
        return {slot.name: slot.part.marks for slot in self.cursor.slots if hasattr(slot.part, "rewind")}

    def stand_at(self, count: int) -> None:
        """So many states are handed out: what was kept of later ones is of a future that may not come."""
        self.count, self._handed, self._noted, self._rolled_back = count, self.cursor.handed, None, False
        self.touched, self._versions = False, self._touches.look()


def keep_snapshots(cursor: Cursor, given: snapshots | None) -> None:
    """Have the run keep them from now on, and the beginning of each iteration for parts that record them."""
    if given is not None:
        cursor.keeper = Keeper(cursor, given)
    for slot in cursor.slots:
        if hasattr(slot.part, "records_with"):
            slot.part.records_with(Recorder(keep_beginnings(cursor), slot))


def keep_beginnings(cursor: Cursor) -> Keeper:
    """Have the run keep at least the beginning of each iteration."""
    if cursor.keeper is None or cursor.keeper.moment is None:
        options = None if cursor.keeper is None else attrs.evolve(cursor.keeper.options, rollback=True)
        cursor.keeper = Keeper(cursor, options)
    return cursor.keeper  # type: ignore[no-any-return]


def _set_fields(state: State) -> list[str]:
    """Those of ``last`` and ``round_last`` that are known, without looking ahead for them."""
    found = []
    for name in ("last", "round_last"):
        try:
            object.__getattribute__(state, name)
        except AttributeError:
            continue
        found.append(name)
    return found


def _compacted(
    now: dict[str, Any], before: dict[str, Any], compact: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The states, and what of them is kept for each boundary: lists as arrays, and what has not changed only once."""
    same = {name for name, state in now.items() if same_states(before.get(name), state)}
    kept = {name: compact[name] if name in same else _packed(state) for name, state in now.items()}
    return {name: before[name] if name in same else state for name, state in now.items()}, kept


def _packed(state: Any) -> Any:
    """A state whose long list of whole numbers is an array."""
    if not isinstance(state, list):
        return state
    return [
        array("I", item) if isinstance(item, list) and all(type(n) is int for n in item) else item for item in state
    ]
