"""Tables with several columns, as text and as HTML."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from ... import html

WIDTH = 100  # of a cell of a notebook
LONGEST = 40  # characters of a cell that is not wrapped
LEAST = 16  # of one that is


def as_text(head: Sequence[str], rows: Sequence[Sequence[str]], *, wrapped: int, numbers: Sequence[int] = ()) -> str:
    """A table of at most `WIDTH` columns.

    Args:
        head: What stands above.
        rows: Cells; a cell may have several lines.
        wrapped: Number of the column that gives way if there is no room.
        numbers: Columns that stand on the right.

    Example:
        >>> print(as_text(["part", "ms"], [["train/batches", "0.1"], ["total", "12.3"]], wrapped=0, numbers=[1]))
        part             ms
        train/batches   0.1
        total          12.3
    """
    cells = [
        [[line if column == wrapped else _cut(line) for line in cell.split("\n")] for column, cell in enumerate(row)]
        for row in (head, *rows)
    ]
    widths = [max(len(line) for row in cells for line in row[column]) for column in range(len(head))]
    room = WIDTH - sum(widths) - 2 * (len(widths) - 1) + widths[wrapped]
    widths[wrapped] = min(widths[wrapped], max(room, LEAST))
    lines = []
    for row in cells:
        row[wrapped] = [piece for line in row[wrapped] for piece in _fitted(line, widths[wrapped])]
        for number in range(max(map(len, row))):
            shown = [cell[number] if number < len(cell) else "" for cell in row]
            aligned = [
                f"{text:>{width}}" if column in numbers else f"{text:<{width}}"
                for column, (text, width) in enumerate(zip(shown, widths, strict=True))
            ]
            lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def from_to(before: float | None, after: float | None) -> str:
    """A number before and after, or by how much it changed if that is less than the digits shown; empty if not at all.

    Example:
        >>> from_to(3.0, 2.5), from_to(None, 1.0), from_to(10.96, 10.960021), from_to(3.0, 3.0)
        ('3 -> 2.5', 'none -> 1', '10.96 + 2.1e-05', '')
    """
    if before == after:
        return ""
    old, new = ("none" if one is None else f"{one:.4g}" for one in (before, after))
    if old != new or before is None or after is None or math.isnan(before):
        return f"{old} -> {new}"
    return f"{old} {'+' if after > before else '-'} {abs(after - before):.2g}"


def _cut(line: str) -> str:
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


def _fitted(line: str, width: int) -> list[str]:
    return textwrap.wrap(line, width, subsequent_indent="  ") or [""]


def as_html(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """The same table for a notebook."""

    def line(cells: Sequence[str], style: str = "") -> str:
        shown = ""
        for column, cell in enumerate(cells):
            align = "right" if column in numbers else "left"
            look = f"text-align:{align};padding:0 1em 0 0;vertical-align:top;background:none;border:none;{style}"
            pieces = "<br/>".join(html.text(piece) for piece in cell.split("\n"))
            shown += f'<td style="{look}">{pieces}</td>'
        return f'<tr style="background:none">{shown}</tr>'

    lines = line(head, html.FAINT) + "".join(map(line, rows))
    return f'<table style="border-collapse:collapse;margin:0;border:none">{lines}</table>'
