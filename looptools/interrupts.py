"""Signals: while a run is at work, the first one waits for the iteration's end, the second one does not.

Ctrl-C raises KeyboardInterrupt at the iteration's boundary. SIGTERM and SIGUSR1, with which schedulers say that a job
will be ended, save a run that has a `checkpoint` part there, let its workers go, and end the process with the exit code
`PREEMPTED`: ``run.resume()`` goes on from the file in the next process. A scheduler that starts a job anew on that code
needs nothing else:

    #SBATCH --signal=B:USR1@120                      # 120 seconds before the end, to this script
    python train.py & trap "kill -USR1 $!" USR1
    wait $!; wait $!; code=$?                        # the signal ends the first one
    [ $code = 75 ] && scontrol requeue $SLURM_JOB_ID
    exit $code

The handlers are those of all runs of the process. They are set in the main thread only, when a run begins to work, and
put back when it ends, sleeps or closes. Handlers that are set later are left alone, and so is a signal that is ignored
or that C code handles, as after ``faulthandler.register(signal.SIGUSR1)``. A run without a `checkpoint` part leaves
SIGTERM and SIGUSR1 as they are.
"""

from __future__ import annotations

import contextlib
import multiprocessing.util
import os
import signal
import sys
import threading
import time
import traceback
import weakref
from _signal import getsignal  # type: ignore[import-not-found]  # C; the wrapper in signal makes 7 calls of it
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from threading import get_ident
from types import FrameType
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from .cursor import Cursor

MAIN = threading.main_thread().ident
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
STOPS = ("SIGTERM", "SIGUSR1", "SIGBREAK")  # the last is what Windows has in their place: Ctrl-Break
STATUS = Path("/proc/self/status")  # where Linux says which signals are handled


def stop_signals() -> list[int]:
    """Numbers of the signals that ask a run to save and to end, as far as this system has them."""
    return [getattr(signal, name) for name in STOPS if hasattr(signal, name)]


class Interrupts:
    """The process's handlers, what has come, and how many runs are at work inside each other."""

    def __init__(self) -> None:
        self.handler = self._handle  # one object: a bound method is a new one at each look
        self.stop_handler = self._handle_stop
        self.work: Any = None  # the code of `Cursor.work`: whose calls are on the stack is at work
        self.pending = False  # whether anything waits for a boundary
        self._ctrl_c = False
        self._asked = 0  # the signal that asked to save and to end
        self._before: dict[int, Any] = {}
        self._process = os.getpid()
        self._savers: weakref.WeakSet[Cursor] = weakref.WeakSet()  # runs that save when they are asked to end
        self._workers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._keeper = 0  # the process that started them
        self._forking = threading.local()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self._fork, after_in_parent=self._forked, after_in_child=self._born)

    def install(self, cursor: Cursor) -> None:
        """Set the handlers that do not stand, since a run begins to work. In the main thread only."""
        standing = getsignal(signal.SIGINT)
        if standing is not self.handler and standing is not None and standing != signal.SIG_IGN:
            self._before[signal.SIGINT] = standing
            signal.signal(signal.SIGINT, self.handler)
        if cursor.hears or cursor.ended:
            return
        cursor.hears = True
        if any(hasattr(slot.part, "save_now") for slot in cursor.slots):
            self._savers.add(cursor)
            for number in stop_signals():
                standing = getsignal(number)
                if standing is not self.stop_handler and (callable(standing) or _by_default(number, standing)):
                    self._before[number] = standing
                    signal.signal(number, self.stop_handler)

    def deliver(self, cursor: Cursor | None = None) -> None:
        """At an iteration's boundary: do now what waited for it.

        Args:
            cursor: Of the run whose boundary it is; without it, only Ctrl-C is delivered.

        Raises:
            KeyboardInterrupt: After Ctrl-C, if the handler that stood before is Python's own.
            SystemExit: With the code `PREEMPTED`, when the run has been saved since a signal asked to.
            Exception: What kept it from being saved.
        """
        if get_ident() != MAIN:
            return
        if self._asked and cursor is not None and cursor in self._savers:
            around = [other for other in self._savers if other is not cursor and other._working]
            if self.depth() <= 1 or not around:
                self._save_and_end(cursor)
        if self._ctrl_c and self.depth() <= 1:  # a run inside another leaves it to the outer one
            self._drop_ctrl_c()
            self._as_before(signal.SIGINT, None)

    def depth(self, frame: FrameType | None = None, but: Cursor | None = None) -> int:
        """How many runs are at work inside each other in this thread. Not counted: an interrupt could strike there.

        Args:
            frame: Where to look from; this very place without it.
            but: Not this one's.
        """
        found = list(self._at_work(frame or sys._getframe(1)))
        return sum(cursor is not but for cursor in found)

    def calls(self, cursor: Cursor) -> int:
        """How many calls of `Cursor.work` are under way for *cursor*, in all threads."""
        frames = sys._current_frames().values()
        return sum(other is cursor for frame in frames for other in self._at_work(frame))

    def _at_work(self, frame: FrameType | None) -> Iterator[Cursor]:
        while frame is not None:
            if frame.f_code is self.work:
                yield frame.f_locals["self"]
            frame = frame.f_back

    def failed(self) -> None:
        """An exception stops the run, so Ctrl-C need not do it as well; a run inside another leaves it to that one."""
        if get_ident() == MAIN and self.depth() <= 1:
            self._drop_ctrl_c()

    def _drop_ctrl_c(self) -> None:
        self._ctrl_c = False
        self._look()

    def _look(self) -> None:
        """Say anew whether anything waits; in this order, so that nothing that comes in between is lost."""
        self.pending = False
        if self._asked or self._ctrl_c:
            self.pending = True

    def _save_and_end(self, cursor: Cursor) -> None:
        """Save through each part that can, let files and workers go, and end the process."""
        name = signal.Signals(self._asked).name
        files, errors = [], []
        for slot in cursor.slots:
            if hasattr(slot.part, "save_now") and not slot.muted:
                try:
                    files.append(slot.part.save_now(cursor.run))
                except Exception as error:
                    error.add_note(f"looptools: while {slot.name} saved the run because of {name}.")
                    errors.append(error)
        if not errors:
            _say(name, files)
            self._put_back()  # from here on the second one ends the process by itself
            for saver in list(self._savers):
                saver.hears = False  # whoever catches the exit and goes on has them set again
            self._savers.clear()
        self._asked = 0
        self._drop_ctrl_c()
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise ExceptionGroup(f"several parts failed to save the run because of {name}", errors)
        try:
            cursor.rest()
        except Exception:
            traceback.print_exc()  # the run is saved, so it can go on elsewhere all the same
        raise SystemExit(PREEMPTED)

    def release(self, cursor: Cursor) -> None:
        """A run ends, sleeps or closes: put back the handlers before, unless another run needs them.

        A run that stands still somewhere else sets them again when it goes on. What came too late for a boundary goes
        to the handlers before.
        """
        if get_ident() != MAIN:
            return
        cursor.hears = False
        self._savers.discard(cursor)
        pressed, outermost = False, self.depth(but=cursor) == 0
        if outermost and getsignal(signal.SIGINT) is self.handler:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
            pressed = self._ctrl_c
            self._drop_ctrl_c()
        if not self._savers:
            self._put_back()
            asked, self._asked = self._asked, 0
            self._look()
            if asked:
                if sys.exception() is not None:
                    traceback.print_exc()  # it would be lost with the process
                self._as_before(asked, None)
        if pressed:
            self._as_before(signal.SIGINT, None)

    def _put_back(self) -> None:
        """Set the handlers of SIGTERM and SIGUSR1 that stood before, where they have not been changed since."""
        for number in stop_signals():
            if getsignal(number) is self.stop_handler:
                signal.signal(number, self._before[number])

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that was forked while a run was at work
            return
        if not self.depth(frame):
            self._as_before(number, frame)
        elif self._ctrl_c:
            self._drop_ctrl_c()
            raise KeyboardInterrupt
        else:
            self._ctrl_c = self.pending = True

    def _handle_stop(self, number: int, frame: FrameType | None) -> None:
        interactive = hasattr(sys, "ps1")  # a prompt or a notebook: there, a run may stand still for long
        comes = not interactive or self.depth(frame)
        if self._asked or not comes or all(saver.ended for saver in self._savers):
            self._as_before(number, frame)
        else:
            self._asked, self.pending = number, True

    def _as_before(self, number: int, frame: FrameType | None) -> None:
        before = self._before[number]
        if callable(before):
            before(number, frame)
        elif number == signal.SIGINT:  # SIG_DFL
            raise KeyboardInterrupt
        else:
            signal.signal(number, before)
            os.kill(os.getpid(), number)

    # Processes

    def _fork(self) -> None:
        """Block what a child would still handle as its parent does, until it has the handlers before."""
        self._forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals()) if self._savers else None

    def _forked(self) -> None:
        if self._forking.mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._forking.mask)

    def _born(self) -> None:
        self._put_back()  # else `Pool.terminate` would wait for ever
        self._forked()

    @property
    def waits_for(self) -> list[int]:
        """Signals with which a run will be saved, so that its workers must outlast them."""
        return stop_signals() if self._savers else []

    def keep_track(self, worker: Any) -> None:
        """See that *worker*, which outlasts a SIGTERM, ends when this process wants it to."""
        if self._keeper != os.getpid():  # it may have been forked
            self._keeper = os.getpid()
            self._workers.clear()
            multiprocessing.util.Finalize(None, self._end_workers, exitpriority=100)
        worker.terminate = worker.kill  # what its loader calls when asking nicely did not help
        self._workers.add(worker)

    def _end_workers(self) -> None:
        """At exit, before multiprocessing sends a SIGTERM to those that are left and waits for them."""
        left = [worker for worker in self._workers if worker.is_alive()]
        if left and hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own handler raises when a worker is killed
        for worker in left:
            worker.kill()


def _by_default(number: int, standing: Any) -> bool:
    """Whether nobody handles the signal; C code may, which Python does not know."""
    if standing != signal.SIG_DFL:
        return False
    try:
        lines = STATUS.read_text().splitlines()
        caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    except (OSError, ValueError, StopIteration):  # not Linux
        return True
    return not caught >> (number - 1) & 1


def _say(name: str, files: list[Path | None]) -> None:
    """Tell on stderr why the process ends, and what was written."""
    saved = ", ".join(str(file) for file in files if file is not None)
    with contextlib.suppress(OSError, ValueError):  # it may be closed
        print(
            f"looptools: {name} came, so the run was saved{f' in {saved}' if saved else ''}; exit code {PREEMPTED}. "
            "run.resume() goes on from there.",
            file=sys.stderr,
            flush=True,
        )


interrupts = Interrupts()


@contextlib.contextmanager
def deaf_workers(loader: Any) -> Iterator[None]:
    """Processes that *loader* starts in here do not hear signals that go to the whole process group.

    A blocked signal stays blocked in a child, however it is started; in this process it waits. Ctrl-C stays so. Of
    SIGTERM and SIGUSR1, if the run is saved then, a worker outlasts the first one: it is needed to finish the
    iteration. The second one ends it, as does the end of its parent. Windows has no such mask: there the workers are
    told to ignore Ctrl-C when they have started.
    """
    masks, stops = hasattr(signal, "pthread_sigmask"), interrupts.waits_for
    before: set[int] = set()
    then, others = loader.worker_init_fn, set(multiprocessing.active_children())
    if masks:
        context = loader.multiprocessing_context or multiprocessing
        method = context.get_start_method()
        if method != "fork":
            resource_tracker.ensure_running()  # it would take the mask off when it starts with the first process
        # a forkserver would hand the mask on to all of its later children, which others may want to terminate
        blocked = [signal.SIGINT, *(stops if method != "forkserver" else [])]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    if stops or not masks:
        loader.worker_init_fn = _Deaf(then, stops, masks)
    try:
        yield
    finally:
        loader.worker_init_fn = then
        if masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for worker in set(multiprocessing.active_children()) - others if stops else ():
            interrupts.keep_track(worker)


@attrs.frozen(eq=False)
class _Deaf:
    """A ``worker_init_fn`` that can be sent to a process: be deaf, then do what the user's own does."""

    then: Callable[[int], None] | None
    stops: list[int]
    masked: bool

    def __call__(self, worker: int) -> None:
        if not self.masked:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.stops:
            _outlast(self.stops)
        if self.masked:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.stops)
        if self.then is not None:
            self.then(worker)


def _outlast(numbers: list[int]) -> None:
    """Have this worker go on after the first of the signals, and end at the second one or with its parent.

    Not ignored and not blocked, which programs that the worker starts would inherit.
    """
    came: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in numbers:
        signal.signal(number, handle)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """End this process when its parent is gone, also while it waits for its data."""
    process = multiprocessing.parent_process()
    # with fork, the pipe that tells is also held by workers that were started later
    while process is not None and process.is_alive() and os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
