"""A simulation as a table that stays short: rounds that are alike share their lines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import attrs

from .simulation import Pass, Simulation

MOST_LINES = 44
MOST_COLUMNS = 4  # of scheduled values
MOST_PIECES = 6  # that a long stretch of changing values is shown in
ROUND_NUMBERS = [n * 10**power for power in range(12) for n in (1, 2, 5)]
EPOCH = "epoch (from 1)"  # how many are done behind it; states, events and checkpoints count them from 0
RIGHT = ("batches", "rows")  # columns of numbers


@attrs.frozen
class Values:
    """How one scheduled value goes over a stretch of training."""

    first: float
    last: float
    low: float
    high: float

    @property
    def way(self) -> str:
        """In a word, which way it goes."""
        if math.isnan(self.first + self.last):
            return "?"
        if self.low == self.high:
            return "stays"
        if (self.low, self.high) == (self.first, self.last):
            return "rises"
        return "falls" if (self.high, self.low) == (self.first, self.last) else "turns"

    def __str__(self) -> str:
        if self.way == "?":
            return "?"
        if self.low == self.high:
            return f"{self.first:.4g}"
        ends = f"{self.first:.4g} to {self.last:.4g}"
        turns = self.low < min(self.first, self.last) or self.high > max(self.first, self.last)
        return f"{ends} ({self.low:.4g} to {self.high:.4g})" if turns else ends

    def then(self, other: Values) -> Values:
        """Both, one after the other."""
        return Values(self.first, other.last, min(self.low, other.low), max(self.high, other.high))


@attrs.frozen(eq=False)
class Line:
    """Some passes of one phase that are alike."""

    passes: list[Pass]
    values: tuple[Values, ...]

    @property
    def kind(self) -> tuple[object, ...]:
        """What must be the same where lines are folded, but for the values."""
        one = self.passes[0]
        rows = tuple((rows.part, bool(rows.at), rows.of_pass) for rows in one.rows)
        marks = tuple((mark.kind, mark.text if mark.kind != "checkpoint" else "") for mark in one.marks)
        lengths = (one.phase, one.function, one.length, one.index, one.whole)
        return (*lengths, rows, marks if len(marks) < 4 else marks[:1])

    def then(self, other: Line) -> Line:
        """Both, one after the other."""
        values = tuple(mine.then(its) for mine, its in zip(self.values, other.values, strict=True))
        return Line(self.passes + other.passes, values)

    def goes_on(self, other: Line) -> bool:
        """Whether the values of *other* go on as these do: they stay the same, or move the same way."""
        pairs = list(zip(self.values, other.values, strict=True))
        return all(mine.way == its.way and (mine.way != "stays" or mine.last == its.first) for mine, its in pairs)


def table(simulation: Simulation) -> str:
    """What happens, a line for each kind of pass that is alike; what is unknown comes last."""
    rounds = _rounds(simulation)
    lines = [line for block in _folded(rounds) for line in block]
    shown = [_head(simulation), *_aligned(_cells(simulation, lines))]
    if len(shown) > MOST_LINES:
        left = len(shown) - MOST_LINES + 1
        shown[2 * MOST_LINES // 3 : 2 * MOST_LINES // 3 + left] = [f"... {left} more lines: .passes has each pass"]
    shown.append(f"end: {simulation.ended}")
    return "\n".join(shown + [f"unknown: {text}" for text in simulation.unknown])


def _head(sim: Simulation) -> str:
    """How much there is in all."""
    epochs = "? epochs" if sim.epochs is None else _many(sim.epochs, "epoch")
    updates = [
        _many(len(at), "update") + (f" of {name}" if len(sim.lr) > 1 else "") for name, at in sim.updates.items()
    ]
    made = ", ".join([*updates, *(f"{_many(n, 'average')} by {name}" for name, n in sim.averages.items())])
    whole = f"simulation: {epochs}, {_many(sim.iterations, 'iteration')}"
    return f"{whole}; from iteration {sim.begins} on: {made}" if sim.begins else f"{whole}, {made}".removesuffix(", ")


def _many(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


# Folding


def _rounds(sim: Simulation) -> list[list[Line]]:
    """The lines of each round; passes of it that are alike and follow each other share one."""
    columns = [values for _, _, values in _columns(sim)]
    rounds: list[list[Line]] = []
    for _, passes in itertools.groupby(sim.passes, key=lambda one: one.round):
        lines: list[Line] = []
        for one in passes:
            inside = [sim.within(one, values) for values in columns] if one.trains else []
            found = tuple(Values(v[0], v[-1], min(v), max(v)) for v in inside if v)
            lines.append(Line([one], found))
        rounds.append(_merged(lines))
    return rounds


def _merged(lines: Iterable[Line]) -> list[Line]:
    """Lines of one round that follow each other."""
    found: list[Line] = []
    for line in lines:
        if found and found[-1].kind == line.kind and found[-1].goes_on(line) and not line.passes[0].function:
            found[-1] = found[-1].then(line)
        else:
            found.append(line)
    return found


def _folded(rounds: list[list[Line]]) -> Iterator[list[Line]]:
    """Rounds that are alike, in one; of many with changing values a few."""
    stretches: list[list[list[Line]]] = []
    for lines in rounds:
        if stretches and _alike(stretches[-1][-1], lines) and _go_on(stretches[-1][-1], lines):
            stretches[-1].append(lines)
        else:
            stretches.append([lines])
    for stretch in _steps(stretches):
        changes = any(one.way not in ("stays", "?") for line in stretch[0] for one in line.values)
        changes = changes or not all(_go_on(*pair) for pair in itertools.pairwise(stretch))
        for piece in _pieces(stretch) if changes else [stretch]:
            yield _together(piece)


def _alike(left: Sequence[Line], right: Sequence[Line]) -> bool:
    shapes = [[(line.kind, len(line.passes)) for line in lines] for lines in (left, right)]
    return shapes[0] == shapes[1]


def _go_on(left: Sequence[Line], right: Sequence[Line]) -> bool:
    return all(mine.goes_on(its) for mine, its in zip(left, right, strict=True))


def _steps(stretches: list[list[list[Line]]]) -> Iterator[list[list[Line]]]:
    """Where a value is another one in each round, these belong together all the same."""
    at = 0
    while at < len(stretches):
        upto = at + 1
        while upto < len(stretches) and len(stretches[upto]) == len(stretches[at]) == 1:
            if not _alike(stretches[at][0], stretches[upto][0]):
                break
            upto += 1
        if upto - at > MOST_PIECES:
            yield [lines for stretch in stretches[at:upto] for lines in stretch]
        else:
            upto = at + 1
            yield stretches[at]
        at = upto


def _pieces(stretch: list[list[Line]]) -> Iterator[list[list[Line]]]:
    """A long stretch, cut behind epochs with round numbers."""
    if len(stretch) <= MOST_PIECES:
        yield stretch
        return
    step = _round_number(len(stretch) / MOST_PIECES)
    for _, piece in itertools.groupby(stretch, key=lambda lines: (lines[-1].passes[-1].done - 1) // step):
        yield list(piece)


def _round_number(least: float) -> int:
    found: int = min(number for number in ROUND_NUMBERS if number >= least)
    return found


def _together(piece: list[list[Line]]) -> list[Line]:
    """One line for each place in the round."""
    return [_sum(lines) for lines in zip(*piece, strict=True)]


def _sum(lines: Sequence[Line]) -> Line:
    whole = lines[0]
    for line in lines[1:]:
        whole = whole.then(line)
    return whole


# Showing


def _columns(sim: Simulation) -> list[tuple[str, str, list[float]]]:
    """The first few scheduled values; param groups that have the same are one."""
    found: list[tuple[str, str, list[float]]] = []
    for option, label, values in sim.columns():
        if not any(option == other and values == same for other, _, same in found):
            found.append((option, label, values))
    return found[:MOST_COLUMNS]


def _cells(sim: Simulation, lines: Iterable[Line]) -> Iterator[list[str]]:
    """The table's cells, its head first; columns that hold nothing are left out."""
    labels = [(option, label) for option, label, _ in _columns(sim)]
    plain = len({option for option, _ in labels}) == len(labels)
    heads = [EPOCH, "pass", "batches"]
    heads += [option if plain else f"{option} {label}" for option, label in labels]
    rows = [[*heads, "rows", "what else"], *(_row(line, len(labels)) for line in lines)]
    full = [n for n in range(len(rows[0])) if n < 3 or any(row[n] for row in rows[1:])]
    yield from ([row[n] for n in full] for row in rows)


def _row(line: Line, columns: int) -> list[str]:
    one, last = line.passes[0], line.passes[-1]
    epochs = f"{one.done}" if one.done == last.done else f"{one.done} to {last.done}"
    length = "" if one.function else "?" if one.length is None else str(one.length)
    values = [str(value) for value in line.values] or [""] * columns
    rows = sum(each.row_count for each in line.passes)
    name = f"{one.phase}(run)" if one.function else one.phase
    part = "" if one.whole and not one.index else f", {'from' if one.index else 'up to'} batch "
    part += "" if not part else str(one.index) if one.index else str(one.length)
    return [epochs, name + part, length, *values, str(rows or ""), ", ".join(_marks(line))]


def _marks(line: Line) -> Iterator[str]:
    """What else happens: files counted, with the last one's name; the rest in words."""
    marks = [mark for one in line.passes for mark in one.marks]
    saved = [mark for mark in marks if mark.kind == "checkpoint"]
    if saved:
        yield (f"{len(saved)} saved, the last " if len(saved) > 1 else "saved ") + (saved[-1].text or "")
    for mark in marks:
        if mark.kind != "checkpoint":
            yield f"{mark.kind} {mark.text} at iteration {mark.iteration}"


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns as wide as they need to be; numbers on the right."""
    rows = list(rows)
    right = {n for n, head in enumerate(rows[0]) if head in RIGHT}
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if n in right else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
