"""What a sink is, and what it is given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from ..state import State

Row = Mapping[str, Any]
FACTS = ("kind", "phase", "epoch", "iteration", "index", "trained", "seconds")  # what a row says beside its values


class Sink(Protocol):
    """What `log` writes to: any object with these two methods.

    A row is a mapping of names to plain values; its ``"kind"`` is ``"iterations"`` where it sums up some iterations,
    ``"pass"`` where it sums up a pass, its ``"trained"`` the number of training iterations done by then: the step for
    curves. A sink opens its file when it first writes, and again after ``close()``.

    Further methods are called where a sink has them:

    - ``image(tag, image, state)``, an array of shape ``(height, width, 3 or 4)`` of whole numbers from 0 to 255;
      ``histogram(tag, values, state)``, a flat array; ``text(tag, text, state)``; ``figure(tag, figure, state)``, where
      a sink without it is given the figure as an image;
    - ``hparams(values)``, before the first row: nested mappings of plain values, without secrets;
    - ``mark()``, a plain value that says how far it has written, saved in checkpoints, and ``rewind(mark)``, called
      before the first row: forget what lies behind the mark; None means that a fresh run begins;
    - ``fresh()``, another sink with the same options, so that each run has its own.

    Example:
        >>> class Newest:
        ...     def write(self, row, state):
        ...         self.row = dict(row)
        ...     def close(self):
        ...         pass
        >>> newest = Newest()
        >>> phase = lt.validate(torch.nn.Linear(1, 1), [torch.ones(1, 1)], lambda model, batch: 0 * model(batch).sum())
        >>> results = (lt.workflow([(phase, 1)], max_rounds=1) | lt.log(line=None, to=[newest])).to_end()
        >>> newest.row["kind"], newest.row["loss"]
        ('pass', 0.0)
    """

    def write(self, row: Row, state: State) -> None:
        """Take in one row."""

    def close(self) -> None:
        """Flush, and let the file go."""


def shown(row: Row) -> dict[str, str]:
    """The values of a row as a person reads them; those of single layers (``grad_norm/conv.weight``) are left out."""
    return {key: readable(key, value) for key, value in row.items() if key not in FACTS and "/" not in key}


def readable(key: str, value: Any) -> str:
    """A number as a person reads it: four digits; hours, minutes and seconds for ``eta``.

    Example:
        >>> readable("loss", 0.123456), readable("eta", 3725.2)
        ('0.1235', '1:02:05')
    """
    if key == "eta" and isinstance(value, int | float) and math.isfinite(value):
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def trained(state: State) -> int:
    """Training iterations done by the end of *state*, as the parts see it: the step for curves.

    Example:
        >>> trained(State(phase="train", iteration=9))
        10
    """
    if state.run is not None and not state.trains:  # a validation before any training says 0 as well
        return state.run.progress.iteration
    return state.iteration + 1


def tag_of(row: Row, key: str, state: State) -> str:
    """The name of a value where one list holds those of all phases: ``train/loss``, ``val/accuracy``.

    Means over a whole training pass are ``train/pass/loss``; those of a validation have the name that they have in
    ``run.results``, since it has no rows but these.
    """
    inner = "pass/" if row["kind"] == "pass" and state.trains else ""
    return f"{row['phase']}/{inner}{key}"
