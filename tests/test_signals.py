"""SIGTERM and SIGUSR1: the iteration finishes, the run is saved once, and the process ends with the code 75."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from opcodes import Late, everywhere, late
from signalled import Forker, of_group, often

import looptools as lt
from looptools.interrupts import PREEMPTED, interrupts

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process on Windows")


class saver:
    """A part that saves on demand, and writes down the training iterations done by then."""

    def __init__(self, *errors: Exception) -> None:
        self.saved: list[int] = []
        self.errors = list(errors)
        self.closed = 0

    def __call__(self, states):
        for state in states:
            yield state

    def __copy__(self):  # a run makes new instances of its parts
        return self

    def save_now(self, run: lt.Run) -> Path | None:
        self.saved.append(run.progress.iteration)
        if self.errors:
            raise self.errors.pop()
        return Path("file.pt")

    def close(self) -> None:
        self.closed += 1


def come(number: int = signal.SIGTERM) -> None:
    signal.raise_signal(number)


def run_of(step: Callable[[Any, Any], Any], *parts: Any, n: int = 6) -> lt.Run:
    run = lt.workflow([(lt.train(None, [torch.tensor([float(i)]) for i in range(n)], step), 1)], max_epochs=1)
    for part in parts:
        run = run | part
    return run


def step_with(at: int, do: Callable[[], Any]) -> Callable[[Any, Any], Any]:
    """A step that does something once, in iteration *at*."""
    left = [do]

    def step(model, batch):
        if batch == at and left:
            left.pop()()
        return {"x": batch.sum()}

    return step


def quiet(model, batch):
    return {"x": batch.sum()}


@pytest.fixture(autouse=True)
def _handlers():
    """Each test begins with handlers that raise `Late`, and ends with those before."""
    before = {number: signal.signal(number, late) for number in (signal.SIGTERM, signal.SIGUSR1)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert not interrupts.pending
    for number, handler in before.items():
        signal.signal(number, handler)


# Once


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_once_saves_at_the_boundary_and_exits_with_75(number, capfd):
    """The iteration is finished and saved, and stderr says so. Whoever goes on loses no state."""
    part, seen = saver(), []
    run = run_of(step_with(2, lambda: come(number)), part)
    with pytest.raises(SystemExit) as exit_:
        for state in run:
            seen.append(state.iteration)

    assert exit_.value.code == PREEMPTED == 75
    assert part.saved == [3]
    assert part.closed == 1
    assert capfd.readouterr().err == (
        f"looptools: {signal.Signals(number).name} came, so the run was saved in file.pt; exit code 75. "
        "run.resume() goes on from there.\n"
    )
    assert seen + [state.iteration for state in run] == [0, 1, 2, 3, 4, 5]


def test_handlers_stand_while_the_run_goes_on_and_no_longer():
    """They are put back before the exit, set again if the run goes on, and put back at its end."""
    stood = []
    run = run_of(step_with(2, come), saver())
    next(run)
    stood.append(signal.getsignal(signal.SIGTERM) is interrupts.stop_handler)
    with pytest.raises(SystemExit):
        run.to_end()
    stood.append(signal.getsignal(signal.SIGTERM) is late)
    next(run)
    stood.append(signal.getsignal(signal.SIGUSR1) is interrupts.stop_handler)
    run.to_end()

    assert stood == [True] * 3
    assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGUSR1) is late


@pytest.mark.parametrize("way", ["sleep", "close", "reset"])
def test_handlers_are_put_back(way):
    """When the run sleeps, is closed or reset; a finished run does not set them again."""
    run = run_of(quiet, saver())
    next(run)
    {"sleep": lambda: run.__exit__(), "close": run.close, "reset": run.reset}[way]()

    assert signal.getsignal(signal.SIGTERM) is late
    if way == "close":
        assert next(run, None) is None
        assert signal.getsignal(signal.SIGTERM) is late


def test_a_sleeping_run_sets_them_again_when_it_wakes():
    """Also where another run has kept the handler of Ctrl-C in its place."""
    part = saver()
    run, other = run_of(step_with(2, come), part), run_of(quiet)
    with run:
        next(run)
    next(other)
    with pytest.raises(SystemExit):
        run.to_end()

    assert part.saved == [3]
    other.close()


def test_without_a_part_that_saves_nothing_is_touched():
    """There is nothing to save, so the signal does what it did before."""
    run = run_of(step_with(2, come))
    with pytest.raises(Late):
        run.to_end()

    assert run.failed.part == "train/forward"
    run.close()


def test_what_is_saved_is_not_stopped(tmp_path):
    """Saved in the middle of a pass or at its end, the run goes on from there to the same end."""

    for at in (2, 5):
        with pytest.raises(SystemExit):
            run_of(step_with(at, come), lt.checkpoint(tmp_path / str(at))).to_end()
        again = run_of(step_with(99, int), lt.checkpoint(tmp_path / str(at)))
        assert again.resume() is not None
        again.to_end()
        assert again.ended == "finished: 1 epoch, 6 iterations"


@pytest.mark.parametrize("when", ["before", "during"])
def test_what_is_saved_at_this_boundary_is_not_saved_twice(tmp_path, monkeypatch, when):
    """The signal comes in the iteration that is saved anyway, or while its file is written."""
    run = run_of(step_with(3, come if when == "before" else int), lt.checkpoint(tmp_path, every=4, keep=None))
    fsync, left = os.fsync, [come] if when == "during" else []
    monkeypatch.setattr(os, "fsync", lambda fd: (left.pop()() if left else None, fsync(fd))[1])
    with pytest.raises(SystemExit):
        run.to_end()

    assert len(list(tmp_path.glob("*.pt"))) == 1
    assert run.progress.iteration == 4
    assert left == []


def test_each_part_saves_and_an_error_goes_out():
    """If one cannot save, the next one still does; the exit is not that of a saved run."""
    parts = [saver(OSError(28, "No space left on device")), saver()]
    run = run_of(step_with(2, come), *parts)
    with pytest.raises(OSError, match="No space left") as error:
        run.to_end()

    assert "looptools: while run/saver saved the run because of SIGTERM." in error.value.__notes__
    assert [part.saved for part in parts] == [[3], [3]]
    assert [state.iteration for state in run] == [2, 3, 4, 5]


def test_several_errors_go_out_together():
    """None is lost."""
    run = run_of(step_with(2, come), saver(OSError("a")), saver(OSError("b")))
    with pytest.raises(ExceptionGroup) as error:
        run.to_end()

    assert [str(e) for e in error.value.exceptions] == ["a", "b"]
    run.close()


def test_an_error_while_resting_is_printed(capfd):
    """The run is saved, so the scheduler must hear that it can go on."""
    part = saver()
    part.close = lambda: 1 / 0  # type: ignore[method-assign]
    run = run_of(step_with(2, come), part)
    with pytest.raises(SystemExit) as exit_:
        run.to_end()

    assert exit_.value.code == 75
    assert "ZeroDivisionError" in capfd.readouterr().err
    part.close = int  # type: ignore[method-assign]
    run.close()


# Twice


def test_twice_is_now():
    """The second one, of either kind, does what the handler before would have done, in the middle of the part."""
    part, reached = saver(), []

    def twice():
        come(signal.SIGUSR1)
        reached.append("first")
        come(signal.SIGTERM)
        reached.append("never")

    run = run_of(step_with(2, twice), part)
    with pytest.raises(Late):
        run.to_end()

    assert reached == ["first"]
    assert part.saved == []
    with pytest.raises(SystemExit):  # the first one still waits
        next(run)
    assert part.saved == [3]


def test_a_second_one_while_saving_is_now():
    """A file is written whole or not at all, so nothing is lost."""
    part = saver()
    part.save_now = lambda run: come()  # type: ignore[method-assign, assignment]
    run = run_of(step_with(2, come), part)
    with pytest.raises(Late):
        run.to_end()
    with pytest.raises(Late):  # it came to nothing yet, and goes to the handler before
        run.close()


def test_ctrl_c_saves_nothing():
    """KeyboardInterrupt at the boundary, and both kinds together are a stop."""
    part = saver()
    run = run_of(step_with(2, lambda: come(signal.SIGINT)), part)
    with pytest.raises(KeyboardInterrupt):
        run.to_end()
    assert part.saved == []
    run.close()

    run = run_of(step_with(2, lambda: (come(signal.SIGINT), come())), part)
    with pytest.raises(SystemExit):
        run.to_end()
    assert part.saved == [3]


# Between two iterations, and in other places


def test_in_the_callers_body_it_waits_for_the_next_boundary():
    """The body of a `for` loop is part of the training."""
    part, seen = saver(), []
    run = run_of(quiet, part)
    with pytest.raises(SystemExit):
        for state in run:
            seen.append(state.iteration)
            if state.iteration == 1:
                come()
                seen.append("after")

    assert seen == [0, 1, "after"]
    assert part.saved == [3]


def test_at_a_prompt_an_idle_run_leaves_it_to_the_handler_before(monkeypatch):
    """Nobody knows when the next cell is run."""
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    part = saver()
    run = run_of(step_with(2, come), part)
    next(run)
    with pytest.raises(Late):
        come()
    with pytest.raises(SystemExit):
        run.to_end()

    assert part.saved == [3]


def test_too_late_for_a_boundary_it_goes_to_the_handler_before():
    """It comes in the body of the last state: no iteration follows, and it is not swallowed."""
    part = saver()
    run = run_of(quiet, part)
    with pytest.raises(Late):
        for state in run:
            if state.iteration == 5:
                come()

    assert part.saved == []
    assert run.ended
    assert signal.getsignal(signal.SIGTERM) is late


def test_a_dropped_run_does_not_swallow_it():
    """A run that nobody holds any more has no next boundary."""
    run = run_of(quiet, saver())
    next(run)
    del run
    gc.collect()
    with pytest.raises(Late):
        come()

    signal.signal(signal.SIGTERM, late)
    signal.signal(signal.SIGUSR1, late)


def test_after_a_failure_it_still_waits_for_a_boundary():
    """The exception goes out; whoever goes on comes to the boundary."""
    part = saver()
    run = run_of(step_with(2, lambda: (come(), 1 / 0)), part)
    with pytest.raises(ZeroDivisionError):
        run.to_end()
    assert part.saved == []
    with pytest.raises(SystemExit):
        next(run)

    assert part.saved == [3]


def test_a_failure_within_with_is_shown_before_the_signal_ends_the_process(capfd):
    """Going to sleep delivers the signal; by default the process dies of it, and the traceback with it."""
    run = run_of(step_with(2, lambda: (come(), 1 / 0)), saver())
    with pytest.raises(Late), run:
        run.to_end()

    assert "ZeroDivisionError: division by zero" in capfd.readouterr().err


def test_a_validation_inside_leaves_it_to_the_outer_run():
    """Of two runs inside each other the outer one is saved, when it comes to its boundary."""
    outer, inner, done = saver(), saver(), []
    phase = lt.validate(None, [torch.ones(1)] * 3, step_with(1, come))

    def go():
        done.extend(lt.workflow([(phase, 1)], max_rounds=1) | inner)

    run = run_of(step_with(2, go), outer)
    with pytest.raises(SystemExit):
        run.to_end()

    assert len(done) == 3
    assert (inner.saved, outer.saved) == ([], [3])


def test_a_run_inside_one_that_does_not_save_is_saved():
    """It is the outermost that can be."""
    inner = saver()
    run = run_of(step_with(2, lambda: run_of(step_with(1, come), inner).to_end()))
    with pytest.raises(SystemExit):
        run.to_end()

    assert inner.saved == [2]
    assert signal.getsignal(signal.SIGTERM) is late
    run.close()


def test_two_runs_in_turn():
    """The one whose boundary comes first is saved; both go on if somebody wants them to."""
    parts = [saver(), saver()]
    left, right = run_of(step_with(2, come), parts[0]), run_of(quiet, parts[1])
    with pytest.raises(SystemExit):
        for _ in zip(left, right, strict=True):
            pass

    assert [part.saved for part in parts] == [[3], []]
    assert [a.iteration == b.iteration for a, b in zip(left, right, strict=True)] == [True] * 4
    assert signal.getsignal(signal.SIGTERM) is late


def test_a_run_in_another_thread_leaves_signals_alone():
    """Handlers can only be set in the main thread."""
    run = run_of(quiet, saver())
    thread = threading.Thread(target=run.to_end)
    thread.start()
    thread.join()

    assert run.ended
    assert signal.getsignal(signal.SIGTERM) is late


def test_stepping_by_hand_ends_at_the_boundary_too():
    """The next `next` comes to it at the latest."""
    part = saver()
    run = run_of(step_with(1, come), part)
    with pytest.raises(SystemExit):
        for _ in range(6):
            list(run.stages())
            next(run)

    assert part.saved in ([2], [3], [4])


# Other handlers


def test_a_handler_that_is_set_later_stays():
    """The user's own, set after the run began, is neither called over nor put away."""
    own = lambda number, frame: None  # noqa: E731
    part = saver()
    run = run_of(step_with(2, come), part)
    next(run)
    signal.signal(signal.SIGTERM, own)
    run.to_end()

    assert part.saved == []
    assert signal.getsignal(signal.SIGTERM) is own


def test_a_signal_that_is_ignored_stays_so():
    """As Ctrl-C does, for a process in the background."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    part = saver()
    run_of(step_with(2, come), part).to_end()

    assert part.saved == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_a_handler_in_c_stays(tmp_path):
    """`faulthandler` prints where the process hangs; Python does not know that it stands."""
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    with open(tmp_path / "trace", "w") as file:
        faulthandler.register(signal.SIGUSR1, file)
        try:
            run_of(step_with(2, lambda: come(signal.SIGUSR1)), saver()).to_end()
        finally:
            faulthandler.unregister(signal.SIGUSR1)

    assert "in step" in (tmp_path / "trace").read_text()


def test_a_system_without_sigusr1(monkeypatch, tmp_path):
    """Windows has none, and no /proc either."""
    monkeypatch.delattr(signal, "SIGUSR1")
    monkeypatch.setattr("looptools.interrupts.STATUS", tmp_path / "nowhere")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    part = saver()
    with pytest.raises(SystemExit):
        run_of(step_with(2, come), part).to_end()

    assert part.saved == [3]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_process_that_the_step_forks_can_be_terminated():
    """It does not inherit the handlers: `Pool.terminate` and the like would wait for it for ever."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    codes = []

    def fork():
        for _ in range(20):
            process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
            process.start()
            process.terminate()
            process.join(20)
            codes.append(process.exitcode)

    run_of(step_with(2, fork), saver()).to_end()

    assert codes == [-signal.SIGTERM] * 20


# At every place


def test_at_any_opcode_nothing_breaks(tmp_path):
    """Wherever it comes: the run is saved and ends, or it was over; resumed, or gone on with, it ends with the bits."""
    ends = everywhere(tmp_path, cases=11)

    assert ends["SystemExit"] > 5
    assert ends["over"] == 0


# In processes of their own


@pytest.fixture(scope="module")
def forker():
    with Forker() as forker:
        yield forker


def test_at_random_times_no_bit_is_lost(forker, tmp_path):
    """TERM and USR1 to the whole process group, with and without workers: code 75, no orphan, the same final bits."""
    for workers in (0, 2):
        counts = often(forker, tmp_path / str(workers), workers=workers, signals=10, seed=workers)
        assert counts["saved"] >= 5


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_outlast_the_first_one(forker, tmp_path, context):
    """The process waits for their data when it is sent to all of them: they make it, and the iteration is finished."""
    process = forker.start("slow", tmp_path, workers=2, context=context)
    process.wait_for("going")
    os.killpg(process.pid, signal.SIGUSR1)

    assert process.status() == 75
    assert of_group(process.pid, timeout=5) == []


def test_sent_to_workers_alone_it_does_nothing_once(forker, tmp_path):
    """The second one ends them, and the loader's error stops the run."""
    process = forker.start("slow", tmp_path, workers=2)
    process.wait_for("going")
    workers = set(of_group(process.pid)) - {process.pid}
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.3)
    assert workers < set(of_group(process.pid))
    os.kill(max(workers), signal.SIGTERM)

    assert process.status() == 1
    assert "is killed by signal: Terminated" in process.errors()


def test_the_second_one_ends_a_process_that_waits_for_its_data(forker, tmp_path):
    """At once, with the status of that signal; a worker that hangs ends as well."""
    process = forker.start("hang", tmp_path, workers=1)
    process.wait_for("going")
    os.killpg(process.pid, signal.SIGUSR1)
    time.sleep(0.3)
    assert process.runs()
    os.killpg(process.pid, signal.SIGTERM)

    assert process.status(timeout=3) == -signal.SIGTERM
    assert of_group(process.pid, timeout=3) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_hanging_worker_ends_with_its_parent(forker, tmp_path, number):
    """Though nobody sends it anything: the signals go to the parent only."""
    process = forker.start("hang", tmp_path, workers=1)
    process.wait_for("going")
    if number == signal.SIGTERM:
        os.kill(process.pid, number)
        time.sleep(0.3)
    os.kill(process.pid, number)

    assert process.status(timeout=3) == -number
    assert of_group(process.pid, timeout=5) == []


def test_exit_75_with_a_worker_that_hangs(forker, tmp_path):
    """The loader's own way to end its workers, a SIGTERM, still ends one that outlasts the group's."""
    process = forker.start("prefetch", tmp_path, workers=1)
    process.wait_for("going")
    os.killpg(process.pid, signal.SIGTERM)

    assert process.status(timeout=15) == 75
    assert of_group(process.pid, timeout=1) == []


def test_a_run_that_is_broken_off_does_not_hang_at_exit(forker, tmp_path):
    """Its workers are still there when the interpreter ends, also one that hangs; nothing is printed."""
    process = forker.start("break", tmp_path, workers=2)

    assert process.status(timeout=10) == 3
    assert of_group(process.pid, timeout=1) == []
    assert process.errors() == ""


def test_the_status_of_a_process_that_nobody_saves(forker, tmp_path):
    """Twice within an iteration that does not end: dead by the signal, as without looptools."""
    process = forker.start("loop", tmp_path, workers=0)
    process.wait_for("going")
    os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.2)
    assert process.runs()
    os.kill(process.pid, signal.SIGUSR1)

    assert process.status(timeout=3) == -signal.SIGUSR1
