"""Set an option of the optimizer at each iteration."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .. import schedules
from ..intervals import epochs
from ..means import read
from ..pipeline import name_of
from ..schedules import Schedule
from ..schedules.given import is_optimizer, is_option, is_schedule, is_unit, is_warmup, require_one_each
from ..schedules.options import bind
from ..state import State
from ..warn import warn

if TYPE_CHECKING:
    from ..run import Run

APART = ("lr", "weight_decay")  # a group that has 0 for one of these is set apart from the others
POINTS = 1000  # at which a momentum is tried when a run is built


def _show(given: Any) -> str:
    if isinstance(given, list | tuple):
        return f"[{', '.join(map(_show, given))}]"
    return repr(given) if attrs.has(type(given)) else name_of(given)


@attrs.define(eq=False, repr=False, on_setattr=attrs.setters.NO_OP)
class schedule:
    """Set an option of every param group, each from its own base value, before the optimizer moves.

    A group's base value is its ``"initial_lr"`` (``"initial_weight_decay"`` ...) if it has one, as with torch's
    schedulers, else what the option is. What was written last stands in its ``"scheduled_lr"``, so that several phases
    can schedule one optimizer. A learning rate or weight decay that began at 0, while another group's did not, was set
    apart, as by `param_groups`: it stays at 0 under one schedule for all; a list of schedules is obeyed.

    A value changed by hand rescales all that follows, which is said once; where the value
    in force was 0, the hand's value holds for that iteration. (Values that are tensors are filled, and not looked at.)
    ``"momentum"`` is the group's ``"momentum"`` or the first of its ``"betas"``. Sets ``state.lr``, or
    ``state.gauges`` under the option's name, to the first group's value; a second optimizer's is ``"lr#2"`` there.

    Args:
        optimizer: Its param groups are set.
        option: Name of the option, such as ``"weight_decay"``; `schedule_lr` and `schedule_momentum` have their own.
        schedule: One of ``lt.schedules`` or a function of (done, total, base); a list of one for each param group; or
            for the learning rate a ``torch.optim.lr_scheduler``, which is stepped after each update (or iteration, or
            epoch) just as in a loop by hand: when the next state comes, or the run ends.
        warmup: Updates over which the value grows linearly from a tenth of the schedule's to the whole (iterations,
            with ``by="iteration"``); ``lt.epochs(n)``; or ``lt.schedules.warmup(...)``. A momentum is divided by the
            factor, which then begins at 0.95, so that it begins high.
        by: What *done* and *total* count: ``"update"``, ``"iteration"`` or ``"epoch"``.

    Raises:
        LookupError: If the optimizer has no such option.
        ValueError: When the run is built: if the schedule needs a horizon and the run has none; if it cannot do so
            many steps; if a momentum would pass 1; if it counts updates and no part of the run makes any.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(()))
        >>> adam = torch.optim.AdamW([weight], weight_decay=0.1)
        >>> phase = lt.train(torch.nn.ParameterList([weight]), [1, 2], lambda model, batch: model[0] * batch)
        >>> pipe = phase | lt.schedule(adam, "weight_decay", lt.schedules.linear(end=0.3)) | lt.optimize(adam)
        >>> [adam.param_groups[0]["weight_decay"] for state in pipe]
        [0.1, 0.2]
    """

    optimizer: Optimizer = attrs.field(validator=is_optimizer, repr=lambda optimizer: type(optimizer).__name__)
    option: str = attrs.field(validator=is_option, repr=False)  # the part's name says it
    schedule: Schedule | LRScheduler | Sequence[Schedule] = attrs.field(validator=is_schedule, repr=_show)
    warmup: int | epochs | schedules.warmup = attrs.field(default=0, kw_only=True, validator=is_warmup)
    by: Literal["update", "iteration", "epoch"] = attrs.field(default="update", kw_only=True, validator=is_unit)
    stepped: int = attrs.field(default=0, init=False, repr=False)  # of a torch scheduler
    _initial: str = attrs.field(init=False)  # keys in the param groups: the base value,
    _written: str = attrs.field(init=False)  # what was written last,
    _by_hand: str = attrs.field(init=False)  # and the factor that a hand's change makes
    _gauge: str = attrs.field(default="", init=False)  # where the value is shown; empty for state.lr
    _total: int | None = attrs.field(default=None, init=False)
    _bound: list[Schedule] = attrs.field(factory=list, init=False)  # what was given, within the run
    _schedules: list[Schedule] = attrs.field(factory=list, init=False)  # one for each group
    _run: Run | None = attrs.field(default=None, init=False)
    _warmup: schedules.warmup = attrs.field(init=False)
    _ready: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        option = self.option
        self._initial, self._written, self._by_hand = f"initial_{option}", f"scheduled_{option}", f"{option}_by_hand"
        if self.warmup != 0 and not isinstance(self.warmup, schedules.warmup):
            self.warmup = schedules.warmup(self.warmup, ratio=0.95 if option == "momentum" else 0.1)
        self._warmup = self.warmup or schedules.warmup()  # type: ignore[assignment]
        self._gauge = "" if option == "lr" else option

    @property
    def __name__(self) -> str:
        """What the part is called in a run."""
        return f"schedule_{self.option}"

    @property
    def called(self) -> str:
        """The name that a user typed, for errors."""
        return self.__name__ if self.option in ("lr", "momentum") else "schedule"

    @property
    def needs_horizon(self) -> bool:
        """Whether what it does depends on how long the run will be."""
        given: Any = self.schedule if isinstance(self.schedule, list | tuple) else [self.schedule]
        return any(getattr(one, "needs_total", False) for one in given)

    def __repr__(self) -> str:
        warmup = f", warmup={self.warmup!r}" if self.warmup else ""
        return f"{self.__name__}({type(self.optimizer).__name__}, {_show(self.schedule)}{warmup}, by={self.by!r})"

    # When the run is built

    def on_build(self, run: Run) -> None:
        """See that the schedule and the run's length go together."""
        self._ready, self._run = True, run
        for line in run.cursor.lines.values():
            alike = [s.part for s in line if isinstance(s.part, schedule) and s.part.option == self.option]
            number = next((n for n, part in enumerate(alike, 1) if part is self), 1)
            if number > 1:  # of another optimizer
                self._gauge = f"{self.option}#{number}"
        if isinstance(self.schedule, LRScheduler):
            return
        given: Any = self.schedule if isinstance(self.schedule, list | tuple) else [self.schedule]
        self._total = run.total(self.by, self.optimizer)
        for one in given:
            if self._total is None and getattr(one, "needs_total", False):
                raise ValueError(
                    f"{self.called}: {one!r} needs to know how many {self.by}s the run will have, and the "
                    "training source has no length. Bound the run with max_iterations=, or give the entry a length: "
                    "(train, lt.iterations(1000))" + (", and use by='iteration'." if self.by == "update" else ".")
                )
        self._bound = [bind(one, run, self._total) for one in given]
        self._stretch()
        warmup: Any = self.warmup or schedules.warmup()
        self._warmup = warmup.bound(run, "iteration" if self.by == "iteration" else "update", self.optimizer)
        if self.option == "momentum":
            self._try_momentum()

    def _try_momentum(self) -> None:
        """Refuse a momentum that would pass 1, as a warm-up that divides by too small a ratio makes it."""
        total, warmup = self._total or 1, self._warmup
        for group, one in zip(self.optimizer.param_groups, self._schedules, strict=True):
            held = group.get(self._initial, self.held(group))
            base = read({"": held})[""]
            for done in range(0, total, max(1, total // POINTS)):
                steps = warmup.count if done and self.by == "epoch" else done  # it counts updates then
                self._require_momentum(group, one(done, self._total, base) / warmup(steps), done)  # type: ignore[arg-type]

    def _require_momentum(self, group: dict[str, Any], value: float, done: int) -> None:
        if value > 1 or (value == 1 and "momentum" not in group):  # Adam divides by 1 - betas[0]
            raise ValueError(
                f"schedule_momentum: the momentum would be {value:g} at {self.by} {done}. A warm-up divides it by its "
                "factor: give lt.schedules.warmup(..., ratio=) a ratio above the momentum, or schedule a lower one."
            )

    def on_start(self, run: Run) -> None:
        """In a fresh run, begin from the base value; from the hand's, if it was changed since another run wrote it."""
        if isinstance(self.schedule, LRScheduler):
            return
        for group in () if run.resumed else self.optimizer.param_groups:
            held, written = self.held(group), group.pop(self._written, None)
            if written is not None and held != written:
                group[self._initial] = held
            group.pop(self._by_hand, None)
        self._stretch()

    # At each iteration

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        by, option, optimizer = self.by, self.option, self.optimizer
        initial, written, by_hand, divides = self._initial, self._written, self._by_hand, option == "momentum"
        for state in states:
            if state.run is None:
                raise RuntimeError(f"{self.called}: these states belong to no run, so nobody counts. Iterate a phase.")
            if not self._ready:  # in a plain pipe
                self.on_build(state.run)
            updates, groups = state.run.progress.updates.get(optimizer, 0), optimizer.param_groups
            done = updates if by == "update" else state.iteration if by == "iteration" else state.epoch
            if isinstance(self.schedule, LRScheduler):
                self._step(self.schedule, done)
            else:
                warmup: Any = self._warmup
                steps = updates if by == "epoch" else done  # a warm-up counts updates under a schedule by epoch too
                factor = warmup(steps) if steps < warmup.count else 1.0
                if len(self._schedules) != len(groups):
                    self._stretch()
                for group, one in zip(groups, self._schedules, strict=True):
                    base = group.get(initial)
                    if base.__class__ is not float:
                        base = self._base(group)
                    value = one(done, self._total, base)
                    if divides:
                        self._write(group, value / factor, done)
                    elif (held := group[option]).__class__ is float and held == group.get(written):
                        group[option] = group[written] = factor * value * group.get(by_hand, 1.0)
                    else:
                        self._write(group, factor * value, done)
            shown = self.held(groups[0]) if divides else groups[0][option]
            if isinstance(shown, Tensor):  # it is filled again
                shown = shown.detach().clone()
            if self._gauge:
                state.gauges[self._gauge] = shown
            else:
                state.lr = shown
            yield state

    def ahead(self, group: dict[str, Any], one: Schedule, done: Sequence[int], steps: Sequence[int]) -> list[float]:
        """What `__call__` will write into *group*, step by step, if no hand changes it: `Run.simulate` asks.

        Args:
            group: A param group into which it has written before.
            one: The schedule of that group.
            done: What the schedule counts, at each step.
            steps: What the warm-up counts; never falls.
        """
        total, warmup, base, by_hand = self._total, self._warmup, group[self._initial], group.get(self._by_hand, 1.0)
        warm = bisect_left(steps, warmup.count)  # type: ignore[type-var]  # it is bound: a number
        warming, after = zip(done[:warm], steps[:warm], strict=True), done[warm:]
        if self.option == "momentum":
            values = [one(n, total, base) / warmup(step) * by_hand for n, step in warming]
            return values + [one(n, total, base) / 1.0 * by_hand for n in after]
        values = [warmup(step) * one(n, total, base) * by_hand for n, step in warming]
        return values + [1.0 * one(n, total, base) * by_hand for n in after]

    def held(self, group: dict[str, Any]) -> Any:
        """What *group* has for the option now."""
        return group[self.option] if self.option in group else group["betas"][0]

    def _base(self, group: dict[str, Any]) -> float:
        """Note the base value of *group*, as a number: of a tensor the device is read, this once."""
        base = group[self._initial] = read({"": group.get(self._initial, self.held(group))})[""]
        return base

    def _write(self, group: dict[str, Any], value: float, done: int) -> None:
        """Set the option, with an eye to what a hand has done since it was written last."""
        held = self.held(group)
        if isinstance(held, Tensor):
            held.fill_(value)
            return
        if held != group.get(self._written, held) and not self._was_changed(group, held):
            return
        value *= group.get(self._by_hand, 1.0)
        if self.option == "momentum":
            self._require_momentum(group, value, done)
        group[self._written] = value
        if self.option in group:
            group[self.option] = value
        else:
            group["betas"] = (value, *group["betas"][1:])

    def _was_changed(self, group: dict[str, Any], held: Any) -> bool:
        """Take a value that was changed by hand into account; False if it holds for this iteration only."""
        written = group[self._written]
        if not written:
            group[self._written] = held
            return False
        group[self._by_hand] = group.get(self._by_hand, 1.0) * held / written
        warn(
            f"{self.called}: {self.option} was changed by hand from {written:g} to {held:g}; "
            f"what follows is scaled by {group[self._by_hand]:g}."
        )
        return True

    def _stretch(self) -> None:
        """One schedule goes for all groups, also for those that are added later, but for those that are set apart."""
        groups = self.optimizer.param_groups
        if isinstance(self.schedule, list | tuple):
            require_one_each(self.called, self.schedule, groups)
            self._schedules = self._bound
            return
        bases = {str(n): group.get(self._initial, self.held(group)) for n, group in enumerate(groups)}
        apart = [self.option in APART and not base for base in read(bases).values()]
        still = schedules.constant()
        self._schedules = [still if aside and not all(apart) else self._bound[0] for aside in apart]

    def leaves(self, state: State) -> str:
        """What a failure in the middle of this part can leave behind."""
        steps = isinstance(self.schedule, LRScheduler)
        return "torch's scheduler may have counted this step already, and would count it again" if steps else ""

    def close(self) -> None:
        """Step torch's scheduler once more when the run is over, as the loop by hand has."""
        if self._run is not None and self._run.ended and isinstance(self.schedule, LRScheduler):
            progress = self._run.progress
            updates = progress.updates.get(self.optimizer, 0)
            self._step(
                self.schedule, {"update": updates, "iteration": progress.iteration, "epoch": progress.epoch}[self.by]
            )

    def _step(self, scheduler: LRScheduler, done: int) -> None:
        for _ in range(done - self.stepped):
            scheduler.step()
            self.stepped += 1
