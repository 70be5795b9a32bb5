"""Try out learning rates, and put everything back."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from torch import Tensor
from torch.optim import Optimizer

from ..agenda import Agenda, Entry
from ..checkpoints.memory import memory, remember
from ..checks import require_optimizer, whole_number
from ..figures import new_figure, save, tidy
from ..links import Slot
from ..means import read
from ..middleware.backward import backward
from ..middleware.forward import forward
from ..phases import Phase
from ..pipeline import Chain, Middleware, flatten, name_of
from ..state import Progress, State
from .kept import kept, require_repeatable
from .mended import mended

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..run import Run

# The house's own parts that report, judge or stop: a sweep has no use for them, and some would end it.
IDLE = {"early_stop", "ema", "measure", "memory", "nan_guard", "profile", "stop_after", "swa", "timer"}
IDLE |= {"unused_params", "watch"}
FEWEST = 10  # iterations that a slope can be told from


@attrs.frozen(eq=False, kw_only=True, repr=False)
class LrFound:
    """What `lr_find` saw.

    Args:
        lrs: Learning rates of the first param group, one an iteration.
        losses: The loss of each iteration, measured before the update with that learning rate.
        smoothed: The losses, smoothed to both sides, so that the curve does not lag behind. Losses above the highest of
            the first ten count as that one; those that are not finite are left out.
        suggestion: Where the smoothed loss falls most steeply; None if it does not fall.
        reason: Why there is no suggestion, or what to mind about it; empty if there is nothing to say.
        diverged: Whether the sweep ended early.

    Example:
        >>> LrFound(lrs=[0.1, 1.0], losses=[2.0, 2.0], smoothed=[2.0, 2.0], reason="the loss did not fall")
        lr_find: no suggestion: the loss did not fall (2 iterations, lr 0.1 to 1).
    """

    lrs: Sequence[float]
    losses: Sequence[float]
    smoothed: Sequence[float]
    suggestion: float | None = None
    reason: str = ""
    diverged: bool = False

    def __repr__(self) -> str:
        tried = f"{len(self.lrs)} iterations, lr {self.lrs[0]:.3g} to {self.lrs[-1]:.3g}"
        tried += ", where it diverged" if self.diverged else ""
        if self.suggestion is None:
            return f"lr_find: no suggestion: {self.reason} ({tried})."
        mind = f" Mind: {self.reason}." if self.reason else ""
        return (
            f"lr_find: suggestion {self.suggestion:.3g}, where the loss falls most steeply ({tried}).{mind}\n"
            f"Make the optimizer with lr={self.suggestion:.3g}, or set it before the run begins: "
            f'optimizer.param_groups[0]["lr"] = {self.suggestion:.3g}. See the curve with .plot().'
        )

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the loss over the learning rate, and write the picture to *path* if one is given (extra: ``plot``)."""
        figure = new_figure("lr_find", 6.0, 3.6)
        axes = figure.subplots()
        tidy(axes)
        axes.plot(self.lrs, self.losses, ".", color="tab:gray", alpha=0.5, markersize=4, label="loss")
        axes.plot(self.lrs[: len(self.smoothed)], self.smoothed, color="tab:blue", label="smoothed")
        if self.suggestion is not None:
            value = self.smoothed[list(self.lrs).index(self.suggestion)]
            label = f"suggestion {self.suggestion:.3g}"
            axes.plot([self.suggestion], [value], "o", color="tab:red", label=label)
            axes.axvline(self.suggestion, color="tab:red", linewidth=0.8, alpha=0.5)
        axes.set(xlabel="learning rate", ylabel="loss", xscale="log")
        if self.smoothed:
            finite = self.losses[: len(self.smoothed)]
            start, lowest = max(finite[:FEWEST]), min(finite)
            margin = 0.1 * (start - lowest) or 0.1 * abs(start) or 1.0  # what diverged may leave the picture
            axes.set_ylim(lowest - margin, start + 2 * margin)
        axes.legend(frameon=False, loc="lower left")
        if path is not None:
            save(figure, path)
        return figure


def lr_find(
    run: Run | Phase,
    optimizer: Optimizer | None = None,
    *,
    low: float = 1e-7,
    high: float = 10.0,
    iterations: int = 100,
    smooth: float = 0.8,
    stop_at: float = 4.0,
) -> LrFound:
    """Try learning rates from *low* to *high* on the run's own training phase, and leave the run as it was.

    The learning rate range test of Smith, "Cyclical Learning Rates for Training Neural Networks" (2017), section 3.3,
    with steps that multiply instead of add. The phase's own parts do the training, apart from schedules (of whatever
    option) and from the house's parts that report, judge or stop. Afterwards weights, buffers, gradients, optimizer,
    scaler, modes and random generators are what they were, to the bit; a generator that hides in a function given as
    the source is not found. The device is read once an iteration.

    Args:
        run: A run that has not begun, or stands between two iterations; or a training phase.
        optimizer: Whose learning rate it is, and thereby which phase is run; may be left out if there is only one.
        low: Learning rate of the first iteration, for the first param group. Other groups keep their ratio to it.
        high: Learning rate of the last iteration.
        iterations: Batches to try; the source begins again as often as needed.
        smooth: From 0 to below 1: how far the loss is smoothed before its slope is taken. A loss *n* iterations away
            weighs ``smooth ** n``, to both sides.
        stop_at: The sweep ends where the loss is not finite, or its running mean has come above this many times its
            lowest value; for losses that fall to 0 or below, the height of the fall counts in place of the value.

    Returns:
        The learning rates, the losses, a suggestion, and ``plot()``.

    Raises:
        RuntimeError: If an iteration is open, a source can be walked through only once, or a model has lazy layers that
            have not seen a batch.
        ValueError: If it is not plain which optimizer is meant.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> step = lambda model, batch: (model(batch) - 3).pow(2).mean()
        >>> train = lt.train(model, [torch.ones(4, 1)] * 5, step) | lt.optimize(sgd)
        >>> found = lt.lr_find(lt.workflow([(train, 1)], max_epochs=3))
        >>> 0.001 < found.suggestion < 1, found.diverged, sgd.param_groups[0]["lr"]
        (True, True, 0.1)
    """
    _check(low, high, smooth, stop_at)
    whole_number("lr_find: iterations", iterations, FEWEST)
    if optimizer is not None:
        require_optimizer("lr_find: optimizer", optimizer)
    run = iter(run) if isinstance(run, Phase) else run
    if not hasattr(run, "_agenda"):
        raise TypeError(f"lr_find: give a run or a training phase, got {run!r:.80}.")
    cursor = run._cursor  # a run that is not built yet stays so
    if cursor is not None:
        cursor.require_rest("lr_find")
        if cursor.state is not None:
            raise RuntimeError("lr_find: an iteration is open. Finish it first: next(run).")
    phase, line, optimizer = _choose(run, optimizer)
    require_repeatable("lr_find", [phase])
    lrs = [low * (high / low) ** (n / (iterations - 1)) for n in range(iterations)]
    tried: list[float] = []
    losses: list[float] = []
    sweep = _sweep(optimizer, lrs, tried, losses, smooth, stop_at)
    swept = attrs.evolve(phase, middlewares=_parts(phase, sweep, optimizer))
    trial = type(run)(Agenda((Entry(swept, 1, iterations),), max_rounds=1))
    if cursor is not None:
        _go_on_from(line, cursor.progress, trial)
    with kept(trial.cursor, optimizer):
        try:
            trial.to_end()
        finally:
            trial.close()
    if not losses:
        raise RuntimeError(f"lr_find: no batch of {phase.name} came through to its loss; a part drops them all.")
    return _judge(tried, losses, smooth, _diverged(losses, smooth, stop_at))


def _check(low: float, high: float, smooth: float, stop_at: float) -> None:
    if not 0 < low < high < math.inf:
        raise ValueError(f"lr_find: low must be above 0 and below high, got low={low!r}, high={high!r}.")
    if not 0 <= smooth < 1:
        raise ValueError(f"lr_find: smooth must be from 0 (not at all) to below 1, got {smooth!r}.")
    if not stop_at > 1:
        raise ValueError(f"lr_find: stop_at must be above 1, got {stop_at!r}. To never stop, give math.inf.")


def _choose(run: Run, optimizer: Optimizer | None) -> tuple[Phase, list[Slot], Optimizer]:
    """The training phase to try as it stands, its parts in the run, and the optimizer whose learning rate it is."""
    cursor, phases = run._cursor, [phase for phase in run._agenda.phases if phase.trains]
    lines = [[] if cursor is None else cursor.lines[id(phase)] for phase in phases]
    phases = phases if cursor is None else [mended(cursor, phase) for phase in phases]
    if not phases:
        raise ValueError("lr_find: the run has no training phase.")
    parts: list[tuple[int, Any]] = [
        (n, part) for n, phase in enumerate(phases) for _, part in flatten(phase.middlewares)
    ]
    moved: list[tuple[int, Optimizer]] = [(n, part.optimizer) for n, part in parts if _moves(part)]
    if optimizer is not None:
        n = next((n for n, o in moved if o is optimizer), 0)
        return phases[n], lines[n], optimizer
    different = {id(o): o for _, o in moved}
    if len(different) != 1:
        names = ", ".join(type(o).__name__ for o in different.values())
        what = f"the run has {len(different)} optimizers ({names})" if different else "no part moves the weights"
        raise ValueError(f"lr_find: {what}. Say whose learning rate to try: lr_find(run, optimizer).")
    n, optimizer = moved[0]
    return phases[n], lines[n], optimizer


def _moves(part: Any) -> bool:
    return isinstance(getattr(part, "optimizer", None), Optimizer) and not hasattr(part, "schedule")


def _parts(phase: Phase, sweep: Middleware, optimizer: Optimizer) -> tuple[Middleware, ...]:
    """The phase's parts that shape the training, with *sweep* behind the forward that makes *optimizer*'s loss."""
    parts = [(name, part) for name, part in flatten(phase.middlewares) if not _is_idle(part)]
    mine = next((n for n, (_, part) in enumerate(parts) if getattr(part, "optimizer", None) is optimizer), 0)
    place = max((n + 1 for n in range(mine) if isinstance(parts[n][1], forward)), default=0)
    whole = [Chain((part,), name.rpartition(".")[0]) for name, part in parts]
    return (*whole[:place], sweep, *whole[place:])


def _is_idle(part: Any) -> bool:
    schedules = hasattr(part, "schedule") and hasattr(part, "optimizer")
    return schedules or (type(part).__name__ in IDLE and type(part).__module__.startswith("looptools."))


def _sweep(
    optimizer: Optimizer, lrs: list[float], tried: list[float], losses: list[float], smooth: float, stop_at: float
) -> Middleware:
    """A part that raises the learning rate from iteration to iteration, and ends the pass where the loss diverges.

    It notes the learning rates that it came to, and the losses.
    """
    bases = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    first = next((base for base in bases if base), 0.0)
    factors = [base / first if first else 1.0 for base in bases]

    def lr_find(states: Iterable[State]) -> Iterator[State]:
        for state in states:
            if state.loss is None:
                raise TypeError('lr_find: the step gave no loss. Return it, or a mapping with "loss".')
            tried.append(lrs[state.index])
            losses.append(read({"loss": state.loss})["loss"])
            if _diverged(losses, smooth, stop_at):
                return  # ends the pass here: what diverged moves nothing, and meets no other part
            for group, factor in zip(optimizer.param_groups, factors, strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(tried[-1] * factor)
                else:
                    group["lr"] = tried[-1] * factor
            yield state

    return lr_find


def _diverged(losses: list[float], smooth: float, stop_at: float) -> bool:
    """Whether the newest loss ends the sweep."""
    if not math.isfinite(losses[-1]):
        return True
    means = [total / weight for total, weight in _sums(losses, smooth)][FEWEST - 1 :]  # one batch alone says little
    if len(means) < 2:
        return False
    lowest = min(means)
    return means[-1] > lowest + (stop_at - 1) * max(abs(lowest), means[0] - lowest)


def _go_on_from(line: Iterable[Slot], done: Progress, trial: Run) -> None:
    """Give *trial*'s parts what those of the run remember, and its states the same numbers."""
    trial.progress = Progress(epoch=done.epoch, iteration=done.iteration, updates=dict(done.updates))
    there = [slot.part for slot in line if not _is_idle(slot.part)]
    here = [slot.part for slot in trial.cursor.slots if name_of(slot.part) != "lr_find"]
    for old, part in zip(there, here, strict=False):
        if not isinstance(part, backward):  # the trial opens windows of its own
            remember(part, copy.deepcopy(memory(old)))


def _judge(lrs: list[float], losses: list[float], smooth: float, diverged: bool) -> LrFound:
    """Find the steepest descent."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    ceiling = max(finite[:FEWEST], default=0.0)  # what diverges at the end would spread over half the curve
    curve = _to_both_sides([min(loss, ceiling) for loss in finite], smooth)
    found = partial(LrFound, lrs=lrs, losses=losses, smoothed=curve, diverged=diverged)
    if len(curve) < FEWEST:
        return found(reason=f"the loss was not finite after {len(curve)} iterations; try a lower low=")
    bottom = curve.index(min(curve))
    noise = sum(abs(loss - mean) for loss, mean in zip(finite[: bottom + 1], curve, strict=False)) / (bottom + 1)
    if curve[0] - curve[bottom] <= max(noise, abs(curve[0]) / 1000):
        return found(reason="the loss hardly fell, for all its noise; try other bounds, or more iterations=")
    steepest = min(range(1, max(bottom, 2)), key=lambda n: curve[n + 1] - curve[n - 1])
    falling = bottom >= len(curve) - 2
    reason = "the loss was still falling where the sweep ended; try a higher high=" if falling else ""
    return found(suggestion=lrs[steepest], reason=reason)


def _sums(values: Iterable[float], smooth: float) -> list[tuple[float, float]]:
    """Sum and weight of what came so far, where a value *n* back weighs ``smooth ** n``."""
    sums, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = smooth * total + value, smooth * weight + 1
        sums.append((total, weight))
    return sums


def _to_both_sides(values: list[float], smooth: float) -> list[float]:
    """Means in which a value *n* away weighs ``smooth ** n``."""
    before, behind = _sums(values, smooth), reversed(_sums(reversed(values), smooth))
    return [
        (total - value + other) / (weight - 1 + other_weight)
        for value, (total, weight), (other, other_weight) in zip(values, before, behind, strict=True)
    ]
