"""Show a run in a notebook: where it is, what failed, its curves and its pipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import html
from ..data.given import trusted_len
from ..options import given, source_of
from .explain import entries, pipes, whereabouts

if TYPE_CHECKING:
    from ..run import Run

MOST_CURVES = 3
MOST_POINTS = 120
BEHIND = "behind every phase"


def html_of_run(run: Run) -> str:
    """A run as HTML. Nothing is built, computed or read for it.

    Returns:
        Where it stands, what failed and what to do, a small curve of the main metrics, and the pipe with its options.
    """
    head = f"<b>Run</b> {html.text(f'· {entries(run._agenda)}')}"
    where = "; ".join(whereabouts(run._cursor))
    return html.box(head, html.text(where), _progress(run), _failure(run), _curves(run.history), _pipe(run))


def _progress(run: Run) -> str:
    cursor = run._cursor
    if cursor is None:
        return ""
    done, passes = cursor.progress, cursor.passes
    if passes.iterations:
        return html.bar(done.iteration / passes.iterations)
    return html.bar(done.epoch / passes.epochs) if passes.epochs else ""


def _failure(run: Run) -> str:
    failed = run.failed
    if failed is None:
        return ""
    error = failed.exception
    what = f"<b>failed in {html.code(failed.part)}</b>: {html.text(type(error).__name__)}: {html.text(error)}"
    notes = [note for note in getattr(error, "__notes__", []) if note != failed.verbs]
    said = [what, *(html.text(note, html.FAINT) for note in notes), html.text(failed.advice)]
    lines = "".join(f"<div>{line}</div>" for line in said)
    return f'<div style="border-left:3px solid {html.RED};padding-left:.8em;white-space:pre-wrap">{lines}</div>'


def _curves(history: Sequence[dict[str, Any]]) -> str:
    """The metrics that most phases have, the loss first."""
    facts = {"phase", "epoch", "iteration", "round", "iterations", "trained", "seconds", "on_demand", "changes"}
    metrics: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in history:
        for name in [name for name in row if name not in facts and "/" not in name]:
            metrics.setdefault(name, {}).setdefault(row["phase"], []).append((row["trained"], row[name]))
    most = max(map(len, metrics.values()), default=0)
    names = sorted((name for name in metrics if len(metrics[name]) == most), key=lambda name: name != "loss")
    names = names[:MOST_CURVES]
    return "".join(html.curve(name, {p: _thinned(points) for p, points in metrics[name].items()}) for name in names)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most so many points, the newest among them."""
    stride = -(-len(points) // MOST_POINTS)
    return points[::-1][::stride][::-1]


def _pipe(run: Run) -> str:
    """Phases and the run, each with its parts and their options; the part that comes next is marked."""
    cursor, phases = run._cursor, run._agenda.phases
    is_open = cursor is not None and cursor.state is not None and cursor.at < len(cursor.line)
    upcoming = cursor.line[cursor.at].part if cursor is not None and is_open else None
    abouts = [f"{type(phase.model).__name__} on {source_of(phase, trusted_len(phase.source))}" for phase in phases]
    groups = "".join(
        f'<div style="margin-top:.3em">{html.text(name)} {html.text(f"· {about}", html.FAINT)}'
        f"{html.parts((part_name, given(part), part is upcoming) for part_name, part in parts)}</div>"
        for (name, parts), about in zip(pipes(run._agenda, cursor, run._middlewares), [*abouts, BEHIND], strict=False)
    )
    return f'<details open=""><summary>pipe</summary>{groups}</details>'
