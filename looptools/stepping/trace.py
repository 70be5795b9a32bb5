"""One iteration under the magnifying glass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from time import perf_counter
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch.nn import Module

from .. import html
from ..cursor import Cursor
from ..state import State
from .ledger import on_host, said
from .stages import stages
from .tracing.blame import Read
from .tracing.changed import changes, look
from .tracing.columns import as_html, as_text, from_to
from .tracing.norms import norms
from .tracing.reads import Tally, counted

if TYPE_CHECKING:
    from ..run import Run

Norms = tuple[float | None, float | None]
HEAD = ["part", "ms", "changed", "weight norm", "gradient norm", "reads"]
NUMBERS = (1, 5)
END: tuple[str, State | None] = ("boundary", None)


@attrs.frozen(kw_only=True)
class TraceRow:
    """What one part did.

    Args:
        part: Its full name; ``train/batches`` for the source, ``boundary`` for what the run itself does behind the last
            part: it counts, and saves.
        milliseconds: How long it took, with what it left the device to do.
        changed: Fields of the state, keys of ``metrics`` and ``gauges``, and keys of ``run.results``.
        weights: The 2-norm of all the model's parameters before and after it.
        gradients: The 2-norm of all their gradients before and after it; None where there are none.
        reads: Where it waited for the device.
        failed: The kind of exception that it raised; empty if it raised none.
    """

    part: str
    milliseconds: float
    changed: tuple[str, ...] = ()
    weights: Norms = (None, None)
    gradients: Norms = (None, None)
    reads: tuple[Read, ...] = ()
    failed: str = ""


@attrs.frozen(repr=False)
class Trace:
    """What each part of one iteration did, and how long it took: ``run.trace()``. Printed it is a table.

    The device is waited for before and after each part, so that a part's time is its own; norms are shown where they
    change. Times of a first iteration hold what is done once (kernels that are loaded, memory that is taken).

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> phase = lt.train(model, [torch.ones(1, 1)] * 2, lambda model, batch: model(batch).mean())
        >>> run = lt.workflow([(phase | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1)), 1)], max_epochs=1)
        >>> trace = run.trace()
        >>> [row.part for row in trace.rows]
        ['train/batches', 'train/forward', 'train/backward', 'train/update', 'train/average', 'boundary']
        >>> trace.rows[1].changed
        ('outputs', 'loss', 'metrics[loss]')
        >>> run.state.iteration, next(run).iteration
        (0, 1)
    """

    rows: list[TraceRow]
    where: str = ""

    @property
    def milliseconds(self) -> float:
        """What the parts and the boundary took together."""
        return sum(row.milliseconds for row in self.rows)

    def __repr__(self) -> str:
        head, rows, numbers = self._shown()
        lines = [
            f"{self.where}; the device was waited for at each part",
            as_text(head, rows, wrapped=2, numbers=numbers),
        ]
        reads = self._reads()
        return "\n".join([*lines, *([as_text(["reads", ""], reads, wrapped=1)] if reads else [])])

    def _repr_html_(self) -> str:
        head, rows, numbers = self._shown()
        reads = self._reads()
        said_first = f"<b>Trace</b> {html.text(f'· {self.where}; the device was waited for at each part')}"
        return html.box(
            said_first, as_html(head, rows, numbers=numbers), as_html(["reads", ""], reads) if reads else ""
        )

    def _shown(self) -> tuple[list[str], list[list[str]], list[int]]:
        """Heads and cells; columns in which nothing stands are left out."""
        rows = [
            [
                row.part,
                f"{row.milliseconds:.3f}",
                ", ".join([*row.changed, *([f"failed: {row.failed}"] if row.failed else [])]),
                from_to(*row.weights),
                from_to(*row.gradients),
                str(len(row.reads) or ""),
            ]
            for row in self.rows
        ]
        total = sum(len(row.reads) for row in self.rows)
        rows.append(["total", f"{self.milliseconds:.3f}", "", "", "", str(total or "")])
        kept = [column for column in range(len(HEAD)) if column < 3 or any(row[column] for row in rows)]
        numbers = [place for place, column in enumerate(kept) if column in NUMBERS]
        return [HEAD[column] for column in kept], [[row[column] for column in kept] for row in rows], numbers

    def _reads(self) -> list[list[str]]:
        """Parts, and the lines that asked in them."""
        each = [(row.part, Counter(row.reads).items()) for row in self.rows]
        return [[part, f"{n} x {said(read)}"] for part, reads in each for read, n in reads]


def trace(run: Run) -> Trace:
    """Do one iteration, or the rest of the open one, part by part, and look at each.

    If a part raises, so does this; the exception's notes have the table up to there.

    Raises:
        LookupError: If the run is over.
    """
    cursor = run.cursor
    cursor.unseen = None  # finished as Ctrl-C came: whoever traces has had the prompt, and run.state
    looking = _Looking(cursor)
    try:
        looking.walk()
    except Exception as error:
        if looking.rows:
            error.add_note(f"run.trace() up to there:\n{looking.trace()}")
        raise
    if not looking.rows:
        raise LookupError(f"trace: there is no iteration left ({cursor.ended}).")
    return looking.trace()


class _Looking:
    """Walks through an iteration, and looks around before and after each part."""

    def __init__(self, cursor: Cursor) -> None:
        self.cursor = cursor
        self.rows: list[TraceRow] = []
        self.state = cursor.state
        self.seen = look(self.state, cursor.run.results)
        self.norms = None if self.state is None else norms(self.state.model)
        self.reads: list[Read] = []
        self.tally = Tally(self.reads.append)
        self.tally.on, self.tally.on_host = False, on_host(cursor)

    def walk(self) -> None:
        """To the end of the iteration."""
        steps: Any = stages(self.cursor)
        counted(lambda: [None for _ in iter(lambda: self._step(steps), False)], self.tally)

    def trace(self) -> Trace:
        """What was seen so far."""
        state = self.state or self.cursor.handed
        return Trace(self.rows, f"iteration {state.iteration} of {state.phase}, epoch {state.epoch}" if state else "")

    def _step(self, steps: Iterator[tuple[str, State | None]]) -> bool:
        """One part, or the boundary behind the last one; False if nothing follows."""
        self._wait()
        self.reads.clear()
        self.tally.on = True
        began = perf_counter()
        try:
            name, state = next(steps, END)
            while state is not None and name != self.cursor.part_names[self.cursor.at]:
                name, state = next(steps, END)  # still the turn of one that has dropped its state, and got another
        except BaseException as error:
            failed = self.cursor.failed
            if failed is not None:
                self._note(failed.part, None, began, type(error).__name__)
            raise
        finally:
            self.tally.on = False
        if self.rows or state is not None or not self.cursor.ended:
            self._note(name, state, began)
        return state is not None

    def _note(self, name: str, state: State | None, began: float, failed: str = "") -> None:
        self.tally.on = False
        self._wait()
        milliseconds = 1000 * (perf_counter() - began)
        before, length, words = self.seen, self.norms, list[str]()
        if state is not None and state is not self.state:
            if self.state is not None:
                words.append(f"dropped iteration {self.state.iteration} of {self.state.phase}")
            before = look(State(phase="", model=state.model), self.cursor.run.results)
            length = length if self.state is not None and self.state.model is state.model else None
        self.state = state or self.state
        self.seen = look(self.state, self.cursor.run.results)
        now = self.norms = norms(self.state.model if self.state is not None else None)
        old = length or now
        row = TraceRow(
            part=name,
            milliseconds=milliseconds,
            changed=(*words, *changes(before, self.seen)),
            weights=(old[0], now[0]),
            gradients=(old[1], now[1]),
            reads=tuple(self.reads),
            failed=failed,
        )
        self.rows.append(row)

    def _wait(self) -> None:
        """For all devices that the model is on; for the current one, if it has no parameters."""
        model = None if self.state is None else self.state.model
        parameters = model.parameters() if isinstance(model, Module) else ()
        devices = {parameter.device for parameter in parameters if parameter.device.type not in ("cpu", "meta")}
        if not devices and torch.cuda.is_initialized():
            devices = {torch.device("cuda", torch.cuda.current_device())}
        for device in devices:
            torch.accelerator.synchronize(device)
