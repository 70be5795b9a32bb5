"""Kill trainings at random times, restart them until they end, and compare them with the uninterrupted ones.

    python tests/campaigns/kills.py --kills 2000 --workers 0
    python tests/campaigns/kills.py --kills 2000 --workers 2

A process that has imported torch, and done nothing with it, forks a child for each attempt. The child makes the run
from nothing, resumes, and trains; the parent kills it and its workers with SIGKILL. Linux and macOS.
"""

from __future__ import annotations

import argparse
import collections
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # a process that forks has one thread

import attrs
import numpy
import torch
from trainings import Training, build, result

import looptools as lt
from looptools.archives.files import damage
from looptools.checkpoints.manifest import read_manifest

MADE_ANEW = r".*checkpoints\.json is missing\. It is made anew"  # killed between the first file and its manifest
ALIVE = 90.0  # seconds after which a child hangs
MOST = 40  # kills of one training; the next attempt may end
WAYS = ("any time", "early", "while saving")


def trainings(workers: int) -> list[Training]:
    return [
        Training(every=3, workers=workers),
        Training(every=1, background=True, workers=workers),
        Training(every=4, top=2, background=True, workers=workers),
        Training(every=2, keep=1, workers=workers),
    ]


@attrs.define
class Tally:
    """What came out."""

    kills: int = 0
    saving: int = 0  # kills that left a temporary file
    attempts: int = 0
    ended: int = 0
    most_lost: int = 0  # states done behind the newest checkpoint
    kinds: dict[str, int] = attrs.field(factory=dict)
    faults: list[str] = attrs.field(factory=list)

    def add(self, other: dict[str, Any]) -> None:
        for name in ("kills", "saving", "attempts", "ended"):
            setattr(self, name, getattr(self, name) + other[name])
        self.most_lost = max(self.most_lost, other["most_lost"])
        self.kinds = dict(collections.Counter(self.kinds) + collections.Counter(other["kinds"]))
        self.faults += other["faults"]

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        lines = [
            f"kills: {self.kills} ({kinds}), {self.saving} of them during a save",
            f"attempts: {self.attempts}; trainings that ended: {self.ended}; most iterations lost: {self.most_lost}",
            f"faults: {len(self.faults)}",
        ]
        return "\n".join([*lines, *self.faults[:20]])


class Child:
    """One attempt at a training, in a process of its own.

    Args:
        training: What it trains.
        folder: Where it writes.
        seed: Of the random numbers before it builds the run.
        held: Name of the checkpoint that it is to resume from; empty if there is none.
    """

    def __init__(self, training: Training, folder: Path, seed: int, held: str = "") -> None:
        self.folder = folder
        self.told = mmap.mmap(-1, 16)  # states done when it resumed, and by now
        self.out = folder.parent / f"{folder.name}.json"
        self.chosen = folder.parent / f"{folder.name}.chosen"
        self.errors = folder.parent / f"{folder.name}.err"
        self.chosen.unlink(missing_ok=True)
        self.pid = os.fork()
        if self.pid == 0:
            self._live(training, seed, held)
        self.status: int | None = None

    def _live(self, training: Training, seed: int, held: str) -> None:
        code = 1
        try:
            os.setsid()
            out = os.open(self.errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for descriptor in (1, 2):
                os.dup2(out, descriptor)
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=MADE_ANEW)
            lt.seed_everything(seed)
            run = build(training, self.folder)
            if held:
                torch.rand(1 + seed % 7)  # the generators stand anywhere
                numpy.random.rand(seed % 5)
                random.random()
            path = run.resume()
            self.chosen.with_suffix(".tmp").write_text("" if path is None else path.name)
            os.replace(self.chosen.with_suffix(".tmp"), self.chosen)
            done = run.progress.iteration if path is not None else 0
            self.told[:] = struct.pack("qq", done, done)
            for _ in iter(run.__next__, None):
                self.told[8:] = struct.pack("q", run.progress.iteration)
            self.out.with_suffix(".tmp").write_text(json.dumps(result(run, self.folder)))
            os.replace(self.out.with_suffix(".tmp"), self.out)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def over(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status is not None

    def kill(self) -> bool:
        """Kill it with its workers; False if it had ended by itself."""
        for number in (self.pid, -self.pid):  # before it is a group of its own, only itself
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if self.status is None:
            _, self.status = os.waitpid(self.pid, 0)
        return os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL

    @property
    def iterations(self) -> tuple[int, int]:
        return struct.unpack("qq", self.told[:])  # type: ignore[return-value]


def saving(folder: Path) -> bool:
    """Whether a temporary file is there."""
    try:
        return any(entry.name.startswith(".") and entry.name.endswith(".tmp") for entry in os.scandir(folder))
    except FileNotFoundError:
        return False


def wait(child: Child, way: str, whole: float, chance: random.Random) -> None:
    """Until it is to be killed, or has ended."""
    began = time.perf_counter()

    def until(seen: Callable[[], bool], seconds: float) -> None:
        while not seen() and not child.over() and time.perf_counter() - began < seconds:
            time.sleep(0.0002)

    if way == "any time":
        until(lambda: False, chance.uniform(0, 1.2 * whole))
    elif way == "early":
        until(lambda: False, 0.001 * (1000 * whole) ** chance.random())
    else:
        for _ in range(chance.randint(1, 6)):  # files; a temporary one may be left by the attempt before
            until(lambda: not saving(child.folder), 2 * whole)
            until(lambda: saving(child.folder), 2 * whole)
        time.sleep(10 ** chance.uniform(-5, -2))


def newest(folder: Path, faults: list[str], where: str) -> tuple[str, int]:
    """The newest checkpoint by the manifest, which must be sound, as all that are listed; and its iteration."""
    if not folder.exists():
        return "", 0
    try:
        manifest = read_manifest(folder)
    except Exception as error:
        faults.append(f"{where}: the manifest: {error!r}")
        return "", 0
    for entry in [*manifest.checkpoints, *manifest.best]:
        wrong = damage(folder / entry["file"], entry)
        if wrong:
            faults.append(f"{where}: {entry['file']} is damaged: {wrong}")
    sound = [entry for entry in manifest.checkpoints if not damage(folder / entry["file"], entry)]
    if manifest.checkpoints and (not sound or sound[-1] is not manifest.checkpoints[-1]):
        faults.append(f"{where}: the newest, {manifest.checkpoints[-1]['file']}, is not sound")
    return (sound[-1]["file"], sound[-1]["iteration"]) if sound else ("", 0)


def straight(training: Training, folder: Path) -> tuple[dict[str, Any], float]:
    """The uninterrupted training, and the seconds that it takes."""
    began = time.perf_counter()
    child = Child(training, folder, 1)
    while not child.over() and time.perf_counter() - began < ALIVE:
        time.sleep(0.001)
    if child.status != 0:
        child.kill()
        raise SystemExit(f"the uninterrupted training fails:\n{child.errors.read_text()}")
    return json.loads(child.out.read_text()), time.perf_counter() - began


def campaign(kills: int, workers: int, seed: int, folder: Path, until: float) -> Tally:
    """Kill so often, or *until* then."""
    chance, tally = random.Random(seed), Tally()
    kinds = trainings(workers)
    known = {t.name: straight(t, folder / f"straight-{number}") for number, t in enumerate(kinds)}
    number = 0
    while tally.kills < kills and time.time() < until:
        training = chance.choice(kinds)
        expected, whole = known[training.name]
        one_training(training, expected, whole, folder / f"run-{number}", kills, chance, tally)
        number += 1
    return tally


def one_training(
    training: Training,
    expected: dict[str, Any],
    whole: float,
    folder: Path,
    kills: int,
    chance: random.Random,
    tally: Tally,
) -> None:
    """Kill one training until it has ended, or often enough."""
    mine = 0
    while True:
        where = f"{training.name}, {folder.name}, after {mine} kills"
        held, _ = newest(folder, tally.faults, where)
        child = Child(training, folder, chance.randrange(2**31), held)
        tally.attempts += 1
        way = chance.choice(WAYS)
        if mine < MOST and tally.kills < kills:
            wait(child, way, whole, chance)
        else:
            began = time.perf_counter()
            while not child.over() and time.perf_counter() - began < ALIVE:
                time.sleep(0.002)
        killed = not child.over() and child.kill()
        chosen = child.chosen.read_text() if child.chosen.exists() else None
        if chosen is not None and chosen != held:
            tally.faults.append(f"{where}: it chose {chosen or 'nothing'}, the newest is {held or 'nothing'}")
        if not killed:
            break
        mine += 1
        tally.kills += 1
        tally.saving += saving(folder)
        tally.kinds[way] = tally.kinds.get(way, 0) + 1
        _, done = newest(folder, tally.faults, f"{where}, killed {way}")
        lost = child.iterations[1] - done
        tally.most_lost = max(tally.most_lost, lost)
        if lost > training.every * (2 if training.background else 1):
            tally.faults.append(f"{where}: {lost} iterations are lost")
    if child.status != 0:
        tally.faults.append(f"{where}: it fails: {child.errors.read_text()[-1500:]}")
        return
    tally.ended += 1
    got = json.loads(child.out.read_text())
    wrong = [key for key in expected if got[key] != expected[key]]
    if wrong:
        tally.faults.append(f"{where}: not as uninterrupted: {', '.join(wrong)} ({got['iterations']} iterations)")
        return
    newest(folder, tally.faults, f"{where}, ended")
    shutil.rmtree(folder)


def warm_up(folder: Path) -> None:
    """Import all that a training needs; and see that no thread is left, which a fork would lose."""
    run = build(Training(), folder)
    run.to_end()
    result(run, folder)
    tasks = Path("/proc/self/task")
    if tasks.exists() and len(list(tasks.iterdir())) > 1:
        raise SystemExit("the process that is to fork has threads")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after that time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=MADE_ANEW)
    began = time.time()
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="kills_", ignore_cleanup_errors=True) as place:
        warm_up(Path(place) / "warm")
        drivers = {}
        for number in range(options.jobs):
            folder = Path(place) / f"driver-{number}"
            folder.mkdir()
            share = (options.kills + options.jobs - 1) // options.jobs
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    until = began + 60 * options.minutes
                    found = campaign(share, options.workers, 1000 * options.seed + number, folder, until)
                    (folder / "tally.json").write_text(json.dumps(attrs.asdict(found)))
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            drivers[pid] = folder / "tally.json"
        for pid, file in drivers.items():
            _, status = os.waitpid(pid, 0)
            if status:
                tally.faults.append(f"a driver ended with status {status}")
            else:
                tally.add(json.loads(file.read_text()))
    seconds = time.time() - began
    print(tally)
    print(f"{seconds:.0f} s, {tally.kills / seconds:.1f} kills a second, workers {options.workers}")
    return 1 if tally.faults or not tally.ended else 0


if __name__ == "__main__":
    sys.exit(main())
