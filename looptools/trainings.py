"""What a run, or the folder that it logged into, tells about a training: rows of numbers, placed on the x axes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from .pipeline import numbered
from .sinks import FACTS

if TYPE_CHECKING:
    from .run import Run

NO_METRIC = {*FACTS, "round", "iterations", "on_demand", "changes"}  # the last four are facts of run.history


@attrs.frozen(eq=False)
class Row:
    """One point of every metric."""

    phase: str
    of_pass: bool  # or of some iterations within one
    at: dict[str, float]  # on each kind of x axis
    values: dict[str, float]


@attrs.frozen(eq=False)
class Training:
    """All that is known of one run."""

    name: str
    rows: list[Row]
    ends: list[tuple[float, float]]  # training iterations done, epochs done: at the end of each training pass
    trains: list[str]  # phases that train

    @property
    def phases(self) -> list[str]:
        """Those that train first."""
        return list(dict.fromkeys([*self.trains, *(row.phase for row in self.rows)]))

    def require_epochs(self) -> None:
        if len(self.ends) < 2:
            raise ValueError(f"plot: {self.name} has not completed an epoch yet. Use x='iteration'.")


def read_trainings(what: Any, labels: Sequence[str] | None) -> list[Training]:
    """Read what `plot` was given.

    Args:
        what: A run, a folder or a ``log.jsonl``; or a list of these, or a mapping that gives them names.
        labels: Their names, instead.

    Raises:
        TypeError: If something is none of these.
        ValueError: If there is nothing in it, or the labels do not fit.
        FileNotFoundError: If a folder has no ``log.jsonl``.
    """
    named = isinstance(what, Mapping)
    given = list(what.values()) if named else list(what) if isinstance(what, list | tuple) else [what]
    if not given:
        raise ValueError(
            "plot: there is nothing in the list. Give a run, a folder that log has written to, or several."
        )
    if labels is not None and (isinstance(labels, str) or len(labels) != len(given)):
        raise ValueError(f"plot: labels must be {len(given)} names, one a run, got {labels!r}.")
    names = [str(name) for name in labels or (what if named else numbered(map(_name, given)))]
    return [_training(name, one) for name, one in zip(names, given, strict=True)]


def _name(one: Any) -> str:
    if isinstance(one, str | Path):
        path = Path(one)
        return path.parent.name if path.suffix == ".jsonl" else path.resolve().name
    folders = [folder for _, folder in _logs(one)] if hasattr(one, "history") else []
    return folders[0].name if folders else "run"


def _logs(run: Run) -> list[tuple[Any, Path]]:
    """The run's log parts that have a folder."""
    if run._cursor is None:
        return []
    parts = [slot.part for slot in run._cursor.run_slots if type(slot.part).__name__ == "log"]
    return [(part, part.folder) for part in parts if getattr(part, "folder", None) is not None]


def _training(name: str, one: Any) -> Training:
    if isinstance(one, str | Path):
        rows = _file_rows(_log_file(Path(one)))
        if not rows:
            raise ValueError(f"plot: {one} has no row yet.")
        trains = _that_train(rows)
        ends = _ends(rows, trains)
        return Training(name, _placed(rows, ends), ends, trains)
    if not hasattr(one, "history"):
        raise TypeError(f"plot: give a run or a folder that log has written to, or several, got {one!r:.80}.")
    return _of_run(name, one)


def _of_run(name: str, run: Run) -> Training:
    passes = [{**row, "kind": "pass"} for row in run.history]
    logged: list[dict[str, Any]] = []
    for part, folder in _logs(run):
        size = part.marks.get("log.jsonl")  # the file's part that is this run's own
        if size and (folder / "log.jsonl").exists():
            logged = _file_rows(folder / "log.jsonl", size)
    if not passes and not logged:
        begun = run.progress.iteration or run.state is not None
        cure = "Complete a pass, or pipe lt.log(folder) onto it" if begun else "Iterate it"
        raise ValueError(f"plot: {name} has {'no mean yet' if begun else 'not begun'}. {cure} first.")
    known = run.cursor.passes
    trains = [known.names[id(phase)] for phase in run._agenda.phases if phase.trains]
    ends = _ends(passes or logged, trains)
    if known.phase is not None and known.plan.trains and known.plan.length:  # the epoch that is under way
        ends.append((known.began_at + known.plan.length, run.progress.epoch + 1))
    within = [row for row in _placed(logged, ends) if not row.of_pass]
    return Training(name, [*within, *_placed(passes, ends)], ends, trains)


def _log_file(path: Path) -> Path:
    file = path if path.suffix == ".jsonl" else path / "log.jsonl"
    if file.is_file():
        return file
    there = f"{path} does not exist"
    if path.is_dir():
        found = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
        there = f"{path} has {', '.join(found[:8]) or 'nothing'}{' ...' * (len(found) > 8)}"
    raise FileNotFoundError(f"plot: there is no log.jsonl: {there}. lt.log(folder) writes one.")


def _file_rows(file: Path, size: int | None = None) -> list[dict[str, Any]]:
    lines = file.read_bytes()[:size].decode("utf-8").splitlines()
    if size is None and lines and not lines[-1].endswith("}"):
        del lines[-1]  # it is being written just now
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError as error:
        error.add_note(f"plot: {file} is not what lt.log(folder) writes, one JSON object a line.")
        raise
    known = [row for row in rows if isinstance(row, dict) and row.get("kind") in ("pass", "iterations")]
    for row in known:
        missing = [key for key in ("phase", "epoch", "index", "iteration", "seconds") if key not in row]
        if missing:
            raise ValueError(f"plot: a row of {file} has no {missing[0]!r}, which lt.log(folder) writes: {row!r:.80}.")
    return known


def _done(row: Mapping[str, Any]) -> int:
    """Training iterations by then."""
    return int(row.get("trained", row["iteration"] + 1))


def _that_train(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The phases that train, told by the counters: those of a validation stand still."""
    trains: dict[str, None] = {}
    before = 0
    for row in rows:
        ahead = _done(row) - before
        if row["kind"] == "iterations" or ahead > 1 or ahead == row["index"] + 1:
            trains[row["phase"]] = None
        before = max(before, _done(row))
    return list(trains)


def _ends(rows: Iterable[Mapping[str, Any]], trains: list[str]) -> list[tuple[float, float]]:
    """Where each training pass ends, in iterations and epochs done; where the first one begins before them."""
    ends = [(_done(row), row["epoch"] + 1) for row in rows if row["kind"] == "pass" and row["phase"] in trains]
    return [(0.0, 0.0), *ends]


def _placed(rows: Iterable[Mapping[str, Any]], ends: list[tuple[float, float]]) -> list[Row]:
    result, seconds = [], 0.0
    for row in rows:
        of_pass = row["kind"] == "pass"
        done = _done(row)
        at = {"iteration": done, "epoch": _epoch(done, ends), "seconds": seconds + row["seconds"]}
        seconds += row["seconds"] if of_pass else 0
        values = {key: number for key, value in row.items() if key not in NO_METRIC and (number := _number(value))}
        result.append(Row(row["phase"], of_pass, at, {key: value[0] for key, value in values.items()}))
    return result


def _number(value: Any) -> tuple[float] | None:
    """The value in a tuple, if it is a number; log.jsonl has ``"nan"`` and ``"inf"`` as strings."""
    if isinstance(value, str) and value not in ("nan", "inf", "-inf"):
        return None
    return (float(value),) if isinstance(value, int | float | str) else None


def _epoch(done: float, ends: list[tuple[float, float]]) -> float:
    """Epochs done by then, with the share of the one that is under way."""
    for (start, epoch), (end, next_epoch) in itertools.pairwise(ends):
        if done <= end:
            return epoch + (next_epoch - epoch) * (done - start) / max(end - start, 1)
    last = ends[-1]
    length = last[0] - ends[-2][0] if len(ends) > 1 else 0
    return last[1] + ((done - last[0]) / length if length else 0)
