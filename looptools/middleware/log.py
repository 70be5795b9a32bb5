"""Write down how it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from ..intervals import Interval, interval
from ..means import FOLD_AT, Means
from ..sinks import Bar, JsonLines, Lines, Sink, TensorBoard
from ..state import State

if TYPE_CHECKING:
    from ..run import Run


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class log:
    """Log the training every so often, and each phase at the end of its pass. Piped onto the run.

    A training row holds the means since the one before, weighted by ``num_samples``: the step's scalars and
    ``grad_norm``, and the learning rate now. A row at the end of a pass holds ``run.results`` of that phase.
    The device is read once a row.

    *folder* gets ``log.jsonl``, one JSON object a line with the state's own counters (from 0), and
    ``tensorboard/``. A resumed run continues ``log.jsonl`` where its checkpoint stood; a fresh one in a used
    folder renames the old file to ``log.1.jsonl``.

    Args:
        folder: Where files go, made if missing; None writes none.
        every: Training iterations between rows, an interval, or a predicate of the state.
        line: Called with each readable line; None for silence.
        bar: Show a tqdm bar, and lines for whole passes only (extra: ``demo``).
        tensorboard: Write TensorBoard's event files into *folder*.

    Example:
        >>> batches = [torch.ones(4, 1)] * 4
        >>> phase = lt.train(torch.nn.Linear(1, 1), batches, lambda model, batch: 0 * model(batch).mean())
        >>> without_time = lambda line: print(line.rpartition('  ')[0])
        >>> run = lt.workflow([(phase, 1)], max_epochs=1) | lt.log(every=2, line=without_time)
        >>> results = run.to_end()
        train  epoch 1/1  iteration 2/4  loss 0
        train  epoch 1/1  iteration 4/4  loss 0
        train  epoch 1/1  loss 0
    """

    folder: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    every: int | Interval = attrs.field(default=50, kw_only=True, converter=interval)
    line: Callable[[str], Any] | None = attrs.field(default=print, kw_only=True, repr=False)
    bar: bool = attrs.field(default=False, kw_only=True)
    tensorboard: bool = attrs.field(default=True, kw_only=True)
    since: Means = attrs.field(factory=Means, init=False, repr=False)
    size: int | None = attrs.field(default=None, init=False, repr=False)  # bytes of log.jsonl
    _bar: Bar | None = attrs.field(default=None, init=False, repr=False)
    _json: JsonLines | None = attrs.field(default=None, init=False, repr=False)
    _sinks: list[Sink] = attrs.field(factory=list, init=False, repr=False)
    _began: float = attrs.field(default=0.0, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.bar:
            self._bar = Bar()
            self._sinks.append(self._bar)
        elif self.line is not None:
            self._sinks.append(Lines(self.line))
        if self.folder is not None:
            self._json = JsonLines(self.folder / "log.jsonl")
            self._sinks.append(self._json)
            if self.tensorboard:
                self._sinks.append(TensorBoard(self.folder / "tensorboard"))

    def on_build(self, run: Run) -> None:
        """See that the folder can be written to, before the first iteration."""
        run.require_run_scope(self)
        if self.folder is not None:
            run.require_folder(self.folder, "log")

    def on_pass(self, run: Run) -> None:
        """Note when the pass began, and begin a new bar."""
        self._began = run.seconds
        if self._bar is not None:
            self._bar.close()

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        due: Any = self.every
        since = self.since
        for state in states:
            if not state.replayed:
                if state.trains and not state.dropped:
                    norm = state.grad_norm
                    values = state.metrics.copy() if norm is None else {**state.metrics, "grad_norm": norm}
                    since.entries.append((values, state.num_samples))
                    if len(since.entries) >= FOLD_AT:
                        since.fold()
                if self._bar is not None:
                    self._bar.advance(state)
                if due(state):
                    self._write("iterations", state, since.read({} if state.lr is None else {"lr": state.lr}))
                    since.clear()
                if state.last and state.run is not None:
                    prefix = f"{state.phase}/"
                    results = state.run.results.items()
                    self._write("pass", state, {k.removeprefix(prefix): v for k, v in results if k.startswith(prefix)})
            yield state

    def _write(self, kind: str, state: State, values: dict[str, float]) -> None:
        now = 0.0 if state.run is None else state.run.seconds
        facts: dict[str, Any] = {"kind": kind, "phase": state.phase, "epoch": state.epoch, "iteration": state.iteration}
        facts |= {"index": state.index, "seconds": round(now - self._began, 3)}
        row = {**facts, **values, **facts}  # facts come first, and win over a metric of the same name
        if self._json is not None:
            self._continue(self._json)
        for sink in self._sinks:
            sink.write(row, state)
        if self._json is not None:
            self.size = self._json.size()

    def _continue(self, file: JsonLines) -> None:
        """Before the first row of this process: take up the file of a resumed run, or set another run's aside."""
        if self.size is None:
            file.set_aside()
        elif file.size() > self.size:
            file.cut(self.size)

    def close(self) -> None:
        """Flush and close files; they open again with the next row."""
        for sink in self._sinks:
            sink.close()
