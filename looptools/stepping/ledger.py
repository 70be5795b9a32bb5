"""Count who waits for the device, by part and by line."""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import attrs

from .. import html
from ..cursor import Cursor
from ..devices import model_device
from ..failures import asked_by
from ..phases import Phase
from ..pipeline import name_of
from .tracing.blame import HOME, Read, is_within
from .tracing.columns import as_html, as_text
from .tracing.reads import Tally, counted, enter, leave

T = TypeVar("T")
LINES = 3  # shown of each part
HEAD = ["part", "reads", "per iteration", "lines that ask"]
SOURCES = f"{HOME}data{os.sep}sources.py"
YOUR_LOOP = "your loop"


@attrs.frozen
class LedgerRow:
    """What one part waited for.

    Args:
        part: Its full name; ``train/batches`` for the source, ``boundary`` for what is done behind the last part,
            ``workflow/f`` for a function of the workflow, ``your loop`` for the body of your own.
        reads: How often it waited for the device.
        iterations: In so many iterations: of its phase, or of all.
        lines: Who asked, and how often; the most frequent first.
    """

    part: str
    reads: int
    iterations: int
    lines: tuple[tuple[Read, int], ...]

    @property
    def per_iteration(self) -> float:
        """Reads in one iteration, on average."""
        return self.reads / max(self.iterations, 1)


class Ledger:
    """How often a run waits for the device, by part, and which lines make it wait: ``run.ledger``.

    Counts from when it is first asked for, whatever turns a tensor into a number or copies it (``.item()``, ``float``,
    ``if loss > 1``, ``print``, ``.cpu()``, ``x[mask]`` ...). Tensors' methods are exchanged while the run is at work,
    and only then; what it computes is the same to the bit. It costs 0.1 ms an iteration, 10 µs a read.
    Your own loop's body is counted too in ``with run.ledger:``. Where all models are on the CPU, reads of its tensors
    count, since on a GPU they would wait; so do a few that would not, such as AdamW's step counts.

    Attributes:
        cpu_too: Whether tensors on the CPU count; None (the default): if all models are there.

    Example:
        >>> def step(model, batch):
        ...     loss = model(batch).mean()
        ...     return {"loss": loss, "rounded": round(loss.item(), 2)}
        >>> model = torch.nn.Linear(1, 1)
        >>> run = lt.workflow([(lt.validate(model, [torch.ones(1, 1)] * 4, step), 1)], max_rounds=1)
        >>> ledger = run.ledger
        >>> results = run.to_end()
        >>> [(row.part, row.reads, row.lines[0][0].how) for row in ledger.rows]
        [('val/forward', 4, 'item'), ('val/average', 1, 'tolist')]
    """

    def __init__(self, cursor: Cursor) -> None:
        self.cpu_too: bool | None = None
        self._cursor = weakref.ref(cursor)  # the run keeps the ledger, not the other way round
        self._tally = Tally(self._take)
        self.reset()
        self.start()

    # Counting

    def start(self) -> None:
        """Count again, after `stop`."""
        cursor = self._cursor()
        if cursor is not None and not self.counts:
            vars(cursor)["work"] = _Work(cursor, self)  # costs nothing where nobody counts

    def stop(self) -> None:
        """Count no further; what was counted stays."""
        cursor = self._cursor()
        if cursor is not None and self.counts:
            work = vars(cursor).pop("work")
            if work.before is not None:
                vars(cursor)["work"] = work.before

    def reset(self) -> None:
        """Forget what was counted, and count on."""
        self._reads: Counter[tuple[str, Read]] = Counter()
        self.iterations: Counter[str] = Counter()  # by phase
        cursor = self._cursor()
        self._note_handed(cursor.handed if cursor is not None else None)

    @property
    def counts(self) -> bool:
        """Whether it is counting."""
        cursor = self._cursor()
        return cursor is not None and isinstance(vars(cursor).get("work"), _Work)

    def __enter__(self) -> Ledger:
        """Count the body of your own loop, too, as the part ``your loop``; `stop` does not end that."""
        self._settle()
        enter(self._tally)
        return self

    def __exit__(self, *exception: object) -> None:
        leave(self._tally)

    def _take(self, read: Read) -> None:
        cursor = self._cursor()
        if cursor is not None:
            self._reads[at_work(cursor), read] += 1

    def _settle(self) -> None:
        cursor = self._cursor()
        self._tally.on_host = self.cpu_too if self.cpu_too is not None else cursor is None or on_host(cursor)

    def _count(self, cursor: Cursor, action: Callable[[], T]) -> T:
        self._settle()
        try:
            return counted(action, self._tally)
        finally:
            state = cursor.handed
            if state is not None and state is not self._handed():
                self.iterations[state.phase] += 1
                self._note_handed(state)

    def _note_handed(self, state: Any) -> None:
        self._handed: Callable[[], Any] = (lambda: None) if state is None else weakref.ref(state)

    # Looking

    @property
    def rows(self) -> list[LedgerRow]:
        """One for each part that waited, the most frequent first."""
        parts: dict[str, Counter[Read]] = {}
        for (part, read), n in self._reads.items():
            parts.setdefault(part, Counter())[read] += n
        rows = [
            LedgerRow(part, lines.total(), self._iterations_of(part), tuple(lines.most_common()))
            for part, lines in parts.items()
        ]
        return sorted(rows, key=lambda row: -row.reads)

    def _iterations_of(self, part: str) -> int:
        phase = part.rpartition("/")[0]
        return self.iterations[phase] if phase in self.iterations else self.iterations.total()

    def __repr__(self) -> str:
        rows = self._shown()
        return "\n".join([self._head(), *([as_text(HEAD, rows, wrapped=3, numbers=(1, 2))] if rows else [])])

    def _repr_html_(self) -> str:
        rows = self._shown()
        head = f"<b>Ledger</b> {html.text(f'· {self._head()}')}"
        return html.box(head, as_html(HEAD, rows, numbers=(1, 2)) if rows else "")

    def _head(self) -> str:
        reads, iterations = self._reads.total(), self.iterations.total()
        passes = ", ".join(f"{n} of {phase}" for phase, n in self.iterations.items())
        said = (
            f"{_plural(reads, 'device read')} in {_plural(iterations, 'iteration')}{f' ({passes})' if passes else ''}"
        )
        return said + ("" if self.counts else "; not counting")

    def _shown(self) -> list[list[str]]:
        shown = []
        for row in self.rows:
            lines = [f"{n} x {said(read)}" for read, n in row.lines[:LINES]]
            lines += [f"and {len(row.lines) - LINES} more lines"] if len(row.lines) > LINES else []
            shown.append([row.part, str(row.reads), f"{row.per_iteration:.3g}", "\n".join(lines)])
        return shown


_LEDGERS: WeakKeyDictionary[Cursor, Ledger] = WeakKeyDictionary()


def ledger(cursor: Cursor) -> Ledger:
    """The run's own; made when it is first asked for, and counting from then on."""
    found = _LEDGERS.get(cursor)
    if found is None:
        found = _LEDGERS[cursor] = Ledger(cursor)
    return found


class _Work:
    """What the run does, counted: stands in the place of the cursor's ``work``, and calls it."""

    def __init__(self, cursor: Cursor, ledger: Ledger) -> None:
        self.before = vars(cursor).get("work")  # a fork has one of its own
        self.cursor, self.ledger, self.work = cursor, ledger, cursor.work

    def __call__(self, action: Callable[[], T]) -> T:
        return self.work(lambda: self.ledger._count(self.cursor, action))


def on_host(cursor: Cursor) -> bool:
    """Whether no model of the run is on a device."""
    devices = [model_device(phase.model) for phase in cursor.passes.agenda.phases]
    return all(device is None or device.type == "cpu" for device in devices)


def at_work(cursor: Cursor) -> str:
    """Full name of the part that is at work now, or of what else is."""
    passes = cursor.passes
    if not cursor._working:
        return YOUR_LOOP
    if passes.phase is not None and is_within(SOURCES):  # also where a part asks for `last`, which fetches ahead
        return f"{passes.plan.phase}/batches"
    if cursor.state is not None:
        behind = cursor.at >= len(cursor.line)
        return asked_by(cursor.at_boundary, cursor.slots) if behind else cursor.line[cursor.at].name
    if passes.phase is not None:
        return f"{passes.plan.phase}/batches"
    entries, place = passes.agenda.entries, passes.place
    entry = entries[place.entry] if place.entry < len(entries) else None
    if entry is None or isinstance(entry.phase, Phase) or place.done >= entry.passes:
        return "between passes"
    return f"workflow/{name_of(entry.phase)}"


def said(read: Read) -> str:
    """A read in one line: where, and what stands there."""
    return f"{read.where}{f' via {read.via}' if read.via else ''}  {read.code or read.how}"


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
