"""Ctrl-C: while a run is at work, the first one waits for the iteration's end, the second one does not.

There is one handler for all runs of the process. It is set in the main thread only, and put back when no
run is awake; while no run is at work, it does what the handler before it did.
"""

from __future__ import annotations

import os
import signal
import threading
from _signal import getsignal  # type: ignore[import-not-found]  # C; the wrapper in signal makes 7 calls of it
from collections.abc import Callable
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
        self._awake: set[int] = set()
        self._process = os.getpid()

    def install(self, run: object) -> None:
        """Set the handler, since *run* begins to work and it does not stand. In the main thread only."""
        standing = getsignal(signal.SIGINT)
        if standing is None or standing == signal.SIG_IGN:  # set by C code, or Ctrl-C is not wanted at all
            return
        self._awake.add(id(run))
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

    def release(self, run: object) -> None:
        """*run* ends, sleeps or closes; the last one puts the handler before it back."""
        self._awake.discard(id(run))
        if not self._awake and get_ident() == MAIN and getsignal(signal.SIGINT) is self.handler:
            signal.signal(signal.SIGINT, self._before)

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


@attrs.frozen(eq=False)
class IgnoreInterrupts:
    """A DataLoader's ``worker_init_fn`` that makes workers deaf to Ctrl-C, which goes to the whole process group."""

    then: Callable[[int], None] | None

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.then is not None:
            self.then(worker)
