"""A fault at every call of the save path: the newest checkpoint on the list is always whole, and can be gone on from.

    python tests/campaigns/save_faults.py            # every call that looptools makes, each with every fault
    python tests/campaigns/save_faults.py --short    # every call once, with the faults in turn
    python tests/campaigns/save_faults.py --strace   # every system call, by strace, where there is one (Linux)

A process resumes a run from its first checkpoint and trains on to the second, which is the best as well and displaces
the first. At its n-th call that has to do with files it is killed, or the call fails. Then another process looks at the
folder, and goes on to the end: to the same bits as a run that nothing happened to.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import io
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import looptools as lt
from looptools.archives import files, whole
from looptools.checkpoints import lock, manifest

CALLS = ["open", "close", "fsync", "fdatasync", "replace", "rename", "unlink", "mkdir", "stat", "scandir"]
FAULTS = ["kill before", "kill after", "kill half way", "ENOSPC", "EIO", "EIO after"]
SYSTEM = "openat,close,read,write,lseek,fsync,fdatasync,rename,unlink,newfstatat,getdents64,flock,ftruncate,mkdir"


def make(folder: Path) -> lt.Run:
    """Three rounds, each better than the one before; large records, as seen from the thresholds below."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.5), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train = lt.train(model, [torch.ones(2, 16)] * 2, lambda model, batch: model(batch).pow(2).mean())
    val = lt.validate(model, [0.0], lambda model, batch, state: {"score": float(state.epoch)})
    run = lt.workflow([(train | lt.optimize(optimizer), 1), (val, 1)], max_epochs=3)
    return run | lt.checkpoint(folder, keep=1, best=lt.highest("val/score"))


class Faults:
    """Stands between looptools and the system: counts the calls, and does to one of them what is asked for."""

    def __init__(self, at: int = 0, fault: str = "") -> None:
        self.at, self.fault = at, fault
        self.calls: list[str] = []

    def call(self, name: str, real: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self.calls.append(name)
        if len(self.calls) != self.at:
            return real(*args, **options)
        kind, _, when = self.fault.partition(" ")
        if when == "half way" and name == "write":
            real(memoryview(args[0])[: len(args[0]) // 2])
        elif when == "after":
            real(*args, **options)
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, kind)
        paths = [str(arg) for arg in args[:1] if isinstance(arg, str | Path)]  # the system knows no other
        raise OSError(number, os.strerror(number), *paths)

    def install(self) -> None:
        """For the rest of this process."""
        for name in CALLS:
            self._wrap(os, name)
        self._wrap(fcntl, "flock")
        self._wrap(io, "open")  # of Path.read_bytes
        for module in (files, lock, whole):
            module.FileIO = self._file_class()  # type: ignore[attr-defined]

    def _wrap(self, module: Any, name: str) -> None:
        real = getattr(module, name)
        setattr(module, name, lambda *args, **options: self.call(name, real, *args, **options))

    def _file_class(self) -> type:
        faults, methods = self, {}
        for name in ("write", "read", "readinto", "seek", "truncate", "close"):

            def method(file: Any, *args: Any, name: str = name) -> Any:
                real = getattr(super(kind, file), name)
                if name == "close" and not file.closed and not file.writable():
                    return real()  # there is nothing that could fail
                return faults.call(name, real, *args)

            methods[name] = method

        def opened(file: Any, *args: Any, **options: Any) -> None:
            faults.call("open", super(kind, file).__init__, *args, **options)

        kind = type("FileIO", (io.FileIO,), {**methods, "__init__": opened})
        return kind


def forked(action: Callable[[], None]) -> tuple[int, str]:
    """Do *action* in a child: how that ended (0: well; 1: an exception; negative: a signal), and what it raised."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        try:
            action()
            code = 0
        except BaseException:
            os.write(write, traceback.format_exc().encode()[-60_000:])
            code = 1
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        raised = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), raised


def go_on(folder: Path, before: Callable[[], None] = lambda: None) -> None:
    """Resume, and train through the round that ends with the save; *before* the first call that counts."""
    run = make(folder)
    run.resume()
    lock.let_go(run.cursor)  # it is taken again, which counts
    before()
    for state in run:
        if state.round_last:
            break
    run.close()


def examine(folder: Path, survived: bool, straight: dict[str, torch.Tensor]) -> None:
    """What must be true after any fault."""
    if survived:
        assert not list(folder.glob(".*")), "a temporary file is left"
    listed = manifest.read_manifest(folder).checkpoints
    assert listed, "no checkpoint is listed"
    assert files.differs(folder / listed[-1]["file"], listed[-1]) == "", "the newest is not what was written"
    assert files.damage(folder / "best.pt") == "", "the best is damaged"
    run = make(folder)
    path = run.resume()
    assert path == folder / listed[-1]["file"], f"{path} was taken"
    run.to_end()
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, straight[key]), f"{key} differs"
    left = sorted(path.name for path in folder.iterdir())
    newest = [name for name in left if name.startswith("epoch_0003")]
    assert {*newest, "best.pt", "checkpoints.json"} <= set(left), left
    assert not list(folder.glob(".*")), "a later run has not cleared up"


class Campaign:
    """Makes the folder that every trial begins with, and counts trials and failures."""

    def __init__(self, place: Path) -> None:
        self.place, self.counts, self.failures = place, Counter[str](), 0
        self.start = place / "start"
        run = make(self.start)
        for state in run:
            if state.round_last:
                break
        run.close()
        run = make(place / "straight")
        run.to_end()
        self.straight = {key: value.clone() for key, value in run.model.state_dict().items()}

    def trial(self, name: str, do: Callable[[Path], tuple[int, str]]) -> None:
        """Do it to a new copy of the folder, and look at what is left."""
        folder = self.place / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.start, folder)
        code, raised = do(folder)
        how = "killed" if code < 0 else "raised" if code else "went well"
        self.counts[how] += 1
        clean = not raised or re.search(r"^\w*Error: \[Errno \d+\] .*: '.*'$", raised, re.MULTILINE)
        wrong = "" if clean else f"no OSError with errno and path:\n{raised}"
        bad, told = forked(lambda: examine(folder, code >= 0, self.straight))
        if bad or wrong:
            self.failures += 1
            print(f"FAILED: {name} ({how}):\n{wrong}{told}")

    def by_shim(self, short: bool) -> None:
        """Every call that looptools makes."""
        counting = Faults()
        read, write = os.pipe()

        def count() -> None:
            go_on(self.place / "count", counting.install)
            os.write(write, " ".join(counting.calls).encode())

        shutil.copytree(self.start, self.place / "count")
        code, raised = forked(count)
        assert code == 0, raised
        calls = os.read(read, 1 << 16).decode().split()
        print(f"{len(calls)} calls: " + ", ".join(f"{n} {name}" for name, n in sorted(Counter(calls).items())))
        for at, name in enumerate(calls, 1):
            for fault in [FAULTS[at % len(FAULTS)]] if short else FAULTS:
                shim = Faults(at, fault)
                self.trial(
                    f"{fault} at call {at}, {name}",
                    lambda folder, shim=shim: forked(lambda: go_on(folder, shim.install)),  # type: ignore[misc]
                )

    def by_strace(self) -> None:
        """Every system call of the same process."""
        seen = self.place / "trace"
        shutil.copytree(self.start, self.place / "traced")
        code, raised = traced(self.place / "traced", ["-o", str(seen), "-e", f"trace={SYSTEM}"])
        assert code == 0, raised
        counts: Counter[tuple[str, str]] = Counter()  # by thread: so strace counts
        for thread, name in re.findall(r"^(\d+) +(\w+)\(", seen.read_text(), re.MULTILINE):
            counts[thread, name] += 1
        most = {name: max(n for (_, other), n in counts.items() if other == name) for _, name in counts}
        print(f"{sum(most.values())} system calls: " + ", ".join(f"{n} {name}" for name, n in sorted(most.items())))
        for name, times in sorted(most.items()):
            for at in range(1, times + 1):
                for fault in ("signal=KILL", "error=ENOSPC", "error=EIO"):
                    options = ["-o", "/dev/null", "-e", f"inject={name}:{fault}:when={at}"]
                    self.trial(f"{fault} at {name} {at}", lambda folder, options=options: traced(folder, options))  # type: ignore[misc]


def traced(folder: Path, options: list[str]) -> tuple[int, str]:
    """Go on in a child that strace, with these options, attaches to when it has resumed."""

    def attach() -> None:
        child = os.getpid()
        if not os.fork():
            command = ["strace", "-qq", "-f", "-p", str(child), *options]
            os.execvp(command[0], command)
        traced = False
        while not traced:
            time.sleep(0.01)
            with contextlib.suppress(OSError):  # strace is at work already, also on these calls
                traced = "TracerPid:\t0\n" not in Path(f"/proc/{child}/status").read_text()

    return forked(lambda: go_on(folder, attach))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="every call once, with the faults in turn")
    parser.add_argument("--strace", action="store_true", help="at every system call instead, by strace")
    options = parser.parse_args()
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", ResourceWarning)  # what was opened before it failed
    warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)  # torch has threads, which do nothing here
    torch.set_num_threads(1)
    if not options.short:
        whole.LARGE, whole.STEP = 1000, 4000  # so that a small file takes the way of a large one
    with tempfile.TemporaryDirectory() as place:
        campaign = Campaign(Path(place))
        if options.strace and shutil.which("strace") is None:
            print("There is no strace here.")
        elif options.strace:
            campaign.by_strace()
        else:
            campaign.by_shim(options.short)
    said = ", ".join(f"{n} {how}" for how, n in sorted(campaign.counts.items()))
    print(f"{sum(campaign.counts.values())} faults: {said}; {campaign.failures} failures.")
    return min(campaign.failures, 1)


if __name__ == "__main__":
    sys.exit(main())
