"""How things look in a notebook: small pieces of HTML, with no style sheet, no script and nothing from outside.

Colours are the page's own (``currentColor``) or legible on light and dark. Every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .means import read

if TYPE_CHECKING:
    from .state import State

RED, BLUE, ORANGE = "#d9534f", "#3b8fd6", "#e08a2e"
FAINT = "opacity:.65"
NUMBERS = "font-variant-numeric:tabular-nums"


def text(value: Any, style: str = "") -> str:
    """A piece of text, escaped; of what cannot be shown, the name of its type.

    Example:
        >>> text("<b> & co", "opacity:.5")
        '<span style="opacity:.5">&lt;b&gt; &amp; co</span>'
    """
    shown = escape(_or_type(str, value))
    return f'<span style="{style}">{shown}</span>' if style else shown


def _or_type(show: Callable[[Any], str], value: Any) -> str:
    """What *show* makes of a value; if it fails, as where a device is lost, the name of the value's type."""
    try:
        return show(value)
    except Exception:  # the value may be anything of the user's
        return type(value).__name__


def code(value: Any) -> str:
    """Text as one would type it."""
    return f'<code style="background:none;color:inherit;padding:0">{text(value)}</code>'


def box(head: str, *pieces: str) -> str:
    """A whole output: a line in bold, and *pieces* of HTML below."""
    inner = "".join(f'<div style="margin-top:.4em">{piece}</div>' for piece in pieces if piece)
    return f'<div style="line-height:1.45;{NUMBERS}"><div>{head}</div>{inner}</div>'


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Names (texts) on the left, pieces of HTML on the right."""
    cell = "text-align:left;padding:0 1em 0 0;vertical-align:top;background:none;border:none"
    lines = "".join(
        f'<tr style="background:none"><td style="{cell};{FAINT}">{escape(name)}</td>'
        f'<td style="{cell}">{value}</td></tr>'
        for name, value in rows
    )
    return f'<table style="border-collapse:collapse;margin:0;border:none">{lines}</table>'


def bar(share: float) -> str:
    """How much is done, from 0 to 1."""
    done = f'<div style="width:{100 * min(max(share, 0), 1):.1f}%;height:100%;background:{BLUE}"></div>'
    frame = "height:6px;max-width:26em;border-radius:3px;overflow:hidden;background:rgba(128,128,128,.3)"
    return f'<div style="{frame}">{done}</div>'


def parts(rows: Iterable[tuple[str, str, bool]]) -> str:
    """An ordered list of parts: name, options, and whether this is the one that comes next."""
    items = "".join(
        f"<li>{code(name)}{text(f' {options}', FAINT) if options else ''}"
        f"{text(' ◀ comes next', f'color:{BLUE}') if here else ''}</li>"
        for name, options, here in rows
    )
    return f'<ol style="margin:0;padding-left:2em">{items}</ol>'


def number(value: Any) -> str:
    """A number as a person reads it: four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def curve(name: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """A small picture of a metric: for each phase its points (x, y), with a gap where one is not finite."""
    width, height = 190, 56
    finite = [(x, y) for points in series.values() for x, y in points if math.isfinite(y)]
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    drawn, words = [], []
    for color, (phase, points) in zip(("currentColor", BLUE, ORANGE, RED), series.items(), strict=False):
        words.append(f"{text(phase, f'color:{color}')} {escape(number(points[-1][1]))}")
        for run in _runs(points):
            at = [
                f"{4 + (width - 8) * _share(x, xs):.1f},{height - 4 - (height - 8) * _share(y, ys):.1f}" for x, y in run
            ]
            if len(at) == 1:
                x, y = at[0].split(",")
                drawn.append(f'<circle cx="{x}" cy="{y}" r="2" fill="{color}"/>')
            else:
                drawn.append(f'<polyline points="{" ".join(at)}" fill="none" stroke="{color}" stroke-width="1.5"/>')
    frame = f'<path d="M1 0V{height - 1}H{width}" fill="none" stroke="currentColor" stroke-opacity=".35"/>'
    svg = f'<svg width="{width}" height="{height}" role="img">{frame}{"".join(drawn)}</svg>'
    head = f"<div>{escape(name)} {text('·', FAINT)} {', '.join(words)}</div>"
    return f'<div style="display:inline-block;margin-right:1.5em;vertical-align:top">{head}{svg}</div>'


def _runs(points: Iterable[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Stretches of points that are finite."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            stretches[-1].append((x, y))
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def _share(value: float, values: list[float]) -> float:
    low, high = min(values), max(values)
    return (value - low) / (high - low) if high > low else 0.5


def of_phase(phase: Any, source: str, rows: Iterable[tuple[str, str]]) -> str:
    """A phase: its model, what *source* says about its data, and its parts with their options."""
    kind = "trains" if phase.trains else "does not train"
    head = f"<b>Phase</b> {text(f'· {phase.name} · {kind}')}"
    facts = [("model", text(type(phase.model).__name__)), ("source", text(source))]
    return box(head, table(facts), parts((name, options, False) for name, options in rows))


def of_state(state: State) -> str:
    """An iteration: where it is, what it measured, and what its batch looks like. Reads the device once."""
    plan = state.plan
    length = f" of {plan.length}" if plan is not None and plan.length is not None else ""
    head = f"<b>State</b> {text(f'· {state.phase}')}"
    where = f"iteration {state.iteration}, epoch {state.epoch}, index {state.index}{length}"
    loss = {} if "loss" in state.metrics or state.loss is None else {"loss": state.loss}
    values: dict[str, Any] = {**loss, **state.metrics, "lr": state.lr, "grad_norm": state.grad_norm, **state.gauges}
    rows = [(name, escape(shown)) for name, shown in _shown(values).items()]
    rows += [("updates", escape(str(state.updates)))] if state.trains else []
    rows += [("batch", _shape(state.batch)), ("outputs", _shape(state.outputs))]
    marks = [name for name in ("dropped", "replayed") if getattr(state, name)]
    said = f"{head} {text(f'· {where}', FAINT)}" + "".join(f" {text(mark, f'color:{RED}')}" for mark in marks)
    return box(said, table((name, value) for name, value in rows if value))


def _shown(values: Mapping[str, Any]) -> dict[str, str]:
    """Scalars as a person reads them; tensors become numbers all at once."""
    values = {**values, **_read({name: value for name, value in values.items() if isinstance(value, Tensor)})}
    return {str(name): _or_type(number, value)[:200] for name, value in values.items() if value is not None}


def _read(tensors: Mapping[str, Any]) -> dict[str, float]:
    """The scalars among *tensors* that can be read; if one cannot, each by itself."""
    try:
        return read({name: value for name, value in tensors.items() if value.numel() == 1})
    except Exception:  # on no device, or on one that is lost
        each = tensors.items() if len(tensors) > 1 else ()
        return {name: found for name, value in each for found in _read({name: value}).values()}


def _shape(value: Any, depth: int = 0) -> str:
    """What a nested batch holds: shapes and kinds, no values; of what does not tell, its kind."""
    try:
        return _held(value, depth)
    except Exception:  # not all that has a shape can say it
        return text(type(value).__name__)


def _held(value: Any, depth: int) -> str:
    if value is None:
        return ""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        device = getattr(value, "device", "cpu")
        where = "" if str(device) == "cpu" else f" on {device}"
        return text(f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{where}")
    if depth < 3 and isinstance(value, Mapping):
        return _several([f"{escape(str(key))}: {_shape(item, depth + 1)}" for key, item in value.items()], "{}")
    if depth < 3 and isinstance(value, tuple | list):
        return _several([_shape(item, depth + 1) for item in value], "()" if isinstance(value, tuple) else "[]")
    return text(type(value).__name__)


def _several(shown: list[str], brackets: str) -> str:
    more = f", ... {len(shown)} in all" if len(shown) > 6 else ""
    return brackets[0] + ", ".join(shown[:6]) + more + brackets[1]
