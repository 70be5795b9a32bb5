"""Doubts about a pipe that come of what its parts read and write: a part that reads what nobody before it writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from ...checks import known
from ...cursor import Cursor
from ...intervals import highest, target
from ...order import Line, kind, lines
from ...phases import Phase
from ...schedules import plateau
from .uses import Use, uses_of

CURES = {
    "lr": "lt.schedule_lr(optimizer, ...) sets it, and lt.update where no schedule did: stand behind one of them",
    "grad_norm": "Stand behind lt.optimize(optimizer, max_norm=...), where inf only measures it",
    "loss": 'Return it from the step, as "loss"',
}


def unmet(cursor: Cursor) -> list[str]:
    """What each doubt says, with the cure.

    A part whose source cannot be seen, or that hands the state on to who knows whom, ends what can be said of those
    behind it.
    """
    found = lines(cursor)
    uses = {id(slot): Use(slot, uses_of(slot)) for line in found for slot in line.slots}
    pipes = [(line, [uses[id(slot)] for slot in line.slots]) for line in found]
    said: dict[str, None] = {}
    for line, parts in pipes:
        elsewhere = [other for one, other in pipes if one is not line]
        said |= dict.fromkeys([*_missing(line, parts, elsewhere), *_too_early(parts)])
    return [*said, *dict.fromkeys(_unwritten(cursor, pipes))]


def _missing(line: Line, parts: list[Use], elsewhere: list[list[Use]]) -> Iterator[str]:
    """A part needs what no part before it writes; one of the run may be meant for the states of another phase."""
    for number, part in enumerate(parts):
        for item in part.uses.needs:
            others = [other[: other.index(part)] for other in elsewhere if part in other]
            if not part.writes(item) and not any(_may_write(before, item) for before in [parts[:number], *others]):
                behind = [one for one in parts[number + 1 :] if item in one.uses.writes]
                yield f"{part.slot.name}: it reads {_in_code(item)}, {_cure(line, parts, item, behind)}"


def _may_write(before: list[Use], item: str) -> bool:
    field = item.partition("[")[0]
    return field in ("batch", "num_samples", "updates") or any(one.uses.unseen or one.writes(item) for one in before)


def _cure(line: Line, parts: list[Use], item: str, behind: list[Use]) -> str:
    if behind:
        return f"which {behind[0].slot.name} writes only behind it. Put it behind that."
    field, _, key = item.partition("[")
    if not key:
        cure = CURES.get(field, "")
        return f"which no part of {line.name} sets" + (f". {cure}." if cure else ".")
    there = [one for part in parts for one in part.uses.writes if one.startswith(f"{field}[")]
    return f"which no part of {line.name} writes; {known(key[:-1], [one[len(field) + 1 : -1] for one in there])}"


def _in_code(item: str) -> str:
    field, _, key = item.partition("[")
    return f'state.{field}["{key[:-1]}"]' if key else f"state.{field}"


def _too_early(parts: list[Use]) -> Iterator[str]:
    """Before a backward no state updates, so who asks for that does nothing."""
    for number, part in enumerate(parts):
        asks = "updates" in part.uses.needs and not part.writes("updates") and not kind(part.slot)
        behind = [one for one in parts[number + 1 :] if one.writes("updates")]
        if asks and behind and not any(one.uses.unseen or one.writes("updates") for one in parts[:number]):
            yield (
                f"{part.slot.name}: it reads state.updates, which is False until {behind[0].slot.name} has set it. "
                "Put it behind that."
            )


# Results that are waited for


def _unwritten(cursor: Cursor, pipes: list[tuple[Line, list[Use]]]) -> Iterator[str]:
    """Who judges by a result that nobody writes."""
    for _, parts in pipes:
        for part in parts:
            for metric in _metrics(part.slot.part):
                if (names := _known(cursor, metric, pipes)) is not None and metric not in names:
                    yield f'{part.slot.name}: it judges by "{metric}", which no part writes; {known(metric, names)}'


def _metrics(part: Any) -> Iterator[str]:
    """The results that a part's options name: its own, and those of its schedules."""
    if not attrs.has(type(part)):
        return
    for field in attrs.fields(type(part)):
        given = getattr(part, field.name, None) if field.init else None
        for one in given if isinstance(given, list | tuple) else [given]:
            criterion = one.best if isinstance(one, plateau) else one
            if isinstance(criterion, highest | target):
                yield criterion.metric


def _known(cursor: Cursor, metric: str, pipes: list[tuple[Line, list[Use]]]) -> list[str] | None:
    """The results that are there, or will be; None where that of *metric* may still come."""
    run, phase = cursor.run, metric.partition("/")[0]
    written = {f"{row['phase']}/{name}": None for row in run.history for name in row} | dict.fromkeys(run.results)
    if metric in written:
        return [metric]
    line, parts = next(((line, parts) for line, parts in pipes if line.name == phase), (None, []))
    if line is None:  # a validation on demand may write it
        entries = cursor.passes.agenda.entries
        over = run.progress.round > 0 and all(isinstance(entry.phase, Phase) for entry in entries)
        return list(run.results) if over else None
    if any(row["phase"] == phase for row in run.history):
        return list(run.results)
    own = [one.uses for one in parts if not one.slot.of_run]
    if any(uses.unseen or "metrics" in uses.writes or "gauges" in uses.writes for uses in own):
        return None
    items = [item.partition("[") for uses in own for item in uses.writes]
    return [f"{phase}/{key[:-1]}" for field, _, key in items if field in ("metrics", "gauges") and key]
