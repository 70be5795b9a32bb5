"""Stand-ins for what a simulation must not touch; the run's own parts are moved over them."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from array import array
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import attrs
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ...gradients import fill_windows
from ...links import Slot
from ...means import read
from ...middleware.backward import backward
from ...middleware.ema import ema
from ...middleware.schedule import schedule
from ...middleware.update import count_update, update
from ...middleware.update_by_closure import update_by_closure
from ...state import Progress, State

PRECISION = {torch.float64: "d", torch.float32: "f"}  # of a value that is a tensor


class Double:
    """The param groups of an optimizer, without its parameters; numbers where it has tensors."""

    def __init__(self, optimizer: Optimizer) -> None:
        groups = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
        tensors = {f"{n} {key}": v for n, g in enumerate(groups) for key, v in g.items() if isinstance(v, Tensor)}
        numbers = read(tensors)  # waits for the device, if there are any
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        self.param_groups: list[dict[str, Any]] = [
            {key: numbers.get(f"{n} {key}", value) for key, value in group.items()} for n, group in enumerate(groups)
        ]
        self._opt_called = True  # torch's schedulers warn otherwise

    def step(self) -> None:
        """Move nothing."""

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # as above

    def held(self, option: str) -> list[float]:
        """What each group has for *option*."""
        return [group[option] if option in group else group["betas"][0] for group in self.param_groups]

    def put(self, group: int, option: str, value: float) -> None:
        """Give a group another value."""
        held = self.param_groups[group]
        if option in held:
            held[option] = value
        else:
            held["betas"] = (value, *held["betas"][1:])

    def rounded(self, group: int, option: str, values: list[float]) -> list[float]:
        """*values* as a tensor holds them, if the option is one."""
        dtype = self.dtypes.get(f"{group} {option}", torch.float64)
        if dtype not in PRECISION:
            return [math.nan] * len(values)
        return values if dtype is torch.float64 else list(array(PRECISION[dtype], values))


class Course:
    """A schedule over a double: the part's own code, so that the values have the same bits.

    Args:
        slot: The schedule's place.
        double: Of its optimizer.
        fresh: Whether the run has still to begin, with what parts do then.
        resumed: Whether it goes on from a checkpoint.
    """

    def __init__(self, slot: Slot, double: Double, fresh: bool, resumed: bool) -> None:
        self.name = slot.name
        self.double = double
        self.progress = Progress()
        self.unknown = ""  # why nothing can be said
        self.part = self._over(slot.part, double)
        if fresh:
            self.part.on_start(cast(Any, SimpleNamespace(resumed=resumed)))
        self.groups: set[int] = set()  # of which nothing can be said
        if not isinstance(self.part.schedule, LRScheduler):
            self.part._stretch()
            self._leave_out()
        run: Any = SimpleNamespace(progress=self.progress)
        self.state = State(phase="", run=run)
        self.stream = self.part(itertools.repeat(self.state))
        self.quiet = False  # what a hand has changed is the run's to say; later nobody has

    def _over(self, part: schedule, double: Double) -> schedule:
        """The part over other param groups."""
        other = copy.copy(part)
        if isinstance(part.schedule, LRScheduler):
            self.unknown = _doubt(part.schedule) or ("with tensors" if double.dtypes else "")
            if not self.unknown:
                other.schedule = copy.deepcopy(part.schedule, {id(part.optimizer): double})
        other.optimizer = cast(Any, double)
        return other

    def _leave_out(self) -> None:
        """Schedules that are another thing within a run, as `plateau` is, look at what happens in it."""
        part: Any = self.part
        given = part.schedule if isinstance(part.schedule, list | tuple) else [part.schedule]
        looks = {id(bound): one for one, bound in zip(given, part._bound, strict=True) if bound is not one}
        self.groups = {n for n, one in enumerate(part._schedules) if id(one) in looks}
        if self.groups:
            kinds = dict.fromkeys(type(one).__name__ for one in looks.values())
            self.unknown = f"{', '.join(kinds)} depends on what happens in the run"
            held = part.optimizer.param_groups
            part._schedules = [
                (lambda done, total, base: base) if n in self.groups else one for n, one in enumerate(part._schedules)
            ]
            assert len(held) == len(part._schedules)

    def along(self, counts: Sequence[int] | None, n: int, iteration: int, epoch: int | None) -> list[list[float]]:
        """The value of each group in *n* iterations; nan where it is unknown.

        Args:
            counts: Updates done before each of them; None if that is unknown.
            n: How many they are.
            iteration: Number of the first.
            epoch: That of all of them; None if it is unknown.
        """
        part, double = self.part, self.double
        if self._is_lost(counts is None, epoch is None):
            return [[math.nan] * n for _ in double.param_groups]
        values = self._values(counts if counts is not None else [0] * n, iteration, epoch or 0)
        self.quiet = True
        values = [double.rounded(g, part.option, column) for g, column in enumerate(values)]
        return [[math.nan] * n if g in self.groups else column for g, column in enumerate(values)]

    def _is_lost(self, no_updates: bool, no_epoch: bool) -> bool:
        """Whether what it counts is unknown, from here on."""
        by, warms = self.part.by, bool(self.part.warmup)
        if no_updates and (by == "update" or (by == "epoch" and warms)):
            self.unknown = self.unknown or "how many updates there are is unknown"
            self.groups = set(range(len(self.double.param_groups)))
        if no_epoch and by == "epoch":
            self.unknown = self.unknown or "where epochs end is unknown"
            self.groups = set(range(len(self.double.param_groups)))
        torchs = isinstance(self.part.schedule, LRScheduler) and bool(self.unknown)
        return torchs or len(self.groups) == len(self.double.param_groups)

    def _values(self, counts: Sequence[int], iteration: int, epoch: int) -> list[list[float]]:
        """The part's own code for two iterations, since what a hand has set may hold once; then the rest at once."""
        self.state.epoch = epoch
        held = [self._ask(done, at) for at, done in enumerate(counts[:2], iteration)]
        columns = [list(column) for column in zip(*held, strict=True)]
        if len(counts) > 2 and isinstance(self.part.schedule, LRScheduler):
            self._step(columns, counts, iteration)
        elif len(counts) > 2:
            for group, column in enumerate(columns):
                column += self._rest(group, counts[2:], iteration + 2, epoch)
        return columns

    def _ask(self, done: int, iteration: int) -> list[float]:
        """What stands in the groups after one iteration."""
        self.progress.updates[self.part.optimizer], self.state.iteration = done, iteration
        if self.quiet:
            next(self.stream)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                next(self.stream)
        return self.double.held(self.part.option)

    def _step(self, columns: list[list[float]], counts: Sequence[int], iteration: int) -> None:
        """One of torch's schedulers, step by step."""
        by, now = self.part.by, self.double.held(self.part.option)
        for at in range(2, len(counts)):
            if by == "iteration" or (by == "update" and counts[at] != counts[at - 1]):
                now = self._ask(counts[at], iteration + at)
            for column, value in zip(columns, now, strict=True):
                column.append(value)

    def _rest(self, group: int, counts: Sequence[int], iteration: int, epoch: int) -> list[float]:
        """The values that one group is given from here on, and the last one in its place."""
        part, held = self.part, self.double.param_groups[group]
        one, by = part._schedules[group], part.by
        if by == "iteration":
            steps: Sequence[int] = range(iteration, iteration + len(counts))
            values = part.ahead(held, one, steps, steps)
        else:
            steps = counts if isinstance(counts, range) else list(dict.fromkeys(counts))
            warmup: Any = part._warmup.count
            if by == "epoch" and steps[0] >= warmup:
                values = part.ahead(held, one, [epoch], [steps[0]]) * len(steps)
            else:
                values = part.ahead(held, one, steps if by == "update" else [epoch] * len(steps), steps)
            if len(steps) < len(counts):
                by_count = dict(zip(steps, values, strict=True))
                values = [by_count[done] for done in counts]
        if part.option == "momentum":
            part._require_momentum(held, max(values), epoch)
        self.double.put(group, part.option, values[-1])
        held[part._written] = values[-1]
        return values


def _doubt(scheduler: Any) -> str:
    """Why a copy of one of torch's schedulers would not do the same; empty if it does."""
    inner = getattr(scheduler, "_schedulers", [])
    foreign = [one for one in (scheduler, *inner) if not type(one).__module__.startswith("torch.")]
    return f"{type(foreign[0]).__name__} is not one of torch's own schedulers" if foreign else ""


@attrs.frozen(eq=False)
class Moves:
    """What one iteration does, by which windows close in it.

    Args:
        of: Moves of each optimizer.
        seen: Parts that see ``state.updates``.
    """

    of: dict[Any, int]
    seen: set[int]


class Movers:
    """The parts of a line that fill gradients and move weights."""

    def __init__(self, slots: Iterable[Slot], doubles: dict[Any, Double]) -> None:
        self.parts = [(id(slot), slot.part) for slot in slots]
        self.windows = [part for _, part in self.parts if isinstance(part, backward)]
        self.doubles = doubles
        self.known: dict[tuple[int, ...], Moves] = {}

    def moves(self, closes: tuple[int, ...]) -> Moves:
        """What happens where the windows of `windows` close, or do not."""
        if closes not in self.known:
            self.known[closes] = self._move(closes)
        return self.known[closes]

    def _move(self, closes: tuple[int, ...]) -> Moves:
        """Send a state through doubles of the parts."""
        progress = Progress()
        run: Any = SimpleNamespace(progress=progress)
        state, turn, seen = State(phase="", run=run), iter(closes), set()
        doubles = self.doubles
        for key, part in self.parts:
            if isinstance(part, backward):
                fill_windows(state, cast(Any, [doubles[one] for one in part.optimizers]), bool(next(turn)))
            elif isinstance(part, update):
                other = copy.copy(part)
                other.optimizer, other.scaler = cast(Any, doubles[part.optimizer]), None
                for _ in other([state]):
                    pass
            elif isinstance(part, update_by_closure):
                state.updates = True
                count_update(state, cast(Any, doubles[part.optimizer]))
            elif isinstance(part, ema) and state.updates:
                seen.add(key)
        return Moves(dict(progress.updates), seen)
