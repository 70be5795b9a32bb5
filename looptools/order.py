"""What cannot be right about the order of a pipe's parts, said before the first iteration.

Each rule looks at one line of parts, those of a phase and behind them those of the run, and says what it finds.
They know looptools' own parts by their names. A part of the user's own may do anything, so it ends what a rule can
tell: between two parts that have one between them, nothing is refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
from torch.nn import Module
from torch.optim.lr_scheduler import LRScheduler

from .cursor import Cursor
from .gradients import optimizers_of, parameters_of
from .links import Slot
from .phases import Phase
from .schedules import constant, plateau
from .spent_sources import require_sources_to_last
from .warn import warn

FILL = {"backward", "update_by_closure"}  # fill the gradients of their optimizers
MOVE = {"update", "update_by_closure"}  # move its weights
CHANGE = {"clip_grad_norm", "clip_grad_value", "grad_noise"}  # work on gradients between the two
FOLLOW = {"ema", "swa"}  # take in the weights once they have moved
LOOK = {"watch", "unused_params"}  # look at gradients
SCHEDULE = {"schedule"}  # set an optimizer's option for its next update; schedule_lr and schedule_momentum make one
OWN = {""}  # the user's own

TWICE = " If a cell with `phase = phase | ...` ran twice, make the phase anew in it."


def kind(slot: Slot) -> str:
    """The public name of one of looptools' parts; empty for the user's own."""
    cls = type(slot.part)
    return cls.__name__ if f"{cls.__module__}.".startswith(f"{__package__}.") else ""


def typed(slot: Slot) -> str:
    """The name that a user typed for one of looptools' parts."""
    return str(getattr(slot.part, "called", kind(slot)))


@attrs.frozen(eq=False)
class Line:
    """The parts that a state of one phase goes through, and the lines of all phases."""

    phase: Phase
    name: str
    slots: list[Slot]
    run: list[Line]

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


def weights_of(line: Line) -> set[int]:
    """The parameters of a phase's model, by identity."""
    model = line.phase.model
    return set(map(id, model.parameters())) if isinstance(model, Module) else set()


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


def looked_at_too_early(line: Line) -> Iterator[str]:
    """Before backward there are no gradients, or those of the iteration before."""
    for number, slot in line.each(LOOK):
        later = line.of(FILL, after=number)
        if later and getattr(slot.part, "gradients", True) and not line.of(FILL | OWN, before=number):
            yield (
                f"{kind(slot)}: it stands before {kind(later[0])}, where gradients are those of the iteration before. "
                f"Put it behind: train | lt.backward(optimizer) | lt.{kind(slot)}(model) | lt.update(optimizer)."
            )


def guard_behind_update(line: Line) -> Iterator[str]:
    """What it would keep out is in the weights already; another forward or backward begins anew."""
    for number, slot in line.each({"nan_guard"}):
        before = line.of({"forward"} | FILL | MOVE | OWN, before=number)
        if before and kind(before[-1]) in MOVE and not slot.of_run:
            yield (
                f"nan_guard: it stands behind {kind(before[-1])}, where the weights have moved already. Pipe it before "
                "that: train | lt.nan_guard() | lt.optimize(optimizer), or as between=lt.nan_guard() in it."
            )


def scaler_on_one_only(line: Line) -> Iterator[str]:
    """Gradients that are scaled must be unscaled, and who skips a step must know of the scaler."""
    for number, slot in line.each({"update"}):
        before = line.slots[:number]
        filled = [n for n, other in enumerate(before) if kind(other) == "backward" and weights(other) & weights(slot)]
        if filled and not line.of(OWN, after=filled[-1], before=number):
            pair = (line.slots[filled[-1]], slot)
            has = [slot.name for slot in pair if slot.part.scaler is not None]
            if pair[0].part.scaler is not pair[1].part.scaler:
                what = "have two scalers" if len(has) == 2 else f"share an optimizer, but only {has[0]} has a scaler"
                yield (
                    f"update: {pair[0].name} and {pair[1].name} {what}. Give both the same: "
                    "lt.optimize(optimizer, scaler=scaler)."
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
                f"Drop one of them, or put lt.forward(step) between.{_twice(second)}"
            )


def update_twice(line: Line) -> Iterator[str]:
    """The same gradients would move the weights twice."""
    for first, second in _pairs(line, MOVE, until=FILL | OWN):
        if first.part.optimizer is second.part.optimizer:
            yield (
                f"{kind(second)}: {first.name} and {second.name} move the weights of one optimizer twice by the same "
                f"gradients. Drop one of them.{_twice(second)}"
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
                f"Drop one of them.{_twice(second)}"
            )


def same_part_twice(line: Line) -> Iterator[str]:
    """What was meant once stands twice; backward, update and schedules have rules of their own."""
    others = {kind(slot) for slot in line.slots} - FILL - MOVE - SCHEDULE - OWN - {"forward", "chain"}
    for first, second in _pairs(line, others, until={"forward"} | FILL | MOVE | OWN):
        same = kind(first) == kind(second) and first.of_run == second.of_run
        if same and (kind(first) == "average" or _same(first.part, second.part)):
            what = f"{first.name} and {second.name} are the same part twice. Drop one of them.{_twice(second)}"
            yield f"{kind(second)}: {what}"


def same_folder_twice(line: Line) -> Iterator[str]:
    """Two logs, or two checkpoints, would write over each other's files."""
    for first, second in _pairs(line, {"log", "checkpoint"}, until=set()):
        given: list[Any] = [getattr(slot.part, "folder", None) for slot in (first, second)]
        if kind(first) == kind(second) and None not in given and len({Path(folder).resolve() for folder in given}) == 1:
            yield (
                f"{kind(second)}: {first.name} and {second.name} write into the same folder, {given[0]}. "
                "Drop one of them, or give it a folder of its own."
            )


def stands_still(line: Line) -> Iterator[str]:
    """Where the user's own loop or step moves the weights, nobody counts updates."""
    return (message for message, own in _uncounted(line) if not own)


def may_stand_still(line: Line) -> Iterator[str]:
    """A part of the user's own that moves the weights would have to count, too."""
    return (message for message, own in _uncounted(line) if own)


def _uncounted(line: Line) -> Iterator[tuple[str, bool]]:
    """What counts updates where no part makes any, and whether there is a part of the user's own that may."""
    for _, slot in line.each(SCHEDULE | {"ema"}) if line.phase.trains else ():
        if kind(slot) == "ema":  # counts the updates of the states that come through it
            through = [other for other in line.run if other.phase.trains and slot in other.slots]
            moves = slot.part.by != "update" or any(other.of(MOVE) for other in through)
        else:  # those of its optimizer, wherever they are made
            through = line.run
            movers = [mover for other in through for mover in other.of(MOVE)]
            moves = not _counts_updates(slot.part) or any(m.part.optimizer is slot.part.optimizer for m in movers)
        if not moves:
            message = (
                f'{typed(slot)}: {slot.name} counts updates (by="{slot.part.by}"), but no part of the pipe makes any, '
                'so it would stand still. If you move the weights by hand, give by="iteration"; else pipe '
                "lt.optimize(optimizer) onto the phase."
            )
            yield message, any(other.of(OWN) for other in through)


def _counts_updates(part: Any) -> bool:
    """Whether a schedule needs them: also a warm-up under a schedule by epoch does; a plateau asks for results only."""
    given = part.schedule if isinstance(part.schedule, list | tuple) else [part.schedule]
    moves = any(not isinstance(one, constant | plateau) for one in given)
    return (part.by == "update" and moves) or (part.by != "iteration" and bool(part.warmup))


def weights_of_another_model(line: Line) -> Iterator[str]:
    """An optimizer that was made of a copy, or of another phase's model."""
    mine, movers = weights_of(line), line.of(MOVE)
    if mine and not any(weights(slot) & mine for slot in movers):
        for slot in movers:
            others = [other.name for other in line.run if weights(slot) & weights_of(other)]
            if others:
                yield (
                    f"{kind(slot)}: the optimizer of {slot.name} holds no parameter of {line.name}'s model, but those "
                    f"of {others[0]}'s. Is it the model that the step trains? Else make the optimizer of that one."
                )


def gauge_behind_log(line: Line) -> Iterator[str]:
    """A row is written before what stands behind the log has measured."""
    logs = [number for number, _ in line.each({"log"})]
    for number, slot in line.each({"timer", "memory"}):
        if logs and slot.of_run and logs[-1] < number:
            yield (
                f"{kind(slot)}: {slot.name} stands behind {line.slots[logs[-1]].name}, whose rows do not show it. "
                f"Pipe it on before: ... | lt.{kind(slot)}() | lt.log(...)."
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
    looked_at_too_early,
    guard_behind_update,
    schedule_behind_update,
    average_before_update,
    scaler_on_one_only,
    stands_still,
)

DOUBTS: tuple[Callable[[Line], Iterator[str]], ...] = (
    gradients_never_zeroed,
    optimizer_left_out,
    may_stand_still,
    weights_of_another_model,
    gauge_behind_log,
)  # the user's own loop may see to it


def check_order(cursor: Cursor) -> None:
    """Refuse a pipe whose parts stand in an order that cannot be right, and warn of one that hardly can.

    Raises:
        ValueError: Naming the two parts, and what to do.
    """
    require_sources_to_last(cursor)
    for message in refusals(cursor):
        raise ValueError(message)
    for message in doubts(cursor):
        warn(message)


def refusals(cursor: Cursor) -> list[str]:
    """What cannot be right about the order as it is now; without muted parts."""
    return _said(RULES, cursor)


def doubts(cursor: Cursor) -> list[str]:
    """What hardly can be right about it."""
    return _said(DOUBTS, cursor)


def _said(rules: Iterable[Callable[[Line], Iterator[str]]], cursor: Cursor) -> list[str]:
    found = lines(cursor)  # a part of the run stands in several
    return list(dict.fromkeys(message for line in found for rule in rules for message in rule(line)))


def lines(cursor: Cursor) -> list[Line]:
    """The parts that the states of each phase go through."""
    names, found = cursor.passes.names, list[Line]()
    for phase in cursor.passes.agenda.phases:
        slots = [slot for slot in (*cursor.lines[id(phase)], *cursor.run_slots) if not slot.muted]
        found.append(Line(phase, names[id(phase)], slots, found))
    return found


def _twice(slot: Slot) -> str:
    return "" if slot.of_run else TWICE


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
