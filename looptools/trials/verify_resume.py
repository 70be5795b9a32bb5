"""See whether a run, stopped anywhere and resumed in a fresh process, ends with the same bits."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import attrs

from ..checkpoints.described import size
from ..checks import whole_number
from . import trial
from .digests import CLOCKS
from .first_difference import Record, clocks, first_difference, hints, place_of, unseeded
from .fresh import Process, in_turn, named, within

if TYPE_CHECKING:
    from ..run import Run

NOT_THE_SAME_TWICE = (
    "Seed it in build: lt.seed_everything(0). On a GPU some operations add in any order: deterministic=True there. The "
    "order of a set of strings is another in each process, unless PYTHONHASHSEED is set."
)


@attrs.frozen
class Row:
    """One place at which the run was saved, and resumed.

    Args:
        position: States that were done.
        where: The state after which it was saved.
        what: What is special there.
        bytes: Size of the checkpoint.
        seconds: That the resumed process took, its start included.
        difference: The first thing that is not as in the uninterrupted run; empty for the same bits.
        hints: What may be the cause.
    """

    position: int
    where: str
    what: str
    bytes: int
    seconds: float
    difference: str = ""
    hints: tuple[str, ...] = ()

    def shown(self, where: int = 29, what: int = 30, known: set[str] | None = None) -> str:
        """Its line of the table, with columns so wide, and the hints that are not *known* from lines before."""
        known = set() if known is None else known
        new = {_without_values(hint): hint for hint in self.hints if _without_values(hint) not in known}
        known |= new.keys()
        cells = f"{self.position:>5}  {self.where:<{where}}  {self.what:<{what}}  {size(self.bytes):>9}"
        line = f"{cells}  {self.seconds:>6.1f} s  {self.difference or 'same bits'}"
        return "\n".join([line, *(f"       - {hint}" for hint in new.values())])


def _without_values(hint: str) -> str:
    return re.sub(r" \(\S+ without interruption.*", "", hint)


@attrs.frozen(repr=False)
class Report:
    """What `verify_resume` has found; printed, it is a table.

    Args:
        build: What was tried.
        rows: The places.
        states: Of the uninterrupted run.
        cut: How the run was cut to be tried; empty if it was not.
        problem: Why nothing can be said of resumption.
        left_out: Metrics that are not compared, since two uninterrupted runs differ in them.
        seconds: In all.
    """

    build: str
    rows: tuple[Row, ...]
    states: int
    cut: str = ""
    problem: str = ""
    left_out: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether the run ended with the same bits from everywhere."""
        return not self.problem and bool(self.rows) and not any(row.difference for row in self.rows)

    def __repr__(self) -> str:
        wrong = sum(bool(row.difference) for row in self.rows)
        verdict = self.problem or (f"{wrong} of {len(self.rows)} differ" if wrong else "the same bits from everywhere")
        lines = [f"verify_resume({self.build}): {verdict}"]
        if self.rows:
            where, what = (max(len(getattr(row, name)) for row in self.rows) for name in ("where", "what"))
            lines.append(f"{'after':>5}  {'last':<{where}}  {'':<{what}}  {'file':>9}  {'time':>8}  result")
            known: set[str] = set()
            lines += [row.shown(where, what, known) for row in self.rows]
        if self.cut:
            lines.append(f"The run was cut to {self.cut}: states=None tries all of it.")
        if self.left_out:
            lines.append(f"Not compared, since two uninterrupted runs differ in it: {', '.join(self.left_out)}.")
        return "\n".join([*lines, f"{self.states} states; {self.seconds:.0f} s in all."])


def verify_resume(
    build: Callable[[], Run] | str,
    *,
    at: Iterable[int] | None = None,
    every: int | None = None,
    states: int | None = 100,
    fresh: bool = True,
    at_once: int | None = None,
    timeout: float = 600.0,
    line: Callable[[str], Any] | None = print,
) -> Report:
    """Save a run at hostile places, resume it from each in a fresh process, and compare bit for bit.

    First the run goes through twice without interruption, in two processes: if these differ, no resumption could be
    exact, which is said. The second one saves: after the first iteration, inside an epoch and a later one, in an
    accumulation window, before and after the last batch of a pass, after the first one of the next, inside a
    validation, and at the very end. From each place another process goes on to the end. Compared are all states that
    follow (batch, loss, learning rate, metrics), after each what a checkpoint holds (weights, buffers, optimizers,
    averages, random generators, parts' memory; of models above 32 MB after some), in the end results, history and
    ``log.jsonl``. Names that two uninterrupted runs differ in, as clocks do, are left out.

    Parts with a ``folder`` write into a temporary one, and ``log(to=...)`` is left out; what else *build* writes is its
    own affair. A process takes some seconds to start, so the whole takes about a dozen times as long as the run, and
    half a minute.

    Args:
        build: A function without arguments that returns a fresh run, at the top of a module, so that another process
            can import it; or ``"module:function"``. In a script, call `verify_resume` behind
            ``if __name__ == "__main__":``. What the run needs besides (seeds, threads) belongs into it.
        at: Numbers of states after which to save, instead of those places.
        every: Save after every so many states instead.
        states: About how many the run may have; a longer one is cut to two rounds, of fewer batches a pass, which the
            report says. None for all of it.
        fresh: A process for each place; False resumes all in one, which is quicker, but does not see what a class or a
            module remembers.
        at_once: Processes at the same time; None for two, or one where the run uses a GPU.
        timeout: Seconds after which a process is killed, with its workers.
        line: Called with what is found as it is found; None for silence.

    Returns:
        A report: ``.exact``, ``.rows``, and as text a table, with the first thing that differs and likely causes.

    Raises:
        RuntimeError: If the uninterrupted run fails.
        TypeError: If *build* is no function, or returns no run.
        ValueError: If another process cannot import *build*, or *at* lies behind the end.

    Example:
        >>> def build():
        ...     model = torch.nn.Linear(1, 1)
        ...     phase = lt.train(model, [torch.ones(4, 1)] * 3, lambda model, batch: model(batch).mean())
        ...     return lt.workflow([(phase, 1)], max_epochs=2)
        >>> lt.verify_resume(lambda: build())
        Traceback (most recent call last):
        ...
        ValueError: verify_resume: a lambda, so a fresh process cannot import it. Define it at the top of a module, without arguments: def build(): ...; return run.
    """  # noqa: E501
    if within():
        raise RuntimeError(
            "verify_resume: it was called again while a fresh process imported the script. Put the call behind "
            'if __name__ == "__main__":'
        )
    for name, value in (("every", every), ("states", states), ("at_once", at_once)):
        if value is not None:
            whole_number(f"verify_resume: {name}", value)
    found = named(build)
    began = perf_counter()
    with tempfile.TemporaryDirectory(prefix="verify_resume_", ignore_cleanup_errors=True) as folder:
        trials = _Trials(attrs.asdict(found), states, Path(folder), timeout)
        report = _verify(trials, str(found), at, every, fresh, at_once, line or (lambda text: None))
    return attrs.evolve(report, seconds=perf_counter() - began)


@attrs.frozen(eq=False)
class _Trials:
    """Has jobs done by fresh processes.

    Args:
        build: How they find the function.
        states: As for `verify_resume`.
        folder: For their files.
        timeout: Seconds for each process.
    """

    build: dict[str, Any]
    states: int | None
    folder: Path
    timeout: float

    def job(self, name: str, **more: Any) -> dict[str, Any]:
        parts = self.folder / name / "parts"
        return {"out": str(self.folder / name / "record.json"), "parts": str(parts), **more}

    def do(self, groups: list[list[dict[str, Any]]], at_once: int = 1) -> Iterator[tuple[Record, float]]:
        """Do each group of jobs in a process of its own; yields the record of each job, and the seconds it took."""
        processes = [self._process(jobs) for jobs in groups]
        for process, jobs in zip(in_turn(processes, at_once), groups, strict=True):
            for job in jobs:
                out = Path(job["out"])
                record = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"error": self._died(process)}
                yield {**record, "output": process.last_words()}, process.seconds / len(jobs)

    def _process(self, jobs: list[dict[str, Any]]) -> Process:
        told = {"build": self.build, "states": self.states, "jobs": jobs}
        return Process(trial.__name__, told, Path(jobs[0]["out"]).parent, self.timeout)

    def _died(self, process: Process) -> str:
        if process.late:
            return f"it was still at work after {self.timeout:g} seconds (timeout=), and was killed"
        return f"the process ended with exit code {process.code}"

    def one(self, name: str, **more: Any) -> Record:
        """Let the run go through without interruption.

        Raises:
            RuntimeError: If it fails.
        """
        record, seconds = next(self.do([[self.job(name, **more)]]))
        if "error" in record:
            raise RuntimeError(
                f"verify_resume: without interruption the run fails in a fresh process: {record['error']}\n"
                f"Its last words:\n{record['output']}"
            )
        return {**record, "took": seconds}


def _verify(
    trials: _Trials,
    name: str,
    at: Iterable[int] | None,
    every: int | None,
    fresh: bool,
    at_once: int | None,
    line: Callable[[str], Any],
) -> Report:
    plain = trials.one("plain")
    count = len(plain["states"])
    chosen = _chosen(plain, at, every)
    at_once = at_once or (1 if plain["cuda"] else 2)
    about = plain["took"] * (1 + len(chosen) / at_once)
    line(f"verify_resume({name}): {count} states, {len(chosen)} places to resume from; {about:.0f} s or so.")
    report = Report(name, (), count, plain["cut"])
    save = {str(number): str(trials.folder / f"at_{number}") for number in chosen}
    straight = trials.one("saving", save=save, deep=True)
    names, places = clocks(plain, straight)
    wrong = first_difference(plain, straight, 0, names, places | unseeded(plain, straight))
    if wrong is not None or not names <= CLOCKS:
        problem, names = _twice(trials, plain, straight, names)
        if problem:
            return attrs.evolve(report, problem=problem)
    jobs = [_resuming(trials, straight, number) for number in chosen]
    rows: list[Row] = []
    known: set[str] = set()
    results = trials.do([[job] for job in jobs] if fresh else [jobs], at_once)
    for (number, what), (record, seconds) in zip(chosen.items(), results, strict=True):
        said, causes = _judged(straight, record, number, names, places)
        where, weighs = place_of(straight["states"][number - 1]), straight["sizes"][str(number)][1]
        rows.append(Row(number, where, what, weighs, seconds, said, causes))
        line(rows[-1].shown(known=known))
    return attrs.evolve(report, rows=tuple(rows), left_out=tuple(sorted(names - CLOCKS)))


def _chosen(plain: Record, at: Iterable[int] | None, every: int | None) -> dict[int, str]:
    """After how many states to save, and what is special there.

    Raises:
        ValueError: If there are not so many.
    """
    count, hostile = len(plain["states"]), positions(plain["states"])
    if at is None and every is None:
        return hostile
    wanted = sorted(
        {whole_number("verify_resume: at", n) for n in at or ()} | set(range(every or count + 1, count + 1, every or 1))
    )
    if not wanted or wanted[-1] > count:
        raise ValueError(
            f"verify_resume: nothing to save at {wanted or every}, the run has {count} states"
            + (f", cut to {plain['cut']}. states=None tries all of it." if plain["cut"] else ".")
        )
    return {number: hostile.get(number, "") for number in wanted}


def positions(states: list[dict[str, str]]) -> dict[int, str]:
    """After how many states a run is saved, and what is special there."""
    found: dict[int, list[str]] = {}
    passes: list[list[int]] = [[]]
    for number, state in enumerate(states, 1):
        passes[-1].append(number)
        if state["last"] == "True":
            passes.append([])
    passes = [one for one in passes if one]

    def mark(number: int, what: str) -> None:
        if 1 <= number <= len(states):
            found.setdefault(number, []).append(what)

    def trains(numbers: list[int]) -> bool:
        return states[numbers[0] - 1]["trains"] == "True"

    training, judging = [one for one in passes if trains(one)], [one for one in passes if not trains(one)]
    moves = any(state["updates"] == "True" for state in states)
    mark(1, "after the first state")
    for name, numbers in (("inside an epoch", training[:1]), ("inside a later epoch", training[1:2])):
        for one in numbers:
            mark(one[(len(one) - 1) // 2], name)
    for one in training[-1:]:
        inside = [n for n in one[:-1] if states[n - 1]["updates"] == "False"]
        if inside and moves:
            mark(inside[len(inside) // 2], "in an accumulation window")
    for one in passes[:1]:
        mark(one[-1] - 1, "before the last batch")
        mark(one[-1], "at the end of a pass")
        mark(one[-1] + 1, "a new pass has begun")
    for one in judging[:1]:
        mark(one[(len(one) - 1) // 2], "inside a validation")
    mark(len(states), "at the very end")
    return {number: ", ".join(dict.fromkeys(found[number])) for number in sorted(found)}


def _resuming(trials: _Trials, straight: Record, number: int) -> dict[str, Any]:
    """The job of a process that resumes after *number* states."""
    job = trials.job(f"at_{number}", deep=True, resume=straight["sizes"][str(number)][0])
    return job | {"from": number}


def _judged(
    straight: Record, record: Record, number: int, names: set[str], places: set[str]
) -> tuple[str, tuple[str, ...]]:
    """What is wrong with a resumed run, and what may be the cause."""
    if "error" in record:
        return f"it fails: {record['error']}", tuple(record["output"].splitlines()[-1:])
    wrong = first_difference(straight, record, number, names, places)
    return ("", ()) if wrong is None else (str(wrong), tuple(hints(wrong, straight, record, number)))


def _twice(trials: _Trials, plain: Record, straight: Record, names: set[str]) -> tuple[str, set[str]]:
    """When a run that saves and one that does not differ: see whether two that do not save do so, too.

    Returns:
        What keeps resumption from being judged, and the names that are clocks.
    """
    again = trials.one("again")
    clocked, places = clocks(plain, again)
    wrong = first_difference(plain, again, 0, clocked, places | unseeded(plain, again))
    if wrong is not None:
        differ = "two uninterrupted runs differ, so that nothing can be said of resumption"
        return f"{differ}: {wrong}. {NOT_THE_SAME_TWICE}", clocked
    wrong = first_difference(plain, straight, 0, clocked, places | unseeded(plain, straight))
    if wrong is not None:
        cure = "Does a state_dict() change what it saves?"
        return f"saving changes the run, which it must not: {wrong}. {cure}", clocked
    return "", clocked | names
