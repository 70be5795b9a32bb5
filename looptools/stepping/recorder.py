"""Sees what fails in a run, and writes a file of the iteration."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ref

import torch

from ..archives.files import write
from ..checkpoints.fit import stateful
from ..checkpoints.memory import memory
from ..cursor import Cursor
from ..failures import Failed
from ..links import Slot
from ..plain import require_plain
from ..state import State
from ..warn import warn
from .beginning import at_the_beginning
from .crash import Batch, facts_of, files_in, next_file, told, tree_at_boundary, tree_before


class Recorder:
    """What a `flight_recorder` works with.

    Args:
        keeper: Keeps the beginning of each iteration, and tells of batches and failures.
        slot: The part's; it may be replaced, muted or taken out.

    Raises:
        TypeError: If something can be seen to be unsavable when the run is built, with its part and field.
    """

    def __init__(self, keeper: Any, slot: Slot) -> None:
        self.keeper = keeper
        self.slot = slot
        self.cursor: Cursor = keeper.cursor
        self._batch: Batch | None = None
        self._marks: dict[str, Any] = {}  # how far parts had written their files when the iteration began
        self._bad: set[str] = set()  # phases whose last loss was not finite
        self._of: Callable[[], State | None] = lambda: None  # the state of the newest file
        self._file: Path | None = None
        self._check()
        keeper.listeners.append(self)

    def _check(self) -> None:
        for slot in self.cursor.slots:
            try:
                remembered = memory(slot.part)
            except Exception:  # it cannot tell before the run has begun
                continue
            require_plain(remembered, f"flight_recorder/parts/{slot.name}")
        for kind, things in stateful(self.cursor).items():
            for name, thing in things.items():
                require_plain(thing.state_dict(), f"flight_recorder/{kind}/{name}")

    # What the run tells

    def fetched(self, state: State) -> None:
        """An iteration begins."""
        self._batch, self._marks = None, self.keeper.marks()
        with contextlib.suppress(RecursionError):  # it holds itself
            self._batch = Batch(state.batch)

    def failed(self, failed: Failed) -> bool:
        """Something raised. The exception goes its way, whatever goes wrong in here; a note on it tells.

        Returns:
            Whether the iteration had to be rolled back for it.
        """
        error, before = failed.exception, self.keeper._rolled_back
        if not isinstance(error, Exception) or self.slot.muted or self.slot not in self.cursor.slots:
            return False
        try:
            said = self._of_failure(failed)
        except BaseException as trouble:  # Ctrl-C too: the run stops anyway
            said = _no_file(trouble)
        with contextlib.suppress(Exception):
            error.add_note(f"flight_recorder: {said}")
        return bool(self.keeper._rolled_back and not before)

    def looked_at(self, state: State, bad: str) -> None:
        """A loss was looked at: *bad* says that it is not finite, and is empty if it is."""
        if not bad:
            self._bad.discard(state.phase)
            return
        known = bool(self._bad)  # of another phase it is the effect, not the cause
        self._bad.add(state.phase)
        if known:
            return
        try:
            said = self._record(state, nonfinite=bad)
        except Exception as trouble:
            said = _no_file(trouble)
        where = f"iteration {state.iteration}, epoch {state.epoch}, batch {state.index} of {state.phase}"
        warn(f"flight_recorder: {bad} ({where}). {said}")

    def reopened(self, state: State, file: Path) -> None:
        """*state* comes from *file*: should it fail again, it needs no other one."""
        self._of, self._file = ref(state), file

    # Files

    def _of_failure(self, failed: Failed) -> str:
        if failed.part.startswith("workflow/"):
            raise LookupError("what a function of the workflow had changed before it failed is not known")
        what = {"part": failed.part, **told(failed.exception)}
        if failed.state is not None:
            return self._record(failed.state, **what)
        return self._write(tree_at_boundary(self.cursor), facts_of(self.cursor, None, None, **what))

    def _record(self, state: State, **what: str) -> str:
        """Write a file of *state*'s iteration, unless there is one; says where."""
        if self._of() is state and self._file is not None:
            return _holds(self._file)
        keeper, batch = self.keeper, self._batch
        if state is not keeper._noted or batch is None:
            raise LookupError("the beginning of this iteration is not kept")
        facts = facts_of(self.cursor, state, batch, **what)
        action = functools.partial(self._write_before, state, batch, facts)
        if keeper._rolled_back:
            said = action()
        else:
            try:
                said = at_the_beginning(self.cursor, keeper.moment, action)
            except (torch.OutOfMemoryError, MemoryError):  # for the present, too, there is no room
                if self.cursor.failed is None or not keeper.start_over():
                    raise
                said = action()
        self._of = ref(state)
        return said

    def _write_before(self, state: State, batch: Batch, facts: dict[str, Any]) -> str:
        keeper = self.keeper
        tree = tree_before(self.cursor, state, batch, keeper._drawn, keeper._before)
        for name, marks in self._marks.items():
            if "marks" in tree["parts"].get(name, {}):
                tree["parts"][name] |= {"marks": marks}
        return self._write(tree, facts)

    def _write(self, tree: dict[str, Any], facts: dict[str, Any]) -> str:
        part = self.slot.part
        part.place.mkdir(parents=True, exist_ok=True)
        path = next_file(part.place, tree["progress"])
        tree["crash"] = facts
        require_plain(tree, "flight_recorder")
        write(path, tree)
        self._file = part.folder / path.name
        if part.keep is not None:
            for old in files_in(part.place)[: -part.keep]:
                with contextlib.suppress(OSError):
                    old.unlink()
        return _holds(self._file)


def _holds(file: Path) -> str:
    return f"{file} holds it: lt.reopen({str(file)!r}, run) stands just before it."


def _no_file(trouble: BaseException) -> str:
    kind = "" if isinstance(trouble, LookupError) else f"{type(trouble).__name__}: "
    return f"no file was left: {kind}{trouble}."
