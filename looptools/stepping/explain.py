"""Show a run: its resolved pipe, and where it stands."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import attrs

from ..agenda import Agenda, Entry
from ..checkpoints.changes import in_words
from ..cursor import Cursor
from ..links import Slot
from ..options import given, source_of
from ..order import doubts as doubts_of_order
from ..order import kind, refusals
from ..phases import Phase
from ..pipeline import Middleware, flatten, name_of, numbered
from .explaining.unmet import unmet
from .explaining.uses import shown, uses_of
from .swap import changes
from .tracing.columns import WIDTH

MOST_CHANGES = 10
MOST_OPTIONS = 36  # that stand beside what a part does


def explain(cursor: Cursor) -> str:
    """A table of all parts, in the order in which they run: their options, and what they read and write on the state.

    Returns:
        One row a part: number, name, options without those at their default, ``reads -> writes``. Parts of a phase
        begin anew each pass, those of the run do not. Behind the table stand the changes made since the run was built,
        and what can hardly be right.
    """
    rows: list[Row] = []
    for phase in cursor.passes.agenda.phases:
        source = cursor.passes.sources[id(phase)]
        mode = "gradients on, train mode" if phase.trains else "no gradients in the step, eval mode"
        rows.append(Row(cursor.passes.names[id(phase)], f"each pass: {mode}"))
        rows.append(Row("  1 batches", source_of(phase, source.length), "-> batch"))
        rows += [_row(number, slot) for number, slot in enumerate(cursor.lines[id(phase)], 2)]
        movers = [s for s in cursor.lines[id(phase)] if hasattr(getattr(s.part, "optimizer", None), "step")]
        if phase.trains and not movers:
            rows.append(Row("", "no part here moves the weights: lt.optimize(optimizer) would"))
        for slot in movers if phase.trains else ():
            if slot.muted and kind(slot) in ("backward", "update"):
                rows.append(Row("", f"while {slot.short} is muted, the weights stand still"))
    if cursor.run_slots:
        rows.append(Row("run", "behind every phase, one instance throughout"))
        rows += [_row(number, slot) for number, slot in enumerate(cursor.run_slots, 1)]
    doubts = [*refusals(cursor), *doubts_of_order(cursor), *unmet(cursor)]
    changed = list(map(in_words, changes(cursor)))
    if len(changed) > MOST_CHANGES:
        changed[:-MOST_CHANGES] = [f"{len(changed) - MOST_CHANGES} before these: run.changes"]
    lines = [_workflow(cursor.passes.agenda, cursor), *_table(rows)]
    return "\n".join([*lines, *_section("changes", changed), *_section("doubts", doubts)])


@attrs.frozen
class Row:
    """A line of the table."""

    name: str
    options: str
    uses: str = ""


def _row(number: int, slot: Slot) -> Row:
    name, options = f"{number:>3} {slot.name.rpartition('/')[2]}", _options(slot.part)
    if slot.muted:
        return Row(name, f"muted: {options}" if options else "muted")
    return Row(name, options, shown(uses_of(slot), slot))


def _options(part: Any) -> str:
    """The options that were given, and of these too, as of a schedule, only what was given."""
    shown = given(part)
    for field in attrs.fields(type(part)) if shown else ():
        with contextlib.suppress(Exception):  # the user's own repr, or a field that is not set
            value = getattr(part, field.name)
            name = type(value).__name__
            if attrs.has(type(value)) and repr(value).startswith(f"{name}("):
                shown = shown.replace(f"{field.name}={value!r}", f"{field.name}={name}({_options(value)})")
    return shown


def _table(rows: list[Row]) -> list[str]:
    """Columns side by side, in `WIDTH`; what a part does goes below its options where these are long."""
    width = max(len(row.name) for row in rows)
    across = max((len(row.options) for row in rows if row.uses and len(row.options) <= MOST_OPTIONS), default=0)
    start = width + across + 4
    lines = []
    for row in rows:
        options = _wrapped(row.options, WIDTH - width - 2) or [""]
        line, *more = (
            f"{name:<{width}}  {one}".rstrip() for name, one in zip_longest([row.name], options, fillvalue="")
        )
        bound = row.uses.replace(" ->", "\xa0->")  # an arrow does not stand alone
        uses = _wrapped(bound, WIDTH - start)
        if uses and not more and len(line) <= start - 2:
            line = f"{line:<{start}}{uses.pop(0)}"
        lines += [line, *more, *(" " * start + one for one in uses)]
    return [line.replace("\xa0", " ") for line in lines]


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 30), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _section(title: str, entries: Iterable[str]) -> list[str]:
    wrapped = [textwrap.fill(one, WIDTH, initial_indent="  - ", subsequent_indent="    ") for one in entries]
    return [title, *wrapped] if wrapped else []


def describe(agenda: Agenda, cursor: Cursor | None, middlewares: Iterable[Middleware] = ()) -> str:
    """Two or three lines: the workflow and where it stands, the pipe, and what failed.

    Args:
        agenda: The workflow.
        cursor: Where the run stands; None if it has not begun.
        middlewares: What was piped onto a run that has not begun.
    """
    lines = [f"<Run: {entries(agenda)}; {'; '.join(whereabouts(cursor))}"]
    found = pipes(agenda, cursor, middlewares)
    lines.append("; ".join(f"{name}: {' | '.join(part for part, _ in parts)}" for name, parts in found))
    if cursor is not None and cursor.failed is not None:
        lines.append(f"failed in {cursor.failed.part}: {cursor.failed.exception!r:.200}")
    return "\n ".join(lines) + ">"


def whereabouts(cursor: Cursor | None) -> list[str]:
    """Where a run stands, in a few words each: what is done, the pass under way, the open iteration, why it ended."""
    if cursor is None:
        return ["not begun"]
    done, passes = cursor.progress, cursor.passes
    of_epochs = "" if passes.epochs is None else f"/{passes.epochs}"
    of_iterations = "" if passes.iterations is None else f"/{passes.iterations}"
    words = [f"{done.epoch}{of_epochs} epochs, {done.iteration}{of_iterations} iterations done"]
    state = cursor.state or cursor.handed
    if passes.phase is not None and state is not None and state.plan is not None and state.phase == passes.plan.phase:
        length = "" if passes.plan.length is None else f"/{passes.plan.length}"
        words.append(f"in {state.phase}: {state.index + (cursor.state is None)}{length} batches done")
    if cursor.state is not None and cursor.failed is None:
        comes = cursor.line[cursor.at].name if cursor.at < len(cursor.line) else "its end"
        words.append(f"an iteration is open, {comes} comes next")
    return [*words, f"ended: {cursor.ended}"] if cursor.ended else words


def pipes(
    agenda: Agenda, cursor: Cursor | None, middlewares: Iterable[Middleware]
) -> list[tuple[str, list[tuple[str, Any]]]]:
    """All parts with their names, by phase; in the end those of the run, if there are any."""
    if cursor is not None:
        lines = [*((cursor.passes.names[key], line) for key, line in cursor.lines.items()), ("run", cursor.run_slots)]
        return [(name, [(slot.name.rpartition("/")[2], slot.part) for slot in line]) for name, line in lines if line]
    names = numbered(phase.name for phase in agenda.phases)
    of_phases = [(name, list(phase.parts())) for name, phase in zip(names, agenda.phases, strict=True)]
    flat = list(flatten(middlewares))
    of_run = list(zip(numbered(name for name, _ in flat), (part for _, part in flat), strict=True))
    return [*of_phases, ("run", of_run)] if of_run else of_phases


def _workflow(agenda: Agenda, cursor: Cursor) -> str:
    bounds = {"epochs": agenda.max_epochs, "iterations": agenda.max_iterations, "rounds": agenda.max_rounds}
    until = " or ".join(f"{bound} {name[:-1] if bound == 1 else name}" for name, bound in bounds.items() if bound)
    known = cursor.passes.iterations is not None and agenda.max_iterations is None
    horizon = f" ({cursor.passes.iterations} iterations)" if known else ""
    return f"workflow: {entries(agenda)}, until {until}{horizon}"


def entries(agenda: Agenda) -> str:
    """The workflow in one line."""
    return ", ".join(_entry(entry) for entry in agenda.entries)


def _entry(entry: Entry) -> str:
    if not isinstance(entry.phase, Phase):
        return f"{name_of(entry.phase)}(run) x {entry.passes}"
    return f"{entry.phase.name} x " + (str(entry.passes) if entry.batches is None else f"{entry.batches} batches")
