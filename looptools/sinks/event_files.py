"""TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from time import time
from typing import Any

import attrs

from ..state import State
from .files import set_aside
from .redact import flat
from .rows import FACTS, Row, trained


@attrs.define(eq=False)
class TensorBoard:
    """Event files in *folder*, a subfolder a phase, so that the curves of train and val overlay.

    Means over some iterations have the tag ``loss``, those over a pass ``pass/loss``. Steps are training iterations
    done. Hyperparameters are in the subfolder ``hparams``, with the results of the last passes once the log is closed.

    A resumed run hides what was written behind its checkpoint; a fresh one in a used folder renames the old one to
    ``tensorboard.1``.

    Example:
        >>> sink = TensorBoard(folder)
        >>> sink.write({"kind": "pass", "phase": "val", "trained": 10, "loss": 0.5}, State(phase="val"))
        >>> sink.close()
        >>> [path.name for path in folder.iterdir()]
        ['val']
    """

    folder: Path = attrs.field(converter=Path)
    _writers: dict[str, Any] = attrs.field(factory=dict, init=False, repr=False)
    _steps: dict[str, int] = attrs.field(factory=dict, init=False, repr=False)  # the last one, by subfolder
    _hparams: dict[str, Any] | None = attrs.field(default=None, init=False, repr=False)
    _results: dict[str, float] = attrs.field(factory=dict, init=False, repr=False)

    def fresh(self) -> TensorBoard:
        return attrs.evolve(self)

    def write(self, row: Row, state: State) -> None:
        writer, step = self._writer(state, row["trained"])
        whole = row["kind"] == "pass"
        for key, value in row.items():
            if key not in FACTS:
                writer.add_scalar(f"pass/{key}" if whole else key, value, step)
                if whole:
                    self._results[f"{state.phase}/{key}"] = value
        writer.flush()

    def image(self, tag: str, image: Any, state: State) -> None:
        writer, step = self._writer(state)
        writer.add_image(tag, image, step, dataformats="HWC")
        writer.flush()

    def histogram(self, tag: str, values: Any, state: State) -> None:
        writer, step = self._writer(state)
        writer.add_histogram(tag, values, step)
        writer.flush()

    def text(self, tag: str, text: str, state: State) -> None:
        writer, step = self._writer(state)
        writer.add_text(tag, text, step)
        writer.flush()

    def hparams(self, values: Mapping[str, Any]) -> None:
        self._hparams = flat(values)
        self._write_hparams()

    def mark(self) -> dict[str, int]:
        """The last step of each subfolder."""
        return dict(self._steps)

    def rewind(self, mark: Mapping[str, int] | None) -> None:
        self.close()
        folders = [path for path in self.folder.iterdir() if path.is_dir()] if self.folder.exists() else []
        if mark is None:
            if folders:
                set_aside(self.folder)
        else:
            for path in folders:
                if path.name != "hparams":
                    _come_before_now(path)
                    self._open(path.name, mark.get(path.name, -1) + 1)
        self._steps = dict(mark or {})

    def close(self) -> None:
        if self._hparams is not None and self._results:
            self._write_hparams()
        while self._writers:
            self._writers.popitem()[1].close()

    def _writer(self, state: State, step: int | None = None) -> tuple[Any, int]:
        name, step = state.phase.replace("#", "-"), trained(state) if step is None else step
        writer = self._writers.get(name) or self._open(name)
        self._steps[name] = max(step, self._steps.get(name, step))
        return writer, step

    def _open(self, name: str, purge_step: int | None = None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self.folder / name), purge_step=purge_step)
        self._writers[name] = writer
        return writer

    def _write_hparams(self) -> None:
        """Write the one file of hyperparameters anew: TensorBoard takes the first that it finds."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = self.folder / "hparams"
        old = list(folder.glob("events.out.tfevents.*"))
        metrics = {f"final/{key}": value for key, value in self._results.items()}
        step = max(self._steps.values(), default=0)
        with SummaryWriter(str(folder)) as writer:
            for summary in hparams(self._hparams, metrics):
                writer.file_writer.add_summary(summary, step)
            for key, value in metrics.items():
                writer.add_scalar(key, value, step)
        for path in old:
            path.unlink()


def _come_before_now(folder: Path) -> None:
    """See that a new file comes behind those in *folder*, whatever the clock says.

    TensorBoard reads files in the order of their names, which begin with the second in which they were made, and only
    what it has read can be hidden. Where that second is not over, numbers take its place.
    """
    names = sorted(path.name for path in folder.glob("events.out.tfevents.*"))
    if names and names[-1].split(".")[3] >= f"{int(time()):010}":
        for number, name in enumerate(names):
            *start, _, end = name.split(".", 4)
            (folder / name).replace(folder / ".".join([*start, f"{number:010}", end]))
