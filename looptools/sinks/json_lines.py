"""JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from ..state import State
from .files import GrowingFile
from .rows import Row

HPARAMS = '{"kind": "hparams"'  # the beginning of such a line


@attrs.define(eq=False)
class JsonLines:
    """One JSON object a row in *path*. Values that are not finite are written as strings, as JSON has no NaN.

    Hyperparameters are a row of kind ``"hparams"``, which has the key ``"hparams"`` and no other.

    Example:
        >>> sink = JsonLines(folder / "log.jsonl")
        >>> sink.write({"kind": "pass", "phase": "val", "loss": float("nan")}, State(phase="val"))
        >>> sink.close()
        >>> print((folder / "log.jsonl").read_text(), end="")
        {"kind": "pass", "phase": "val", "loss": "nan"}
    """

    path: Path = attrs.field(converter=Path)
    _file: GrowingFile = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._file = GrowingFile(self.path)

    def fresh(self) -> JsonLines:
        return attrs.evolve(self)

    def write(self, row: Row, state: State) -> None:
        self._file.append(json.dumps(_finite(row)) + "\n")

    def hparams(self, values: Mapping[str, Any]) -> None:
        line = json.dumps(_finite({"kind": "hparams", "hparams": values})) + "\n"
        if line != self._last_hparams():
            self._file.append(line)

    def _last_hparams(self) -> str:
        """The newest row of them; a resumed run need not repeat it."""
        last = ""
        if self.path.exists():
            with self.path.open(encoding="utf-8") as lines:
                for line in lines:
                    last = line if line.startswith(HPARAMS) else last
        return last

    def mark(self) -> int:
        """Bytes written so far."""
        return self._file.size()

    def rewind(self, mark: int | None) -> None:
        if mark is None:
            self._file.set_aside()
        else:
            self._file.cut(mark)

    def close(self) -> None:
        self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
