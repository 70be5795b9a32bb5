"""Show a run: its resolved pipe, and where it stands."""

from __future__ import annotations

from typing import Any

import attrs

from ..agenda import Agenda, Entry
from ..cursor import Cursor
from ..phases import Phase
from ..pipeline import name_of
from ..sources import Source


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
        rows.append(("  1 batches", _source(phase, source)))
        for number, slot in enumerate(cursor.lines[id(phase)], 2):
            rows.append((f"  {number} {slot.name.rpartition('/')[2]}", _options(slot.part)))
        moves = any(hasattr(getattr(slot.part, "optimizer", None), "step") for slot in cursor.lines[id(phase)])
        if phase.trains and not moves:
            rows.append(("", "no part here moves the weights: lt.optimize(optimizer) would"))
    if cursor.run_slots:
        rows.append(("run", "behind every phase, one instance throughout"))
        for number, slot in enumerate(cursor.run_slots, 1):
            rows.append((f"  {number} {slot.name.rpartition('/')[2]}", _options(slot.part)))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}".rstrip() for name, text in rows]
    return "\n".join([_workflow(cursor.passes.agenda, cursor), *lines])


def describe(agenda: Agenda, cursor: Cursor | None) -> str:
    """One line: the workflow, and where it stands."""
    if cursor is None:
        return f"<Run: {_entries(agenda)}; not begun>"
    done = cursor.progress
    of_epochs = "" if cursor.passes.epochs is None else f"/{cursor.passes.epochs}"
    of_iterations = "" if cursor.passes.iterations is None else f"/{cursor.passes.iterations}"
    where = f"{done.epoch}{of_epochs} epochs, {done.iteration}{of_iterations} iterations done"
    if cursor.failed is not None:
        where += f"; failed in {cursor.failed.part}: {cursor.failed.exception!r}"
    elif cursor.ended:
        where += f"; ended: {cursor.ended}"
    return f"<Run: {_entries(agenda)}; {where}>"


def _workflow(agenda: Agenda, cursor: Cursor) -> str:
    bounds = {"epochs": agenda.max_epochs, "iterations": agenda.max_iterations, "rounds": agenda.max_rounds}
    until = " or ".join(f"{bound} {name[:-1] if bound == 1 else name}" for name, bound in bounds.items() if bound)
    horizon = "" if cursor.passes.iterations is None else f" ({cursor.passes.iterations} iterations)"
    return f"workflow: {_entries(agenda)}, until {until}{horizon}"


def _entries(agenda: Agenda) -> str:
    return ", ".join(_entry(entry) for entry in agenda.entries)


def _entry(entry: Entry) -> str:
    if not isinstance(entry.phase, Phase):
        return f"{name_of(entry.phase)}(run) x {entry.passes}"
    return f"{entry.phase.name} x " + (str(entry.passes) if entry.batches is None else f"{entry.batches} batches")


def _source(phase: Phase, source: Source) -> str:
    length = "length unknown" if source.length is None else f"{source.length} batches"
    where = "" if phase.device is None else f", to device {phase.device!r}"
    return f"{type(phase.source).__name__}, {length}{where}"


def _options(part: Any) -> str:
    """The options that were given: those at their default go without saying."""
    kind: Any = type(part)
    if not attrs.has(kind):
        return ""
    given = []
    for field in attrs.fields(kind):
        if field.init and field.repr is not False and not _is_default(field, getattr(part, field.name)):
            show = field.repr if callable(field.repr) else repr
            given.append(f"{field.name}={show(getattr(part, field.name))}")
    return ", ".join(given)


def _is_default(field: Any, value: Any) -> bool:
    default = field.default
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        default = default.factory()
    if default is not attrs.NOTHING and field.converter is not None:
        default = field.converter(default)
    if attrs.has(type(value)):
        return type(value) is type(default) and repr(value) == repr(default)
    return value is default or (isinstance(value, str | int | float) and value == default)
