"""Where rows of the log go: a readable line, a progress bar, JSON lines, TensorBoard.

A sink is anything with ``write(row, state)`` and ``close()``. A row is a mapping of names to plain values;
its ``"kind"`` says whether it sums up some iterations or a whole pass. A sink opens its file when it first
writes, and again after ``close()``.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from .state import State

Row = Mapping[str, Any]
FACTS = ("kind", "phase", "epoch", "iteration", "index", "samples", "seconds")  # what a row says beside its values


class Sink(Protocol):
    """What log writes to."""

    def write(self, row: Row, state: State) -> None:
        """Take in one row."""

    def close(self) -> None:
        """Flush, and let the file go."""


class Lines:
    """Readable lines, one a row, given to *show* (``print``, or any function of a string).

    Example:
        >>> row = {"kind": "pass", "phase": "val", "epoch": 2, "iteration": 68, "seconds": 0.5, "accuracy": 0.978}
        >>> Lines(print).write(row, State(phase="val", epoch=2))
        val    epoch 3  accuracy 0.978  0.5 s
    """

    def __init__(self, show: Callable[[str], Any]) -> None:
        self.show = show

    def write(self, row: Row, state: State) -> None:
        plan = state.plan
        of = f"/{plan.epochs}" if plan is not None and plan.epochs else ""
        words = [f"{row['phase']:<6} epoch {row['epoch'] + 1}{of}"]
        if row["kind"] != "pass":
            of = f"/{plan.iterations}" if plan is not None and plan.iterations is not None else ""
            words.append(f"iteration {row['iteration'] + 1}{of}")
        words += [f"{key} {readable(value)}" for key, value in row.items() if key not in FACTS]
        words.append(f"{row['seconds']:.1f} s")
        self.show("  ".join(words))

    def close(self) -> None:
        pass


class Bar:
    """A tqdm bar a pass, moved by hand, with a line above it at the end of each pass."""

    def __init__(self) -> None:
        if importlib.util.find_spec("tqdm") is None:
            raise ModuleNotFoundError('log: bar=True needs tqdm. Install it: pip install "torch-looptools[demo]".')
        self._bar: Any = None
        self._lines = Lines(self._above)

    def _above(self, line: str) -> None:
        self._bar.write(line)

    def advance(self, state: State) -> None:
        """Move on by one iteration."""
        if self._bar is None:
            self._open(state)
        self._bar.update(1)

    def _open(self, state: State) -> None:
        from tqdm import tqdm

        self.close()
        plan = state.plan
        name = f"{state.phase} {state.epoch + 1}" + (f"/{plan.epochs}" if plan and plan.epochs else "")
        total = plan.length if plan else None
        self._bar = tqdm(total=total, initial=state.index, desc=name, leave=False, unit="it", dynamic_ncols=True)

    def write(self, row: Row, state: State) -> None:
        if self._bar is None:
            self._open(state)
        if row["kind"] == "pass":
            self._lines.write(row, state)
            self.close()
        else:
            values = {key: readable(value) for key, value in row.items() if key not in FACTS}
            self._bar.set_postfix(values, refresh=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class JsonLines:
    """One JSON object a row in *path*. Values that are not finite are written as strings, as JSON has no NaN."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def write(self, row: Row, state: State) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8", newline="\n")
        self._file.write(json.dumps({key: _finite(value) for key, value in row.items()}) + "\n")
        self._file.flush()

    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Drop what lies behind the first *size* bytes: a run that resumes writes it again."""
        self.close()
        if self.size() > size:
            os.truncate(self.path, size)

    def set_aside(self) -> None:
        """Rename a file that another run left, to the first free ``log.1.jsonl``, ``log.2.jsonl`` ..."""
        number = 1
        while (aside := self.path.with_suffix(f".{number}{self.path.suffix}")).exists():
            number += 1
        if self.size():
            self.path.rename(aside)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class TensorBoard:
    """Scalars in *folder*, a subfolder a phase, so that the curves of train and val overlay.

    Means over some iterations have the tag ``loss``, those over a pass ``pass/loss``. Steps are training iterations.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writers: dict[str, Any] = {}

    def write(self, row: Row, state: State) -> None:
        step = row["iteration"] + 1
        writer = self._writers.get(row["phase"]) or self._open(row["phase"], step)
        prefix = "pass/" if row["kind"] == "pass" else ""
        for key, value in row.items():
            if key not in FACTS:
                writer.add_scalar(prefix + key, value, step)

    def _open(self, phase: str, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an earlier process wrote for the same iterations.
        writer = SummaryWriter(str(self.folder / phase.replace("#", "-")), purge_step=step)
        self._writers[phase] = writer
        return writer

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def readable(value: Any) -> str:
    """A number as a person reads it: four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
