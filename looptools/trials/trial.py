"""A trial of a run in a process of its own: it is built, perhaps resumed, run to its end, and told of."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import attrs
import torch

from ..agenda import Agenda, Entry
from ..checkpoints.inventory import inventory
from ..data.given import trusted_len
from ..data.loaders import draws_in_workers
from ..phases import Phase
from ..stepping.elsewhere import elsewhere
from ..stepping.mended import mended, piped
from .digests import leaves, of_generators, of_run, of_state
from .fresh import run_main
from .unsaved import unsaved

if TYPE_CHECKING:
    from ..run import Run

FEWEST = 4  # batches that a pass is cut to
AT_ONCE = 1 << 25  # bytes of weights up to which everything is looked at after each state


def main(told: dict[str, Any]) -> None:
    """What a fresh process does: its jobs, one after another."""
    try:
        run_main(told, _do)
    except BaseException as error:  # the user's module could not be imported
        for job in told["jobs"]:
            if not Path(job["out"]).exists():
                _write(job, {"error": _said(error)})


def _do(told: dict[str, Any], build: Any) -> None:
    for job in told["jobs"]:
        _write(job, tell(build, told["states"], job))


def _write(job: dict[str, Any], record: dict[str, Any]) -> None:
    file = Path(job["out"])
    file.with_suffix(".tmp").write_text(json.dumps(record), encoding="utf-8")
    os.replace(file.with_suffix(".tmp"), file)


def _said(error: BaseException) -> str:
    traceback.print_exc()  # into the process's output
    return "".join(traceback.format_exception_only(error)).strip()


def tell(build: Any, most: int | None, job: dict[str, Any]) -> dict[str, Any]:
    """Do one job, and tell what the run did and held.

    Args:
        build: Gives the run.
        most: States that it may have; see `cut`.
        job: ``"parts"``, the folder for its parts' files; ``"resume"``, a file, and ``"from"``, how many states were
            done when it was saved; ``"save"``, folders to save in, by the number of states done; ``"deep"``, whether
            all that it holds is told as well.
    """
    began = perf_counter()
    record: dict[str, Any] = {"states": [], "deep": {}, "unsaved": {}, "sizes": {}, "logs": {}, "warnings": []}
    try:
        with _heard(record["warnings"]):
            run, record["cut"] = trial(build(), Path(job["parts"]), most)
            record["sources"] = {run.cursor.passes.names[id(p)]: _source(p) for p in run.cursor.passes.agenda.phases}
            record["begun"] = of_generators()
            if job.get("resume"):
                _draw()
                run.resume(job["resume"])
            _go(run, job, record)
            record["final"], record["ended"] = of_run(run), run.ended
            record["logs"] = _logs(Path(job["parts"]))
    except (Exception, SystemExit) as error:
        record["error"] = _said(error)
    record["seconds"], record["cuda"] = perf_counter() - began, torch.cuda.is_initialized()
    return record


def _go(run: Run, job: dict[str, Any], record: dict[str, Any]) -> None:
    save = {int(number): Path(folder) for number, folder in job.get("save", {}).items()}
    start, step = job.get("from", 0), _step(run)

    def look(number: int) -> None:
        if job.get("deep") and (number % step == 0 or number in save or number == start):
            record["deep"][str(number)] = of_run(run)
        if number in save or (number == start and start):
            record["unsaved"][str(number)] = unsaved(run)

    if start:
        look(start)
    for number, state in enumerate(iter(run.__next__, None), start + 1):
        record["states"].append(of_state(state))
        if number in save:
            began = perf_counter()
            file = run.save(save[number] / "save")
            _copy(Path(job["parts"]), save[number] / "parts")
            size = file.stat().st_size if file is not None else 0
            record["sizes"][str(number)] = [str(file), size, perf_counter() - began]
        look(number)


def _step(run: Run) -> int:
    """Every how many states all that the run holds is told: large models take time."""
    modules = inventory(run.cursor).modules.values()
    weights = [tensor for module in modules for tensor in module.state_dict().values() if torch.is_tensor(tensor)]
    return max(1, math.ceil(sum(tensor.numel() * tensor.element_size() for tensor in weights) / AT_ONCE))


def _draw() -> None:
    """Have the random generators stand somewhere else, as they may in a process that resumes."""
    random.random()
    torch.rand(7)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.rand(3)
    if torch.cuda.is_initialized():
        torch.rand(7, device="cuda")


@contextlib.contextmanager
def _heard(said: list[str]) -> Iterator[None]:
    """Write down what is warned of, whatever the filters say."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        show = warnings.showwarning

        def hear(message: Any, *where: Any, **more: Any) -> None:
            if str(message) not in said:
                said.append(str(message))
                show(message, *where, **more)

        warnings.showwarning = hear
        yield


def _source(phase: Phase) -> dict[str, Any]:
    """What must be known of a phase's data to say what may be wrong with it."""
    source = phase.source
    workers = getattr(source, "num_workers", 0)
    return {"kind": type(source).__name__, "workers": workers, "draws_in_workers": draws_in_workers(source)}


def _copy(folder: Path, to: Path) -> None:
    """Copy what the run's parts have written, as it is at this moment; checkpoints are never written over in place."""

    def link(source: str, target: str) -> None:
        try:
            if not source.endswith(".pt"):
                raise OSError
            os.link(source, target)
        except OSError:
            with contextlib.suppress(FileNotFoundError):  # it may just have been replaced, in the background
                shutil.copyfile(source, target)

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, to, copy_function=link)


def _logs(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of every ``log.jsonl``."""
    found = {}
    for file in sorted(folder.rglob("log.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found[file.relative_to(folder).as_posix()] = [dict(leaves(row)) for row in rows]
    return found


# The run that is tried


def trial(run: Any, folder: Path, most: int | None) -> tuple[Run, str]:
    """The same run, writing into *folder*, and cut to about *most* states; and how it was cut.

    Raises:
        RuntimeError: If it has begun, or was resumed.
        TypeError: If it is no run.
    """
    if not hasattr(run, "_agenda"):
        kind = f"a {type(run).__name__}" if run is not None else "None"
        raise TypeError(f"verify_resume: build returned {kind}, not a run. Return lt.workflow(...) | ...")
    if run.begun or run.resumed or run.ended:
        raise RuntimeError(
            "verify_resume: build returned a run that has begun or was resumed. Leave run.resume() and the loop out of "
            "it: they come behind it."
        )
    agenda, limits, said = cut(run._agenda, most)
    folders: dict[Path, Path] = {}

    def instead(own: Path) -> Path:
        return folders.setdefault(own.resolve(), folder / str(len(folders)))

    built = run._cursor
    phases: dict[int, Phase] = {}
    for given in agenda.phases:
        phase = given if built is None else mended(built, given)
        phase = phase.limit(limits[id(given)]) if id(given) in limits else phase
        parts = tuple(elsewhere(part, instead) for part in phase.middlewares)
        phases[id(given)] = attrs.evolve(phase, middlewares=parts)
    entries = tuple(attrs.evolve(e, phase=phases.get(id(e.phase), e.phase)) for e in agenda.entries)
    middlewares = run._middlewares if built is None else piped(built.run_slots)
    parts = tuple(elsewhere(part, instead) for part in middlewares)
    return type(run)(attrs.evolve(agenda, entries=entries), parts), said


def cut(agenda: Agenda, most: int | None) -> tuple[Agenda, dict[int, int], str]:
    """A workflow of about *most* states: two rounds, of as many batches a pass as there is room for.

    Returns:
        The workflow, the batches that a pass of each phase is limited to, and both in words.
    """
    lengths = {id(phase): _length(phase) for phase in agenda.phases}
    if most is None or _states(agenda, lengths, most) <= most:
        return agenda, {}, ""
    rounds = min(2, agenda.max_rounds or 2)
    entries = tuple(attrs.evolve(e, passes=min(e.passes, 2)) for e in agenda.entries)
    agenda = attrs.evolve(agenda, entries=entries, max_rounds=rounds)
    said = f"{rounds} round{'s' * (rounds > 1)}"
    if _states(agenda, lengths, most) <= most:
        return agenda, {}, said
    passes = [e for e in entries if isinstance(e.phase, Phase)]
    batches = max(FEWEST, most // (rounds * sum(e.passes for e in passes)))
    whole = {id(e.phase) for e in passes if e.batches is None}
    limits = {key: batches for key in whole if (lengths[key] or batches + 1) > batches}
    entries = tuple(attrs.evolve(e, batches=_fewer(e, batches)) for e in entries)
    return attrs.evolve(agenda, entries=entries), limits, f"{said} of {batches} batches a pass"


def _fewer(entry: Entry, batches: int) -> int | None:
    return None if entry.batches is None else min(entry.batches, batches)


def _length(phase: Phase) -> int | None:
    whole = trusted_len(phase.source)
    return whole if whole is None or phase.max_batches is None else min(whole, phase.max_batches)


def _states(agenda: Agenda, lengths: dict[int, int | None], most: int) -> float:
    """How many states the run has; one more than *most* is enough to know."""
    total: float = 0
    for _, n in agenda.walk(lengths):
        total += math.inf if n is None else n
        if total > most:
            break
    return total
