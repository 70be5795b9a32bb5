"""Trainings in processes of their own, to send signals to: one process that has imported torch forks them."""

from __future__ import annotations

import collections
import contextlib
import gc
import hashlib
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


# In the test's process


class Forker:
    """Starts trainings, one after the other."""

    def __enter__(self) -> Forker:
        paths = [str(TESTS), str(TESTS.parent), *sys.path]
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self.lines: queue.Queue[str] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        return self

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.process.stdout.close()

    def __exit__(self, *exception: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.reader.join()

    def start(self, what: str, folder: Path, **options: Any) -> Training:
        assert self.process.stdin is not None
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps({"what": what, "folder": str(folder), **options}), file=self.process.stdin, flush=True)
        return Training(self.lines, folder)


class Training:
    """One of them."""

    def __init__(self, lines: queue.Queue[str], folder: Path) -> None:
        self._lines, self._folder = lines, folder
        self._status: int | None = None
        self.said: list[str] = []
        self.pid = int(self.wait_for("pid"))

    def wait_for(self, word: str, timeout: float = 60) -> str:
        """What comes behind *word* in a line; empty if the process ends before."""
        until = time.monotonic() + timeout
        while self._status is None:
            found, _, rest = self._lines.get(timeout=max(until - time.monotonic(), 0)).strip().partition(" ")
            self.said.append(found)
            if found == "status":
                self._status = int(rest)
            if found == word:
                return rest
        return ""

    def runs(self) -> bool:
        return self._status is None and self._lines.empty()

    def status(self, timeout: float = 60) -> int:
        """Its exit code, or minus the signal that it died of."""
        if self._status is None:
            self.wait_for("status", timeout)
        assert self._status is not None
        return self._status

    def errors(self) -> str:
        """What it wrote to stderr."""
        return (self._folder / "stderr").read_text()


def of_group(group: int, timeout: float = 0.0) -> list[int]:
    """Living processes of a process group, when none is left or the time is over."""
    until = time.monotonic() + timeout
    while True:
        if Path("/proc").is_dir():
            lines = []
            for path in Path("/proc").glob("[0-9]*/stat"):
                with contextlib.suppress(OSError):
                    state, _, pgid = path.read_text().rpartition(")")[2].split()[:3]
                    lines.append(f"{pgid} {state} {path.parent.name}")
        else:
            shown = subprocess.run(["ps", "-A", "-o", "pgid=,stat=,pid="], capture_output=True, text=True, check=True)
            lines = shown.stdout.splitlines()
        split = [line.split() for line in lines]
        left = [int(pid) for pgid, state, pid in split if pgid == str(group) and state[0] != "Z"]
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.05)


def often(forker: Forker, folder: Path, *, signals: int, seed: int, **options: Any) -> collections.Counter[str]:
    """Send signals at random times to trainings that are started again each time, until so many were sent.

    Returns:
        How many were saved; came when the run was over already; and how many trainings were finished.

    Raises:
        AssertionError: If a process ends in another way, leaves another one behind, or a training ends with other bits.
    """
    draw, counts = random.Random(seed), collections.Counter[str]()
    whole = forker.start("train", folder / "whole", **options)
    lasts = -time.monotonic() if whole.wait_for("going") else 0.0
    lasts += time.monotonic() if whole.wait_for("over") == "" else 0.0
    assert whole.status() == 0, whole.errors()
    wanted = (folder / "whole" / "digest").read_text()
    done, late = "", False
    while (sent := counts["saved"] + counts["late"]) < signals or done or late:
        here = folder / f"training{counts['finished']}"
        training = forker.start("train", here, **options)
        done = training.wait_for("going")
        assert not late or done == "", f"ended by a signal before the run was over: {here}, {done}"
        number = draw.choice([signal.SIGTERM, signal.SIGUSR1])
        if sent < signals:
            time.sleep(draw.uniform(0, 0.6 * lasts))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(training.pid, number)
        status = training.status()
        assert of_group(training.pid, timeout=5) == [], f"left behind, after status {status}"
        if status == 0:
            counts["finished"] += 1
            assert (here / "digest").read_text() == wanted, f"other bits in {here}, last process from {done}"
            done, late = "", False
        else:
            assert status in (75, -number), f"status {status} in {here}: {training.errors()}"
            late = status != 75  # then no iteration followed, as the next process sees
            counts["late" if late else "saved"] += 1
    return counts


# In the process that forks


def main() -> None:
    import torch

    torch.set_num_threads(1)
    build("train", Path("nowhere"), 0, "fork")  # an optimizer imports half of torch; once for all
    gc.freeze()  # half of the time that a process takes to end
    for line in sys.stdin:
        order = json.loads(line)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            (quickly if order["what"] == "train" else train)(**order)
            return
        print("status", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def quickly(**order: Any) -> None:
    """Train, and skip the interpreter's end, which takes longer than the training; the other orders go through it."""
    code: Any = 0
    try:
        train(**order)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def train(what: str, folder: str, workers: int = 0, context: str = "fork") -> None:
    """Train as it is told, from where the last one stood."""
    os.setpgid(0, 0)
    print("pid", os.getpid(), flush=True)
    errors = os.open(Path(folder) / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 2)
    run, model = build(what, Path(folder) / "checkpoints", workers, context)
    run.resume()
    for number, state in enumerate(run):
        if number == 0:
            print("going", state.iteration, flush=True)
        if what == "break":
            time.sleep(0.3)
            sys.exit(3)
    print("over", flush=True)
    bits = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    (Path(folder) / "digest").write_text(hashlib.sha256(bits).hexdigest())


class Slow:
    """A data set that takes its time, and hangs where it is told to."""

    def __init__(self, seconds: float, hangs_at: int) -> None:
        self.seconds, self.hangs_at = seconds, hangs_at

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> Any:
        import torch

        time.sleep(1000 if index == self.hangs_at else self.seconds)
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, generator=generator), index % 2


def build(what: str, folder: Path, workers: int, context: str) -> Any:
    """BatchNorm, dropout, AdamW, one-cycle; an iteration takes some milliseconds."""
    import torch
    from loops import classify, network

    import looptools as lt

    def step(model: Any, batch: Any) -> Any:
        if what == "loop":
            print("going", flush=True)
            while True:
                pass
        if what == "prefetch":  # the worker is behind: it hangs at what comes next
            print("going", flush=True)
            time.sleep(0.5)
        if what == "hang":
            print("going", flush=True)
        return classify(model, batch)

    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    hangs_at = {"hang": 4, "prefetch": 4, "break": 12}.get(what, -1)
    data: Any = Slow(0.05 if what == "slow" else 0.001, hangs_at)
    shuffle = hangs_at < 0
    loader = torch.utils.data.DataLoader(
        data, 4, shuffle=shuffle, num_workers=workers, multiprocessing_context=context if workers else None
    )
    train = (
        lt.train(model, loader, step)
        | lt.schedule_lr(optimizer, lt.schedules.one_cycle(0.02))
        | lt.optimize(optimizer, max_norm=1.0)
    )
    val = lt.validate(model, torch.utils.data.DataLoader(data, 8), step)
    entries = [(train, 1), (val, 1)] if hangs_at < 0 else [(train, 1)]
    return lt.workflow(entries, max_epochs=2) | lt.checkpoint(folder), model


if __name__ == "__main__":
    main()
