"""Draw how a training went: a panel a metric, with all phases and runs in it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs

from .figures import new_figure, save, tidy
from .trainings import Row, Training, read_trainings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLUMNS = {1: 1, 2: 2, 3: 3, 4: 2, 5: 3, 6: 3, 9: 3}  # by panels; 4 for any other number
TRAINING = ("tab:gray", "tab:brown", "tab:olive")
JUDGING = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:pink", "tab:cyan")
OF_LOG = ("lr", "grad_norm")  # what log adds to a step's own metrics


def plot(
    what: Any,
    metrics: str | Sequence[str] | None = None,
    *,
    path: str | Path | None = None,
    x: Literal["iteration", "epoch", "seconds"] = "iteration",
    smooth: float = 0.0,
    labels: Sequence[str] | None = None,
    log_scale: bool | None = None,
) -> Figure:
    """Draw the curves of a training, or those of several to compare them (extra: ``plot``).

    A panel a metric. Means over a pass are points, rows within a pass (those of `log`) a line. Values that are not
    finite leave a gap, with a red cross at the bottom. Neither pyplot nor a backend is touched.

    Args:
        what: A run, whose ``run.history`` is drawn, and the rows that its ``log(folder)`` has written; or such a
            folder, or a ``log.jsonl``. A list of these draws several, a mapping gives them names.
        metrics: Names without the phase, as in ``["loss", "accuracy"]``; also ``"lr"``, ``"grad_norm"``. One with it,
            as in ``run.results``, draws that phase alone: ``"val/accuracy"``. By default those that training and
            validation both have, the loss first; names with a ``/`` only if they are asked for.
        path: Where to save it; the ending says as what (``.png``, ``.svg``, ``.pdf``).
        x: What counts on the x axis: training iterations, epochs, or seconds at work within passes.
        smooth: From 0 to below 1: how much the line follows what came before; the raw one stays, fainter.
        labels: Names of the runs, in order.
        log_scale: Whether y axes are logarithmic; by default those of losses that fall by a factor of 10 or more.

    Returns:
        A ``matplotlib.figure.Figure``, which a notebook shows if it is the cell's value.

    Raises:
        ValueError: If there is nothing to draw, or an option is out of range.
        FileNotFoundError: If a folder has no ``log.jsonl``.
        LookupError: If nobody has written the metric.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> phase = lt.train(model, [torch.ones(4, 1)] * 3, lambda model, batch: model(batch).pow(2).mean())
        >>> run = lt.workflow([(phase | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1)), 1)], max_epochs=2)
        >>> results = run.to_end()
        >>> figure = lt.plot(run, path=folder / "curves.png")
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['loss']
    """
    if x not in ("iteration", "epoch", "seconds"):
        raise ValueError(f"plot: x must be 'iteration', 'epoch' or 'seconds', got {x!r}.")
    if not 0 <= smooth < 1:
        raise ValueError(f"plot: smooth must be from 0 (not at all) to below 1, got {smooth!r}.")
    trainings = read_trainings(what, labels)
    if x == "epoch":
        for training in trainings:
            training.require_epochs()
    names = _metrics(trainings, metrics)
    columns = COLUMNS.get(len(names), 4)
    rows = -(-len(names) // columns)
    figure = new_figure("plot", max(5.0, 4.2 * columns) if columns < 4 else 15.0, 3.0 * rows + 0.5)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
    for number, (name, axes) in enumerate(zip(names, panels, strict=False)):
        phase, metric = _split(trainings, name)
        _Panel(axes, name, phase, metric, x, smooth).draw(trainings, log_scale)
        if number + columns >= len(names):
            axes.set_xlabel("seconds at work" if x == "seconds" else x)
            axes.tick_params(labelbottom=True)
    for axes in panels[len(names) :]:
        axes.remove()
    _legend(figure, trainings)
    if path is not None:
        save(figure, path)
    return figure


def _metrics(trainings: list[Training], asked: str | Sequence[str] | None) -> list[str]:
    """The metrics to draw."""
    known = list(dict.fromkeys(key for training in trainings for row in training.rows for key in row.values))
    if asked is not None:
        names = [asked] if isinstance(asked, str) else list(asked)
        if not names:
            raise ValueError("plot: metrics is an empty list. Leave it out for those of training and validation.")
        of_phases = {f"{row.phase}/{key}" for training in trainings for row in training.rows for key in row.values}
        missing = [name for name in names if name not in known and name not in of_phases]
        if missing:
            raise LookupError(
                f"plot: nobody has written {', '.join(map(repr, missing))}; known are {', '.join(known)}."
            )
        return names
    usual = [name for name in known if "/" not in name and name not in OF_LOG]
    by_both = [name for name in usual if any(_in_all_phases(training, name) for training in trainings)]
    names = by_both or usual or known
    if not names:
        raise ValueError("plot: the rows hold no metric. Does the step return a loss?")
    return sorted(names, key=lambda name: name != "loss")


def _split(trainings: list[Training], name: str) -> tuple[str, str]:
    """The phase (empty for all) and the metric that *name* asks for."""
    if any(name in row.values for training in trainings for row in training.rows):
        return "", name
    phase, _, metric = name.partition("/")
    return phase, metric


def _in_all_phases(training: Training, name: str) -> bool:
    """Whether a phase that trains and one that does not have it; or any, where there is but one kind."""
    kinds = {row.phase in training.trains for row in training.rows}
    return {row.phase in training.trains for row in training.rows if name in row.values} == kinds


def _style(trainings: list[Training], training: Training, phase: str) -> dict[str, Any]:
    """How a phase's curve looks: of one run, colours tell phases apart; of several, they tell runs apart."""
    trains = phase in training.trains
    rank = [p for p in training.phases if (p in training.trains) is trains].index(phase)
    if len(trainings) == 1:
        palette = TRAINING if trains else JUDGING
        return {"color": palette[rank % len(palette)], "linestyle": "-", "marker": "o", "fillstyle": "full"}
    number = trainings.index(training)
    color: Any = f"C{number}"
    if len(trainings) > 10:
        from matplotlib import colormaps

        color = colormaps["viridis"](number / (len(trainings) - 1))
    marker = "osD^v"[rank % 5]
    if trains:
        return {"color": color, "linestyle": ":", "marker": marker, "fillstyle": "none"}
    return {"color": color, "linestyle": ("-", "--", "-.")[rank % 3], "marker": marker, "fillstyle": "full"}


@attrs.frozen(eq=False)
class _Panel:
    """One metric of all runs."""

    axes: Axes
    title: str
    phase: str  # the only one that is drawn; empty for all
    metric: str
    x: str
    smooth: float

    def draw(self, trainings: list[Training], log_scale: bool | None) -> None:
        tidy(self.axes)
        self.axes.set_title(self.title, loc="left", fontsize="medium")
        if len(trainings) == 1:
            self._mark_epochs(trainings[0])
        for training in trainings:
            for phase in training.phases:
                self._curve(training, phase, _style(trainings, training, phase))
        values = [row.values[self.metric] for t in trainings for row in t.rows if self._has(row)]
        if _is_logarithmic(self.metric, values) if log_scale is None else log_scale:
            self._set_logarithmic()
        self.axes.set_xlim(left=0)
        if self.x != "seconds":
            from matplotlib.ticker import MaxNLocator

            self.axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))

    def _has(self, row: Row) -> bool:
        return self.metric in row.values and self.phase in ("", row.phase)

    def _curve(self, training: Training, phase: str, style: dict[str, Any]) -> None:
        """The line and the points of one phase of one run."""
        rows = [row for row in training.rows if row.phase == phase and self._has(row)]
        within = [(row.at[self.x], row.values[self.metric]) for row in rows if not row.of_pass]
        passes = [(row.at[self.x], row.values[self.metric]) for row in rows if row.of_pass]
        if within:
            values = [value for _, value in within]
            self._line(within, color=style["color"], linewidth=0.9, alpha=0.3 if self.smooth else 0.6)
            if self.smooth:
                smoothed = _smoothed(values, self.smooth)
                points = [(x, value) for (x, _), value in zip(within, smoothed, strict=True)]
                self._line(points, color=style["color"], linestyle=style["linestyle"], linewidth=1.4)
        if passes:
            points_style = {**style, "linestyle": "none"} if within else style
            size = 4.5 if len(passes) <= 40 else 2.5 if len(passes) <= 150 else 0.0
            self._line(passes, **points_style, markersize=size, linewidth=1.4)
        lost = [x for x, value in within + passes if not math.isfinite(value)]
        if lost:
            at_the_bottom: dict[str, Any] = {
                "transform": self.axes.get_xaxis_transform(),
                "clip_on": False,
                "zorder": 5,
            }
            self.axes.plot(lost, [0.02] * len(lost), "x", color="tab:red", markersize=5, **at_the_bottom)

    def _line(self, points: list[tuple[float, float]], **options: Any) -> None:
        """Draw *points* with gaps where a value is not finite; one that is alone between two gaps gets a dot."""
        xs = [x for x, _ in points]
        ys = [y if math.isfinite(y) else math.nan for _, y in points]
        if "marker" not in options:
            around = [math.nan, *ys, math.nan]
            alone = [n for n in range(len(ys)) if math.isnan(around[n]) and math.isnan(around[n + 2])]
            options |= {"marker": ".", "markevery": alone}
        self.axes.plot(xs, ys, **options)

    def _mark_epochs(self, training: Training) -> None:
        """Light lines where epochs end, at most a dozen; a tint a phase, where several phases train."""
        passes = [(r.at[self.x], r.phase) for r in training.rows if r.of_pass and r.phase in training.trains]
        if self.x != "epoch":
            for end, _ in passes[: -1 : -(-len(passes) // 12) or 1]:
                self.axes.axvline(end, color="tab:gray", alpha=0.25, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        if len(training.trains) > 1:
            for (start, _), (end, phase) in itertools.pairwise([(0.0, ""), *passes]):
                color = _style([training], training, phase)["color"]
                self.axes.axvspan(start, end, color=color, alpha=0.1, linewidth=0, zorder=0)

    def _set_logarithmic(self) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter

        self.axes.set_yscale("log")
        self.axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        self.axes.yaxis.set_major_formatter(_short)
        self.axes.yaxis.set_minor_locator(LogLocator(subs="all", numticks=9))
        self.axes.yaxis.set_minor_formatter(NullFormatter())


def _short(value: float, position: float) -> str:
    return f"{value:g}"


def _is_logarithmic(metric: str, values: list[float]) -> bool:
    finite = [value for value in values if math.isfinite(value)]
    falls = bool(finite) and 0 < 10 * min(finite) <= max(finite)
    return metric.endswith("loss") and falls


def _smoothed(values: list[float], smooth: float) -> list[float]:
    """Means of what came so far, the newest first in weight; gaps stay gaps, and weigh nothing."""
    result, total, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, weight = smooth * total + value, smooth * weight + 1
        result.append(total / weight if math.isfinite(value) else math.nan)
    return result


def _legend(figure: Figure, trainings: list[Training]) -> None:
    """One line above the panels: phases of one run; runs, and how their phases look."""
    from matplotlib.lines import Line2D

    if len(trainings) == 1:
        only = trainings[0]
        drawn = {row.phase for row in only.rows}
        handles = [
            Line2D([], [], label=phase, markersize=4.5, **_style(trainings, only, phase))
            for phase in only.phases
            if phase in drawn
        ]
    else:
        styles = {p: {**_style(trainings, t, p), "color": "black"} for t in trainings for p in t.phases}
        handles = [
            Line2D([], [], label=t.name, linewidth=3, color=_style(trainings, t, t.phases[0])["color"])
            for t in trainings
        ]
        handles += [Line2D([], [], label=phase, markersize=4.5, **style) for phase, style in styles.items()]
    if any(not math.isfinite(value) for t in trainings for row in t.rows for value in row.values.values()):
        handles.append(Line2D([], [], label="not finite", linestyle="none", marker="x", color="tab:red", markersize=5))
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 6), frameon=False)
