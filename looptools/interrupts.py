"""Ctrl-C: while a run is at work, the first one waits for the iteration's end, the second one does not.

There is one handler for all runs of the process. It is set in the main thread only, and put back when a
run ends, sleeps or closes; while no run is at work, it does what the handler before it did.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from _signal import getsignal  # type: ignore[import-not-found]  # C; the wrapper in signal makes 7 calls of it
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from threading import get_ident
from types import FrameType
from typing import Any

import attrs

MAIN = threading.main_thread().ident


class Interrupts:
    """The process's handler of SIGINT, and how many runs are at work inside each other."""

    def __init__(self) -> None:
        self.handler = self._handle  # one object: a bound method is a new one at each look
        self.at_work = 0  # counted by the cursor, for every call
        self.pending = False
        self._before: Any = None
        self._process = os.getpid()

    def install(self) -> None:
        """Set the handler, since a run begins to work and it does not stand. In the main thread only."""
        standing = getsignal(signal.SIGINT)
        if standing is not None and standing != signal.SIG_IGN:  # set by C code, or Ctrl-C is not wanted at all
            self._before = standing
            signal.signal(signal.SIGINT, self.handler)

    def deliver(self) -> None:
        """At an iteration's boundary: do now what the Ctrl-C that waited asked for.

        Raises:
            KeyboardInterrupt: If the handler that stood before is Python's own.
        """
        if self.at_work <= 1 and get_ident() == MAIN:  # a run inside another leaves it to the outer one
            self.pending = False
            self._as_before(signal.SIGINT, None)

    def release(self, working: bool) -> None:
        """A run ends, sleeps or closes: put the handler before it back, unless another run is around this one.

        A run that stands still somewhere else sets it again when it goes on.

        Args:
            working: Whether the run is within a call of its own.
        """
        if get_ident() != MAIN or self.at_work > working or getsignal(signal.SIGINT) is not self.handler:
            return
        signal.signal(signal.SIGINT, self._before)
        if self.pending:
            self.deliver()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that was forked while a run was at work
            return
        if not self.at_work:
            self._as_before(number, frame)
        elif self.pending:
            self.pending = False
            raise KeyboardInterrupt
        else:
            self.pending = True

    def _as_before(self, number: int, frame: FrameType | None) -> None:
        if callable(self._before):
            self._before(number, frame)
        else:  # SIG_DFL
            raise KeyboardInterrupt


interrupts = Interrupts()


@contextlib.contextmanager
def deaf_workers(loader: Any) -> Iterator[None]:
    """Processes that *loader* starts in here do not hear Ctrl-C, which goes to the whole process group.

    A blocked signal stays blocked in a child, however it is started; in this process it waits. Windows has no
    such mask: there the workers are told to ignore it when they have started.
    """
    if hasattr(signal, "pthread_sigmask"):
        context = loader.multiprocessing_context or multiprocessing
        if context.get_start_method() != "fork":
            resource_tracker.ensure_running()  # it would take the mask off when it starts with the first process
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    else:
        then, loader.worker_init_fn = loader.worker_init_fn, _Ignore(loader.worker_init_fn)
        try:
            yield
        finally:
            loader.worker_init_fn = then


@attrs.frozen(eq=False)
class _Ignore:
    """A ``worker_init_fn`` that can be sent to a process: ignore Ctrl-C, then do what the user's own does."""

    then: Callable[[int], None] | None

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.then is not None:
            self.then(worker)
