"""Write down how it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
from torch import Tensor

from ..intervals import Interval, interval
from ..links import raise_all
from ..means import FOLD_AT, Means
from ..pipeline import name_of, numbered
from ..sinks import CSV, FACTS, Bar, JsonLines, Lines, Sink, TensorBoard
from ..sinks.delivery import Delivery, Parcel
from ..sinks.pictures import flattened, picture, rendered
from ..sinks.redact import plain
from ..sinks.rows import trained
from ..state import State

if TYPE_CHECKING:
    from ..run import Run

WHO_SHOWS = "TensorBoard does, in lt.log(folder), and to=[lt.sinks.WandB(...)]"  # all that can be shown


def _own_sinks(to: Any) -> tuple[Sink, ...]:
    """Sinks of this part's own; what cannot be one is refused."""
    if not isinstance(to, list | tuple):
        raise TypeError(f"log: to must be a list of sinks, got {to!r:.80}. Write to=[{name_of(to)}(...)].")
    for sink in to:
        if isinstance(sink, type):
            raise TypeError(f"log: {sink.__name__} in to= is a class. Make a sink of it: {sink.__name__}(...).")
        if not callable(getattr(sink, "write", None)) or not callable(getattr(sink, "close", None)):
            raise TypeError(
                f"log: {sink!r:.80} in to= is no sink: it needs the methods write(row, state) and close(). "
                "lt.sinks has some: CSV(path), WandB(project), MLflow(experiment)."
            )
    return tuple(sink.fresh() if hasattr(sink, "fresh") else sink for sink in to)


def _hparams(values: Any) -> dict[str, Any] | None:
    if values is not None and not isinstance(values, Mapping):
        kind = type(values).__name__  # what is in it may be secret
        raise TypeError(f"log: hparams must be a mapping of names to values, such as vars(args), got a {kind}.")
    return None if values is None else plain(values)


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class log:
    """Log the training every so often, and each phase at the end of its pass. Piped onto the run.

    A training row holds the means since the one before, weighted by ``num_samples``: the step's scalars and
    ``grad_norm``; further the learning rate now, and the newest of ``state.gauges``. A row at the end of a pass holds
    ``run.results`` of that phase. The device is read once a row. Names with a ``/`` in them are left out of lines
    and bar.

    *folder* gets ``log.jsonl``, one JSON object a line with the state's own counters (from 0), and
    ``tensorboard/``. A resumed run continues them where its checkpoint stood; a fresh one in a used
    folder renames the old ones to ``log.1.jsonl`` and so on. Neither environment nor command line is written.

    If a sink raises, the others have the row already; ``next(run)`` gives it to that sink once more.
    ``run["log"]`` has `image`, `histogram`, `text` and `figure`, to be called at any time; what is shown before the
    run has begun is written with its first iteration, since until then it may be resumed.

    Args:
        folder: Where files go, made if missing; None writes none.
        every: Training iterations between rows, an interval, or a predicate of the state.
        line: Called with each readable line; None for silence.
        bar: Show a tqdm bar, and lines for whole passes only (extra: ``demo``).
        tensorboard: Write TensorBoard's event files into *folder*.
        csv: Write all rows as a table into ``log.csv``.
        to: Further sinks, such as ``lt.sinks.WandB("project")`` or your own: see `lt.sinks.Sink`.
        hparams: Hyperparameters to note beside the curves. What looks like a secret (password, token, api_key ...)
            is redacted at once.

    Raises:
        TypeError: If a sink lacks write or close, or *hparams* is no mapping.
        ValueError: If a metric has the name of one of a row's facts (`lt.sinks.FACTS`), once, at its first row.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> phase = lt.train(model, [torch.ones(4, 1)] * 4, lambda model, batch: 0 * model(batch).mean())
        >>> phase = phase | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> without_time = lambda line: print(line.rpartition('  ')[0])
        >>> run = lt.workflow([(phase, 1)], max_epochs=1) | lt.log(every=2, line=without_time)
        >>> results = run.to_end()
        train  epoch 1/1  iteration 2/4  loss 0  lr 0.1
        train  epoch 1/1  iteration 4/4  loss 0  lr 0.1
        train  epoch 1/1  loss 0
    """

    folder: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path), repr=str)
    every: int | Interval = attrs.field(default=50, kw_only=True, converter=interval)
    line: Callable[[str], Any] | None = attrs.field(default=print, kw_only=True, repr=False)
    bar: bool = attrs.field(default=False, kw_only=True)
    tensorboard: bool = attrs.field(default=True, kw_only=True)
    csv: bool = attrs.field(default=False, kw_only=True)
    to: tuple[Sink, ...] = attrs.field(default=(), kw_only=True, converter=_own_sinks)
    hparams: dict[str, Any] | None = attrs.field(
        default=None, kw_only=True, converter=_hparams, repr=lambda v: f"<{len(v)} values>" if v else repr(v)
    )
    since: Means = attrs.field(factory=Means, init=False, repr=False)
    gauges: dict[str, Any] = attrs.field(factory=dict, init=False, repr=False)  # the newest since the last row
    _bar: Bar | None = attrs.field(default=None, init=False, repr=False)
    _delivery: Delivery = attrs.field(init=False, repr=False)
    _run: Run | None = attrs.field(default=None, init=False, repr=False)
    _began: float = attrs.field(default=0.0, init=False, repr=False)
    _taken: State | None = attrs.field(default=None, init=False, repr=False)  # the last one that was taken in
    _clashes: dict[str, bool] = attrs.field(factory=dict, init=False, repr=False)  # metrics with a fact's name: told?
    only_looks: ClassVar[bool] = True

    def __attrs_post_init__(self) -> None:
        if self.csv and self.folder is None:
            raise ValueError('log: csv=True needs a folder: lt.log(folder, csv=True), or to=[lt.sinks.CSV("log.csv")].')
        sinks: dict[str, Sink] = {}
        if self.bar:
            self._bar = sinks["bar"] = Bar()
        elif self.line is not None:
            sinks["lines"] = Lines(self.line)
        if self.folder is not None:
            sinks["log.jsonl"] = JsonLines(self.folder / "log.jsonl")
            if self.csv:
                sinks["log.csv"] = CSV(self.folder / "log.csv")
            if self.tensorboard:
                sinks["tensorboard"] = TensorBoard(self.folder / "tensorboard")
        sinks |= zip(numbered(name_of(sink) for sink in self.to), self.to, strict=True)
        self._delivery = Delivery(sinks, self.hparams)

    @property
    def marks(self) -> dict[str, Any]:
        """How far each sink has written."""
        return self._delivery.marks

    def rewind(self, marks: dict[str, Any]) -> None:
        """Continue the files where they stood when `marks` said so; what was written since goes with the next row."""
        raise_all(self._delivery.rewind(marks))

    def state_dict(self) -> dict[str, Any]:
        """What is collected for the next row, and how far each sink has written."""
        return {"since": self.since.state_dict(), "gauges": self.gauges, "marks": self.marks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.since.load_state_dict(state["since"])
        self.gauges, self._delivery.marks = dict(state["gauges"]), dict(state["marks"])

    def on_build(self, run: Run) -> None:
        """See that the folder can be written to, before the first iteration."""
        run.require_run_scope(self)
        if self.folder is not None:
            run.require_folder(self.folder, "log")
        self._run = run

    def on_pass(self, run: Run) -> None:
        """Note when the pass began, and begin a new bar."""
        self._began = run.cursor.passes.began
        if self._bar is not None:
            self._bar.close()

    def on_results(self, state: State) -> None:
        """Write a row for a pass that is over, though its last state does not come through here."""
        self._add_pass(state)
        self._flush()

    def carry_over(self, old: log) -> None:
        """Go on where *old* stood, which this one replaces."""
        self.load_state_dict(old.state_dict())
        self._began, self._taken, self._clashes = old._began, old._taken, old._clashes
        self._delivery.take_over(old._delivery)

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        due: Any = self.every
        since, delivery = self.since, self._delivery
        for state in states:
            if state is not self._taken:  # otherwise a sink failed, and the state comes once more
                is_due, last = due(state), state.last  # these may fail: so before anything is counted
                if state.trains and not state.dropped:
                    norm = state.grad_norm
                    values = state.metrics.copy() if norm is None else {**state.metrics, "grad_norm": norm}
                    since.entries.append((values, state.num_samples))
                    if len(since.entries) >= FOLD_AT:
                        since.fold()
                    if state.gauges:
                        self.gauges = {**self.gauges, **_numbers(state.gauges)}
                self._taken = state
                if delivery.waiting:  # the user skipped what failed
                    delivery.skip_failed()
                if is_due:
                    self._add_means(state)
                if last and state.run is not None:
                    self._add_pass(state)
                if self._bar is not None and not state.replayed:
                    self._bar.advance(state)
            if delivery.waiting:
                self._flush()
            yield state

    def close(self) -> None:
        """Flush and close files; they open again with the next row."""
        raise_all(self._delivery.close())

    # On demand, at any time: run["log"].image(...)

    def image(self, tag: str, image: Any) -> None:
        """Show an image, or a batch of them as a grid, at the run's current iteration.

        Args:
            tag: Its name.
            image: A tensor, NumPy array or PIL image of shape ``(height, width)``, ``(channels, height, width)``,
                ``(height, width, channels)`` or ``(n, channels, height, width)``; whole numbers from 0 to 255, others
                from 0 to 1.

        Raises:
            RuntimeError: If no sink takes images, or the log belongs to no run.
        """
        self._show("image", tag, lambda kind: picture(image))

    def histogram(self, tag: str, values: Any) -> None:
        """Show how *values*, a tensor or array of any shape, are distributed; those that are not finite are left out.

        Raises:
            RuntimeError: If no sink takes histograms, or the log belongs to no run.
        """
        self._show("histogram", tag, lambda kind: flattened(values))

    def text(self, tag: str, text: str) -> None:
        """Write a text (Markdown, in TensorBoard).

        Raises:
            RuntimeError: If no sink takes texts, or the log belongs to no run.
        """
        self._show("text", tag, lambda kind: str(text))

    def figure(self, tag: str, figure: Any) -> None:
        """Show a matplotlib figure, which stays open.

        Raises:
            RuntimeError: If no sink takes figures or images, or the log belongs to no run.
        """
        self._show("figure", tag, lambda kind: rendered(figure) if kind == "image" else figure)

    def _show(self, kind: str, tag: str, make: Callable[[str], Any]) -> None:
        run = self._run
        if run is None:
            raise RuntimeError(
                f'log.{kind}: this log belongs to no run; what is piped is options. Use run["log"].{kind}.'
            )
        kinds = (kind, "image") if kind == "figure" else (kind,)
        sinks = self._delivery.sinks
        takers = {name: next((k for k in kinds if hasattr(sink, k)), "") for name, sink in sinks.items()}
        names = [name for name in takers if takers[name]]
        if not names:
            raise RuntimeError(f"log.{kind}: no sink of this log takes it. {WHO_SHOWS}.")
        if run.state is not None and run.state.replayed:
            return
        values = {k: make(k) for k in set(takers.values()) if k}

        begun = run.begun

        def write(name: str) -> None:
            before = State(phase="run", epoch=run.progress.epoch, iteration=run.progress.iteration - 1)
            state = run.state if begun and run.state is not None else before
            getattr(sinks[name], takers[name])(tag, values[takers[name]], state)

        if not begun:  # nothing is written yet: the run may still be resumed
            self._delivery.waiting.append(Parcel(write, names, None))
            return
        raise_all(self._delivery.each(names, write))
        if run.ended:
            self.close()  # nobody else would

    # Writing

    def _add_means(self, state: State) -> None:
        """A row for the iterations since the one before."""
        also = self.gauges if state.lr is None else {"lr": state.lr, **self.gauges}
        values = {} if state.replayed else self.since.read(also)  # the row is there already
        self.since.clear()
        self.gauges = {}
        if state.replayed:
            return
        now = 0.0 if state.run is None else state.run.seconds
        self._add("iterations", state, values, now - self._began)

    def _add_pass(self, state: State) -> None:
        """A row for a whole pass."""
        run, prefix = state.run, f"{state.phase}/"
        if run is None or state.replayed:
            return
        values = {k.removeprefix(prefix): v for k, v in run.results.items() if k.startswith(prefix)}
        newest = run.history[-1] if run.history else {}
        seconds = newest["seconds"] if newest.get("phase") == state.phase else run.seconds - self._began
        self._add("pass", state, values, seconds)

    def _add(self, kind: str, state: State, values: Mapping[str, float], seconds: float) -> None:
        facts: dict[str, Any] = {"kind": kind, "phase": state.phase, "epoch": state.epoch, "iteration": state.iteration}
        facts |= {"index": state.index, "trained": trained(state), "seconds": round(seconds, 3)}
        for key in FACTS:
            if key in values:
                self._clashes.setdefault(key, False)
        self._delivery.add({**facts, **values, **facts}, state)  # facts come first, and win

    def _flush(self) -> None:
        """Write what has come up, to each sink once.

        Raises:
            ValueError: If a metric was left out, once for each.
        """
        raise_all(self._delivery.flush())
        new = [key for key, told in self._clashes.items() if not told]
        if new:
            self._clashes = dict.fromkeys(self._clashes, True)
            names = " and ".join(f'"{key}"' for key in new)
            raise ValueError(
                f"log: a metric cannot be called {names}, since every row says that of itself ({', '.join(FACTS)}). "
                "Rename it in the step; next(run) goes on without it."
            )


def _numbers(gauges: Mapping[str, Any]) -> dict[str, Any]:
    """Gauges as what a checkpoint can hold: tensors stay where they are."""
    return {key: value.detach() if isinstance(value, Tensor) else float(value) for key, value in gauges.items()}
