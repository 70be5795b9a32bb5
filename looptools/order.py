"""What cannot be right about the order of a pipe's parts, said before the first iteration.

Each rule looks at one line of parts, those of a phase and behind them those of the run, and says what it finds.
They know looptools' own parts by their names. A part of the user's own may do anything, so it ends what a rule can
tell: between two parts that have one between them, nothing is refused.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import attrs
from torch.optim.lr_scheduler import LRScheduler

from .cursor import Cursor
from .gradients import optimizers_of, parameters_of
from .links import Slot
from .phases import Phase

FILL = {"backward", "update_by_closure"}  # fill the gradients of their optimizers
MOVE = {"update", "update_by_closure"}  # move its weights
CHANGE = {"clip_grad_norm", "clip_grad_value", "grad_noise"}  # work on gradients between the two
FOLLOW = {"ema", "swa"}  # take in the weights once they have moved
SCHEDULE = {"schedule"}  # set an optimizer's option for its next update; schedule_lr and schedule_momentum make one
OWN = {""}  # the user's own

TWICE = "If a cell with `phase = phase | ...` ran twice, make the phase anew in it"


def kind(slot: Slot) -> str:
    """The public name of one of looptools' parts; empty for the user's own."""
    cls = type(slot.part)
    return cls.__name__ if f"{cls.__module__}.".startswith(f"{__package__}.") else ""


def typed(slot: Slot) -> str:
    """The name that a user typed for one of looptools' parts."""
    return str(getattr(slot.part, "called", kind(slot)))


@attrs.frozen(eq=False)
class Line:
    """The parts that a state of one phase goes through."""

    phase: Phase
    name: str
    slots: list[Slot]

    def of(
        self, kinds: set[str], like: Slot | None = None, *, after: int = -1, before: int | None = None
    ) -> list[Slot]:
        """The parts of these *kinds* between two numbers, all or those about the same weights as *like*."""
        found = [slot for slot in self.slots[after + 1 : before] if kind(slot) in kinds]
        return [slot for slot in found if like is None or weights(slot) & weights(like)]

    def each(self, kinds: set[str]) -> Iterator[tuple[int, Slot]]:
        """The parts of these *kinds* with their numbers."""
        return ((number, slot) for number, slot in enumerate(self.slots) if kind(slot) in kinds)


def weights(slot: Slot) -> set[int]:
    """The parameters that a part is about, by identity."""
    optimizers = optimizers_of(slot.part)
    return set(map(id, parameters_of(optimizers) if optimizers else getattr(slot.part, "params", None) or ()))


# The rules


def training_without_gradients(line: Line) -> Iterator[str]:
    """A validation has no gradients, and what is piped onto the run stands behind the validation too."""
    for number, slot in line.each(FILL | MOVE):
        if not line.phase.trains and not line.of(OWN, before=number):
            where = f"piped onto the run, it comes behind {line.name} too; that" if slot.of_run else line.name
            yield (
                f"{kind(slot)}: {where} is a validation phase, which has no gradients. "
                "Pipe lt.optimize(optimizer) onto the training phase: lt.train(...) | lt.optimize(optimizer)."
            )


def update_before_backward(line: Line) -> Iterator[str]:
    """There are no gradients yet."""
    for number, slot in line.each({"update"}):
        later = line.of(FILL, slot, after=number)
        if later and not line.of(FILL | OWN, before=number):
            yield (
                f"update: {slot.name} stands before {later[0].name}, so there are no gradients yet. Put it behind, or "
                "pipe lt.optimize(optimizer) on, which has both in their order."
            )


def gradients_changed_too_late(line: Line) -> Iterator[str]:
    """Behind the update nobody needs the gradients any more; only to measure their norm, they are as good."""
    for number, slot in line.each(CHANGE):
        moved = line.of(MOVE, slot, before=number)
        measures = getattr(slot.part, "max_norm", None) == math.inf
        if moved and not measures and not line.of(MOVE, slot, after=number) and not line.of(OWN, after=number):
            yield (
                f"{kind(slot)}: {slot.name} stands behind {moved[-1].name}, which has moved the weights already. "
                f"Put it between backward and update{_as_option(slot)}."
            )


def gradients_changed_too_early(line: Line) -> Iterator[str]:
    """Before backward there are none, or those of the iteration before."""
    for number, slot in line.each(CHANGE):
        later = line.of(FILL, slot, after=number)
        if later and not line.of(FILL, slot, before=number) and not line.of(OWN, before=number):
            yield (
                f"{kind(slot)}: {slot.name} stands before {later[0].name}, which only then fills the gradients. "
                f"Put it between backward and update{_as_option(slot)}."
            )


def _as_option(slot: Slot) -> str:
    option = {"clip_grad_norm": "max_norm", "clip_grad_value": "max_value"}.get(kind(slot))
    return f", or give lt.optimize(optimizer, {option}=...)" if option else ""


def schedule_behind_update(line: Line) -> Iterator[str]:
    """The first update would be made with the unscheduled value; torch's own schedulers are made for that."""
    for number, slot in line.each(SCHEDULE):
        moved = [other for other in line.of(MOVE, before=number) if other.part.optimizer is slot.part.optimizer]
        torchs = isinstance(getattr(slot.part, "schedule", None), LRScheduler)
        if moved and not torchs and not line.of(MOVE, slot, after=number) and not line.of(OWN, after=number):
            yield (
                f"{typed(slot)}: {slot.name} stands behind {moved[-1].name}, whose first update it would miss. "
                "Put it before: lt.train(...) | lt.schedule_lr(optimizer, ...) | lt.optimize(optimizer)."
            )


def average_before_update(line: Line) -> Iterator[str]:
    """An average of weights takes them in once they have moved."""
    for number, slot in line.each(FOLLOW):
        later = line.of(MOVE, after=number)
        if later and not line.of(MOVE | OWN, before=number):
            yield (
                f"{kind(slot)}: {slot.name} stands before {later[0].name}, so it would lag an update behind. "
                f"Put it behind: ... | lt.optimize(optimizer) | lt.{kind(slot)}(...)."
            )


def backward_twice(line: Line) -> Iterator[str]:
    """The graph of a loss is gone after its first backward."""
    for first, second in _pairs(line, FILL, until={"forward"} | OWN):
        if set(optimizers_of(first.part)) & set(optimizers_of(second.part)):
            yield (
                f"{kind(second)}: {first.name} and {second.name} fill the gradients of one optimizer from one loss. "
                f"Drop one of them, or put lt.forward(step) between. {TWICE}."
            )


def update_twice(line: Line) -> Iterator[str]:
    """The same gradients would move the weights twice."""
    for first, second in _pairs(line, MOVE, until=FILL | OWN):
        if first.part.optimizer is second.part.optimizer:
            yield (
                f"{kind(second)}: {first.name} and {second.name} move the weights of one optimizer twice by the same "
                f"gradients. Drop one of them. {TWICE}."
            )


def gradients_never_zeroed(line: Line) -> Iterator[str]:
    """A backward zeroes the gradients of its own optimizers only."""
    for number, slot in line.each({"update"}):
        others = line.of(FILL, before=number)
        if others and not line.of(FILL, slot) and not line.of(OWN):
            yield (
                f"update: nobody zeroes the gradients that {slot.name} moves by, so they add up: {others[-1].name} "
                "zeroes those of its own optimizers only. Several that go down one loss share a backward: write "
                "lt.optimize([first, second]), or lt.backward([first, second]) with an lt.update(...) for each."
            )


def optimizer_left_out(line: Line) -> Iterator[str]:
    """One of several that share a backward is moved, another is not."""
    for number, slot in line.each({"backward"}):
        moved = {one for other in line.of(MOVE, after=number) for one in optimizers_of(other.part)}
        left = [type(one).__name__ for one in optimizers_of(slot.part) if one not in moved]
        if moved & set(optimizers_of(slot.part)) and left and not line.of(OWN, after=number):
            yield (
                f"backward: {slot.name} fills the gradients of {' and '.join(left)} too, but nobody moves its weights. "
                "Pipe one lt.update(optimizer) on for each, or write lt.optimize([first, second])."
            )


def schedule_twice(line: Line) -> Iterator[str]:
    """The second would overwrite what the first has set."""
    for first, second in _pairs(line, SCHEDULE, until=MOVE | OWN):
        if first.part.optimizer is second.part.optimizer and first.part.option == second.part.option:
            yield (
                f"{typed(second)}: {first.name} and {second.name} set {first.part.option!r} of the same optimizer. "
                f"Drop one of them. {TWICE}."
            )


def same_part_twice(line: Line) -> Iterator[str]:
    """What was meant once stands twice; backward, update and schedules have rules of their own."""
    others = {kind(slot) for slot in line.slots} - FILL - MOVE - SCHEDULE - OWN - {"forward", "chain"}
    for first, second in _pairs(line, others, until={"forward"} | FILL | MOVE | OWN):
        same = kind(first) == kind(second) and first.of_run == second.of_run
        if same and (kind(first) == "average" or _same(first.part, second.part)):
            yield f"{kind(second)}: {first.name} and {second.name} are the same part twice. Drop one of them. {TWICE}."


def same_folder_twice(line: Line) -> Iterator[str]:
    """Two logs, or two checkpoints, would write over each other's files."""
    for first, second in _pairs(line, {"log", "checkpoint"}, until=set()):
        folder = getattr(first.part, "folder", None)
        if kind(first) == kind(second) and folder is not None and folder == second.part.folder:
            yield (
                f"{kind(second)}: {first.name} and {second.name} write into the same folder, {folder}. "
                "Drop one of them, or give it a folder of its own."
            )


RULES: tuple[Callable[[Line], Iterator[str]], ...] = (
    training_without_gradients,
    same_folder_twice,
    schedule_twice,
    backward_twice,
    update_twice,
    same_part_twice,
    update_before_backward,
    gradients_changed_too_late,
    gradients_changed_too_early,
    schedule_behind_update,
    average_before_update,
)

DOUBTS: tuple[Callable[[Line], Iterator[str]], ...] = (
    gradients_never_zeroed,
    optimizer_left_out,
)  # the user's own loop may see to it


def check_order(cursor: Cursor) -> None:
    """Refuse a pipe whose parts stand in an order that cannot be right, and warn of one that hardly can.

    Raises:
        ValueError: Naming the two parts, and what to do.
    """
    for line in lines(cursor):
        for message in itertools.chain.from_iterable(rule(line) for rule in RULES):
            raise ValueError(message)
        for message in itertools.chain.from_iterable(rule(line) for rule in DOUBTS):
            warnings.warn(message, stacklevel=2)


def lines(cursor: Cursor) -> list[Line]:
    """The parts that the states of each phase go through."""
    phases = cursor.passes.agenda.phases
    names = cursor.passes.names
    return [Line(phase, names[id(phase)], [*cursor.lines[id(phase)], *cursor.run_slots]) for phase in phases]


def _pairs(line: Line, kinds: set[str], until: set[str]) -> Iterator[tuple[Slot, Slot]]:
    """Two parts of these *kinds* with none of *until* between them."""
    for number, first in line.each(kinds):
        for second in itertools.takewhile(lambda slot: kind(slot) not in until, line.slots[number + 1 :]):
            if kind(second) in kinds:
                yield first, second


def _same(left: Any, right: Any) -> bool:
    """Whether two options are the same: equal values, or the same objects."""
    if left is right:
        return True
    if type(left) is not type(right):
        return False
    if attrs.has(type(left)):
        fields = [field.name for field in attrs.fields(type(left)) if field.init]
        return all(_same(getattr(left, name), getattr(right, name)) for name in fields)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return isinstance(left, str | int | float) and left == right
