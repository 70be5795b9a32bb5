"""The option ``snapshots=`` of a workflow, and what of a run is kept for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from ..agenda import Agenda
from ..checkpoints.background import Buffers
from ..checks import whole
from ..cursor import Cursor
from ..links import Slot


@attrs.frozen(kw_only=True)
class snapshots:
    """Keep a run's state in memory: ``lt.workflow(..., snapshots=lt.snapshots(every=50, keep=4))``.

    Then `Run.back` and `Run.replay` go back to any iteration from the oldest snapshot on, to the bit: what lies between
    is computed again. ``run.snapshots`` shows which there are, and their size. A snapshot is what a checkpoint is, in
    the CPU's memory (pinned, for a GPU's tensors).

    What you change by hand between two iterations or within one (weights, lr, `Run.replace` ...) cannot be computed
    again, so behind it one more snapshot is taken, and the oldest goes. Changes that go through ``tensor.data`` are not
    seen.

    With *rollback*, weights, buffers, optimizers and what parts remember are also copied at the beginning of each
    iteration, on their device. Then a failure in the middle of a part that changes things, or Ctrl-C pressed twice, is
    rolled back to where the iteration had only its batch; ``run.retry()`` redoes any iteration that is open, also when
    the weights have moved; and ``run.skip()`` leaves no trace of it.

    Args:
        every: Iterations of any phase between two snapshots.
        keep: How many are kept; the oldest goes.
        rollback: Whether each iteration can be undone: takes as much memory as weights and optimizers do, and the time
            to copy them.

    Raises:
        ValueError: If *every* or *keep* is not a positive whole number.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(()))
        >>> model, sgd = torch.nn.ParameterList([weight]), torch.optim.SGD([weight], lr=1.0)
        >>> train = lt.train(model, [1.0, 2.0, 4.0], lambda model, batch: -batch * model[0]) | lt.optimize(sgd)
        >>> run = lt.workflow([(train, 1)], max_epochs=1, snapshots=lt.snapshots())
        >>> results = run.to_end()
        >>> run.back(2)
        >>> weight.tolist(), next(run).batch, weight.tolist()
        (1.0, 2.0, 3.0)
    """

    every: int = attrs.field(default=50, validator=whole())
    keep: int = attrs.field(default=4, validator=whole())
    rollback: bool = attrs.field(default=True, validator=attrs.validators.instance_of(bool))


@attrs.frozen(eq=False)
class Pipe:
    """The parts of a run, as they are in their slots, and its workflow."""

    lines: dict[int, list[Slot]]
    run: list[Slot]
    parts: list[tuple[Slot, Any, bool]]
    agenda: Agenda

    @classmethod
    def of(cls, cursor: Cursor) -> Pipe:
        parts = [(slot, slot.part, slot.muted) for slot in cursor.slots]
        lines = {key: list(line) for key, line in cursor.lines.items()}
        return cls(lines, list(cursor.run_slots), parts, cursor.passes.agenda)

    def is_that_of(self, cursor: Cursor) -> bool:
        slots = cursor.slots
        same = len(slots) == len(self.parts) and cursor.passes.agenda is self.agenda
        return same and all(
            slot is mine and slot.part is part and slot.muted is muted
            for slot, (mine, part, muted) in zip(slots, self.parts, strict=True)
        )

    def put_back(self, cursor: Cursor) -> None:
        cursor.lines = {key: list(line) for key, line in self.lines.items()}
        cursor.run_slots = list(self.run)
        for slot, part, muted in self.parts:
            slot.part, slot.muted = part, muted


@attrs.frozen(eq=False)
class Snapshot:
    """The run before an iteration.

    Args:
        count: States that it had handed out.
        iteration: Training iterations that were done.
        tree: The state tree, copied.
        buffers: The memory of the copy.
        pipe: The parts, and the workflow.
        bytes: Size of all tensors.
    """

    count: int
    iteration: int
    tree: dict[str, Any]
    buffers: Buffers
    pipe: Pipe
    bytes: int
    beyond: Any = None  # what a checkpoint leaves out


@attrs.frozen(eq=False, repr=False)
class Ring:
    """The snapshots that a run keeps: ``run.snapshots``.

    Args:
        iterations: Training iterations that were done when each was taken, oldest first.
        bytes: Size of all of them.
        rollback_bytes: Size of what is kept on the device of the open iteration's beginning.
        reach: How many states `Run.back` can go back now.
        keep: How many snapshots there can be.
    """

    iterations: list[int]
    bytes: int
    rollback_bytes: int
    reach: int
    keep: int

    def __len__(self) -> int:
        return len(self.iterations)

    def __iter__(self) -> Iterator[int]:
        return iter(self.iterations)

    def __repr__(self) -> str:
        if not self.iterations:
            return f"<snapshots: none yet, at most {self.keep}>"
        of_them = f"{len(self)} of at most {self.keep}, before iterations {', '.join(map(str, self.iterations))}"
        rollback = f"; {_size(self.rollback_bytes)} for rolling back" if self.rollback_bytes else ""
        return f"<snapshots: {of_them}, {_size(self.bytes)}{rollback}; run.back(n) up to n = {self.reach}>"


def ring(cursor: Cursor) -> Ring | None:
    """What ``run.snapshots`` shows."""
    keeper = cursor.keeper
    if keeper is None or keeper.options is None:
        return None
    taken = list(keeper.ring)
    reach = keeper.count_handed() - taken[0].count if taken else 0
    rollback = 0 if keeper.moment is None else keeper.moment.bytes
    iterations = [one.iteration for one in taken]
    return Ring(iterations, sum(one.bytes for one in taken), rollback, reach, keeper.options.keep)


def require_snapshots(given: Any) -> snapshots | None:
    """Refuse what is no `snapshots` where it is typed."""
    if given is None or isinstance(given, snapshots):
        return given
    what = "the class; call it" if given is snapshots else f"{given!r:.60}"
    raise TypeError(f"workflow: snapshots must be lt.snapshots(every=50, keep=4) or None, got {what}.")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
