"""What a simulated run will do: its passes, learning rates, rows and files."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from ... import html
from ...figures import new_figure, save, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEW = 8  # changes of a value within a pass that are listed one by one
MOST_POINTS = 4000  # of a drawn line


@attrs.frozen
class Event:
    """One thing that the run will do.

    Args:
        kind: ``"pass"``, ``"call"``, ``"lr"`` (or another scheduled option), ``"log"``, ``"checkpoint"``, ``"freeze"``,
            ``"thaw"``, ``"average"`` or ``"end"``.
        phase: Name of the phase, or of the function that is called.
        epoch: As the state says it, from 0; in validation, that of the last training state.
        iteration: As the state says it.
        index: Of the state within its pass; None if it is the last one, and that is unknown.
        part: Full name of the part that does it; of a scheduled option, the optimizer and group that has it.
        text: What it does: of a row its kind, of a checkpoint its file (empty if unknown).
    """

    kind: str
    phase: str
    epoch: int
    iteration: int
    index: int | None
    part: str = ""
    text: str = ""


@attrs.frozen(eq=False)
class Rows:
    """The rows that one `log` writes in a pass.

    Args:
        part: Full name of the log.
        at: Indices of the states with a row of the iterations before.
        of_pass: Whether there is one for the whole pass, too.
    """

    part: str
    at: Sequence[int | None]
    of_pass: bool


@attrs.frozen(eq=False, kw_only=True)
class Pass:
    """One pass, what is still to come of it; or a function of the workflow that is called.

    Args:
        phase: Name of the phase, or of the function.
        trains: Whether it trains.
        round: Walks through the workflow before it.
        epoch: As its states say it, from 0.
        iteration: As its first state says it.
        done: Training passes done when it is over.
        index: Of its first state.
        length: How many states it has; None if that is unknown.
        whole: Whether it ends, and is not broken off.
        function: Whether it is a function, which nobody calls here.
        rows: What logs write.
        marks: What other parts do.
    """

    phase: str
    trains: bool
    round: int
    epoch: int
    iteration: int
    done: int
    index: int = 0
    length: int | None = 0
    whole: bool = True
    function: bool = False
    rows: tuple[Rows, ...] = ()
    marks: tuple[Event, ...] = ()

    @property
    def row_count(self) -> int:
        """Rows of all logs."""
        return sum(len(rows.at) + rows.of_pass for rows in self.rows)

    def events(self) -> Iterator[Event]:
        """What happens in it, in order; the values of schedules are not in it."""
        yield Event("call" if self.function else "pass", self.phase, self.epoch, self.iteration, self.index)
        yield from sorted([*self._logged(), *self.marks], key=lambda event: _late(event.index))

    def _logged(self) -> Iterator[Event]:
        last = None if self.length is None else self.index + self.length - 1
        for rows in self.rows:
            for index in rows.at:
                yield self.event("log", index, rows.part, "iterations")
            if rows.of_pass:
                yield self.event("log", last, rows.part, "pass")

    def event(self, kind: str, index: int | None, part: str, text: str) -> Event:
        """Something at one of its states."""
        past = index - self.index if self.trains and index is not None else 0
        return Event(kind, self.phase, self.epoch, self.iteration + past, index, part, text)


@attrs.frozen(eq=False, kw_only=True, repr=False)
class Simulation:
    """What a run will do from where it stands: made by ``run.simulate()``, printed as a table, drawn by `plot`.

    Args:
        begins: Training iterations done before.
        passes: All passes to come, and calls of functions, in order.
        curves: By option (``"lr"``, and what else is scheduled) and optimizer, for each param group a list with the
            value that is in force in each training iteration to come; nan where that is unknown.
        updates: By optimizer, the training iterations in which it moves; one of which that is unknown is left out.
        averages: By part, how often `ema` and `swa` take the weights in.
        iterations: Training iterations done at the end,
        epochs: training passes (None if that is unknown),
        rounds: and walks through the workflow.
        ended: What ``run.ended`` will say.
        unknown: What cannot be foreseen, by the name of the part.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> train = lt.train(model, [torch.ones(1, 1)] * 2, lambda model, batch: model(batch).mean())
        >>> train = train | lt.schedule_lr(sgd, lt.schedules.multistep([3], gamma=0.5), by="epoch") | lt.optimize(sgd)
        >>> lt.workflow([(train, 1)], max_epochs=5).simulate()
        simulation: 5 epochs, 10 iterations, 10 updates
        epoch (from 1)  pass   batches  lr
        1 to 3          train        2  0.1
        4 to 5          train        2  0.05
        end: finished: 5 epochs, 10 iterations
    """

    begins: int
    passes: tuple[Pass, ...]
    curves: Mapping[str, Mapping[str, list[list[float]]]]
    updates: Mapping[str, Sequence[int]]
    averages: Mapping[str, int] = attrs.field(factory=dict)
    iterations: int
    epochs: int | None
    rounds: int | None
    ended: str
    unknown: tuple[str, ...] = ()

    @property
    def lr(self) -> Mapping[str, list[list[float]]]:
        """Learning rates: ``sim.lr["optimizer"][0][i]`` is the first group's in the i-th training iteration to come."""
        return self.curves.get("lr", {})

    @property
    def events(self) -> list[Event]:
        """Everything in order: passes, changes of values, rows, checkpoints, the end.

        A value that changes more than a few times in a pass is there once, with its first, last, lowest and highest.
        """
        found: list[Event] = []
        now: dict[str, float] = {}
        for one in self.passes:
            first, *rest = one.events()
            changes = list(self._changes(one, now)) if one.trains else []
            found += [first, *sorted([*changes, *rest], key=lambda event: _late(event.index))]
        last = found[-1] if found else Event("end", "", 0, self.begins, None)
        return [*found, attrs.evolve(last, kind="end", part="", text=self.ended)]

    def _changes(self, one: Pass, now: dict[str, float]) -> Iterator[Event]:
        """Where values change in a pass; *now* is what they were before it."""
        for option, label, values in self.columns():
            here, name = self.within(one, values), f"{option} of {label}"
            if not here:
                continue
            at = changes(here)
            if here[0] != now.get(name):  # also nan
                at = [0, *at]
            now[name] = here[-1]
            if len(at) <= FEW:
                for n in at:
                    yield one.event(option, one.index + n, label, f"{here[n]:g}")
            else:
                yield one.event(option, one.index, label, _span(here))

    def columns(self) -> Iterator[tuple[str, str, list[float]]]:
        """Each scheduled option of each param group: its name, whose it is, and the values."""
        for option, optimizers in self.curves.items():
            for name, groups in optimizers.items():
                for n, values in enumerate(groups):
                    yield option, name if len(groups) == 1 else f"{name}[{n}]", values

    def within(self, one: Pass, values: list[float]) -> list[float]:
        """The *values* of one training pass."""
        begins = one.iteration - self.begins
        return values[begins : begins + (one.length or 0)]

    def __repr__(self) -> str:
        from .simulation_table import table

        return table(self)

    def _repr_html_(self) -> str:
        """The curves of the first param groups, small, and the table."""
        drawn: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for option, label, values in self.columns():
            if label.partition("[")[2] in ("", "0]"):
                drawn.setdefault(option, {})[label] = _points(values, self.begins, 120)
        curves = "".join(html.curve(option, series) for option, series in drawn.items() if any(series.values()))
        head, _, rest = repr(self).partition("\n")
        style = "margin:0;background:none;color:inherit;overflow-x:auto"
        what = html.text(f"· {head.removeprefix('simulation: ')}")
        return html.box(f"<b>Simulation</b> {what}", curves, f'<pre style="{style}">{html.text(rest)}</pre>')

    def plot(self, *, path: str | Path | None = None) -> Figure:
        """Draw the scheduled values over the training iterations, with ends of epochs, checkpoints and thaws.

        A panel for each option, a line for each param group whose values differ. Neither pyplot nor a backend is
        touched (extra: ``plot``).

        Args:
            path: Where to save it; the ending says as what (``.png``, ``.svg``, ``.pdf``).

        Returns:
            A ``matplotlib.figure.Figure``, which a notebook shows if it is the cell's value.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        options = list(self.curves) or ["lr"]
        figure = new_figure("simulate().plot", 8.0, 2.6 * len(options) + 0.6)
        panels = list(figure.subplots(len(options), 1, squeeze=False, sharex=True).flat)
        for option, axes in zip(options, panels, strict=True):
            self._draw(axes, option)
        panels[-1].set_xlabel("iteration")
        panels[-1].xaxis.get_major_locator().set_params(integer=True)
        if path is not None:
            save(figure, path)
        return figure

    def _draw(self, axes: Axes, option: str) -> None:
        tidy(axes)
        axes.set_title(option, loc="left", fontsize="medium")
        drawn: list[list[float]] = []
        for name, label, values in self.columns():
            if name == option and values not in drawn:
                drawn.append(values)
                points = _points(values, self.begins, MOST_POINTS)
                axes.plot([x for x, _ in points], [y for _, y in points], drawstyle="steps-post", label=label, lw=1.4)
        ends = [one.iteration + (one.length or 0) for one in self.passes if one.trains]
        for end in ends[: -1 : -(-len(ends) // 12) or 1]:
            axes.axvline(end, color="tab:gray", alpha=0.25, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        events = [event for one in self.passes for event in one.marks]
        saved = [event.iteration + 1 for event in events if event.kind == "checkpoint"]
        if saved:
            marks: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 3}
            axes.plot(saved, [0.0] * len(saved), "^", color="tab:green", markersize=4, label="checkpoint", **marks)
        for event in events:
            if event.kind == "thaw":
                axes.axvline(event.iteration + 1, color="tab:orange", linewidth=1.0, label=f"thaw {event.text}")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small", frameon=False)


def changes(values: Sequence[float]) -> list[int]:
    """The indices at which a value is another than the one before; nan is like nan.

    Example:
        >>> changes([1.0, 1.0, 0.5, math.nan, math.nan])
        [2, 3]
    """
    differ = map(operator.ne, values, itertools.islice(values, 1, None))
    found = [n for n, here in enumerate(differ, 1) if here]
    return [n for n in found if not (math.isnan(values[n]) and math.isnan(values[n - 1]))]


def _span(values: list[float]) -> str:
    low, high = min(values), max(values)
    ends = f"{values[0]:.4g} to {values[-1]:.4g}"
    return ends if {low, high} <= {values[0], values[-1]} else f"{ends}, within {low:.4g} and {high:.4g}"


def _late(index: int | None) -> float:
    return math.inf if index is None else index


def _points(values: list[float], begins: int, most: int) -> list[tuple[float, float]]:
    """At most about so many of the values, with their iterations: where a value jumps, and evenly between."""
    stride = -(-len(values) // most) or 1
    jumps = changes(values)
    at = set(range(0, len(values), stride)) | set(jumps if len(jumps) <= most else ())
    return [(begins + n, values[n]) for n in sorted(at | ({len(values) - 1} if values else set()))]
