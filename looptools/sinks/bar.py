"""A progress bar."""

from __future__ import annotations

import importlib.util
from typing import Any

from ..state import State
from .lines import Lines
from .rows import Row, shown


class Bar:
    """A tqdm bar a pass, moved by hand, with a line above it at the end of each pass; ``log(bar=True)`` makes it.

    Raises:
        ModuleNotFoundError: If tqdm is missing.
    """

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
            self._bar.set_postfix(shown(row), refresh=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
