"""Readable lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..state import State
from .rows import Row, shown


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
        words += [f"{key} {value}" for key, value in shown(row).items()]
        words.append(f"{row['seconds']:.1f} s")
        self.show("  ".join(words))

    def close(self) -> None:
        pass
