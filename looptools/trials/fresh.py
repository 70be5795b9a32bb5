"""Fresh processes that find a function again by its name."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing.spawn
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs

BEGIN = (
    "import json, sys; told = json.load(open(sys.argv[1], encoding='utf-8')); sys.path[:] = told['path']; "
    "from {module} import main; main(told)"
)
SHOWN = 15  # lines of a process's output that are shown when it fails
_within = False  # whether this process was started here


def within() -> bool:
    """Whether this process is one of those."""
    return _within


@attrs.frozen
class Named:
    """A function that another process can import.

    Args:
        module: Its module; ``__main__`` for that of the script *main*.
        name: Its qualified name in there.
        main: Path of the script that this process runs, if the function is in it.
    """

    module: str
    name: str
    main: str | None = None

    def __str__(self) -> str:
        return f"{Path(self.main).stem if self.main else self.module}:{self.name}"

    def find(self) -> Any:
        """Import it.

        Raises:
            ImportError: If there is none.
        """
        if self.main is not None:
            multiprocessing.spawn.import_main_path(self.main)
        found: Any = sys.modules[self.module] if self.main is not None else importlib.import_module(self.module)
        for name in self.name.split("."):
            if not hasattr(found, name):
                raise ImportError(f"verify_resume: there is no {self.name} in {self.module}.")
            found = getattr(found, name)
        return found


def named(build: Any) -> Named:
    """How a fresh process finds *build*: a function of a module, or ``"module:function"``.

    Raises:
        TypeError: If it is neither.
        ValueError: If it cannot be imported, and why.
    """
    if isinstance(build, str):
        module, _, name = build.partition(":")
        if not module or not name:
            raise ValueError(f'verify_resume: write "module:function", got {build!r}.')
        found = Named(module, name)
        if not callable(found.find()):
            raise TypeError(f"verify_resume: {build} is no function that returns a run.")
        return found
    if not callable(build):
        raise TypeError(
            f"verify_resume: build must be a function that returns a fresh run, got a {type(build).__name__}. A run "
            "can't be built anew by another process: give the function that makes it."
        )
    name, module = getattr(build, "__qualname__", ""), getattr(build, "__module__", None) or ""
    cure = "Define it at the top of a module, without arguments: def build(): ...; return run"
    if not name or not module:
        raise ValueError(f"verify_resume: {type(build).__name__} has no name by which to import it. {cure}.")
    if "<lambda>" in name or "<locals>" in name:
        kind = "a lambda" if "<lambda>" in name else f"{name.rpartition('.')[2]} is defined within another function"
        raise ValueError(f"verify_resume: {kind}, so a fresh process cannot import it. {cure}.")
    held: Any = sys.modules.get(module)
    for part in name.split("."):
        held = getattr(held, part, None)
    if held != build:
        raise ValueError(f"verify_resume: {module}.{name} is not the function that was given. {cure}.")
    return _in_main(name) if module == "__main__" else Named(module, name)


def _in_main(name: str) -> Named:
    main = sys.modules["__main__"]
    spec, path = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None and spec.name and not spec.name.endswith("__main__"):  # python -m package.module
        return Named(spec.name, name)
    if path is None or hasattr(sys, "ps1") or "ipykernel" in sys.modules or not Path(path).is_file():
        raise ValueError(
            f"verify_resume: {name} was typed in a notebook or at a prompt, so a fresh process cannot import it. Write "
            "it into a file beside it (in a notebook with %%writefile pipe.py at the top of a cell) and import it from "
            'there: lt.verify_resume("pipe:build").'
        )
    return Named("__main__", name, str(Path(path).resolve()))


@attrs.define(eq=False)
class Process:
    """A fresh process at work, in a group of its own, so that its workers end with it.

    Args:
        module: Whose ``main`` it calls.
        told: What it is told, as JSON; the way to import things is added.
        folder: For its output.
        timeout: Seconds after which it is killed.
    """

    module: str
    told: dict[str, Any]
    folder: Path
    timeout: float
    late: bool = attrs.field(default=False, init=False)
    seconds: float = attrs.field(default=0.0, init=False)
    _began: float = attrs.field(default=0.0, init=False)
    _process: Any = attrs.field(default=None, init=False)

    def start(self) -> None:
        """Start it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        told = self.told | {"path": sys.path, "argv": sys.argv}
        file = self.folder / "told.json"
        file.write_text(json.dumps(told), encoding="utf-8")
        command = [sys.executable, "-c", BEGIN.format(module=self.module), str(file)]
        self._began = time.perf_counter()
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=os.name == "posix"
            )

    @property
    def _output(self) -> Path:
        return self.folder / "output.txt"

    def over(self) -> bool:
        """Whether it has ended; one that takes too long is killed."""
        if self._process.poll() is None and time.perf_counter() - self._began > self.timeout:
            self.late = True
            self.kill()
        self.seconds = time.perf_counter() - self._began
        return self._process.poll() is not None

    @property
    def code(self) -> int:
        """Its exit code."""
        return int(self._process.returncode)

    def kill(self) -> None:
        """End it now, with the workers of its loaders."""
        if hasattr(os, "killpg") and self._process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()

    def last_words(self) -> str:
        """The end of what it has printed."""
        text = self._output.read_text(encoding="utf-8", errors="replace").strip()
        return "\n".join(text.splitlines()[-SHOWN:])


def in_turn(processes: list[Process], at_once: int) -> Iterator[Process]:
    """Run *processes*, a few of them at the same time, and yield each in order when it is over."""
    waiting, running = list(processes), list[Process]()
    try:
        for process in processes:
            while process in waiting or not process.over():
                running = [one for one in running if not one.over()]
                while waiting and len(running) < at_once:
                    running.append(waiting.pop(0))
                    running[-1].start()
                time.sleep(0.02)
            yield process
    finally:
        for process in running:
            process.kill()


def run_main(told: dict[str, Any], work: Callable[[dict[str, Any], Any], Any]) -> None:
    """In the fresh process: import the function, and do the *work*."""
    global _within
    _within = True
    sys.argv[:] = told["argv"]
    work(told, Named(**told["build"]).find())
