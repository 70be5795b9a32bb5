"""Show a run: its resolved pipe, and where it stands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..agenda import Agenda, Entry
from ..cursor import Cursor
from ..options import given, source_of
from ..phases import Phase
from ..pipeline import Middleware, flatten, name_of, numbered


def explain(cursor: Cursor) -> str:
    """A table of all parts, in the order in which they run, with their options.

    Returns:
        One line a part: number, name, options. Parts of a phase begin anew each pass, those of the run do not.
    """
    rows: list[tuple[str, str]] = []
    for phase in cursor.passes.agenda.phases:
        source = cursor.passes.sources[id(phase)]
        kind = "gradients on, train mode" if phase.trains else "no gradients in the step, eval mode"
        rows.append((cursor.passes.names[id(phase)], f"each pass: {kind}"))
        rows.append(("  1 batches", source_of(phase, source.length)))
        for number, slot in enumerate(cursor.lines[id(phase)], 2):
            rows.append((f"  {number} {slot.name.rpartition('/')[2]}", given(slot.part)))
        moves = any(hasattr(getattr(slot.part, "optimizer", None), "step") for slot in cursor.lines[id(phase)])
        if phase.trains and not moves:
            rows.append(("", "no part here moves the weights: lt.optimize(optimizer) would"))
    if cursor.run_slots:
        rows.append(("run", "behind every phase, one instance throughout"))
        for number, slot in enumerate(cursor.run_slots, 1):
            rows.append((f"  {number} {slot.name.rpartition('/')[2]}", given(slot.part)))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}".rstrip() for name, text in rows]
    return "\n".join([_workflow(cursor.passes.agenda, cursor), *lines])


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
