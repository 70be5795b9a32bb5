"""A table for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs

from ..state import State
from .files import GrowingFile
from .rows import Row


@attrs.define(eq=False)
class CSV:
    """All rows as one table in *path*: a line a row, a column a value; what a row has not is left empty.

    A value that comes up later adds a column at the right, for which the file is written anew.

    Example:
        >>> sink = CSV(folder / "log.csv")
        >>> sink.write({"kind": "iterations", "phase": "train", "loss": 0.5}, State(phase="train"))
        >>> sink.write({"kind": "pass", "phase": "val", "accuracy": 0.75}, State(phase="val"))
        >>> sink.close()
        >>> print((folder / "log.csv").read_text(), end="")
        kind,phase,loss,accuracy
        iterations,train,0.5,
        pass,val,,0.75
    """

    path: Path = attrs.field(converter=Path)
    _file: GrowingFile = attrs.field(init=False, repr=False)
    _columns: list[str] | None = attrs.field(default=None, init=False, repr=False)  # None until the file was read
    _rows: int = attrs.field(default=0, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._file = GrowingFile(self.path)

    def fresh(self) -> CSV:
        return attrs.evolve(self)

    def write(self, row: Row, state: State) -> None:
        columns = self._take_up() if self._columns is None else self._columns
        new = [key for key in row if key not in columns]
        line = _lines([[row.get(column, "") for column in [*columns, *new]]])
        if not new:
            self._file.append(line)
        else:
            columns = [*columns, *new]
            old = (cells + [""] * (len(columns) - len(cells)) for cells in self._read()[1:])
            self._file.rewrite(_lines([columns, *old]) + line)
        self._columns, self._rows = columns, self._rows + 1

    def mark(self) -> int:
        """Rows written so far; their bytes would not stay the same when a column is added."""
        if self._columns is None:
            self._take_up()
        return self._rows

    def rewind(self, mark: int | None) -> None:
        if mark is None:
            self._file.set_aside()
        elif len(cells := self._read()) > mark + 1:
            self._file.rewrite(_lines(cells[: mark + 1]))
        self._columns = None

    def close(self) -> None:
        self._file.close()

    def _take_up(self) -> list[str]:
        """Go on with the file as it is."""
        cells = self._read()
        self._columns, self._rows = (cells[0], len(cells) - 1) if cells else ([], 0)
        return self._columns

    def _read(self) -> list[list[str]]:
        if not self.path.exists():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            return list(csv.reader(file))


def _lines(cells: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(cells)
    return text.getvalue()
