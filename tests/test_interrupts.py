"""Ctrl-C once: the iteration finishes. Twice: now. Nothing is lost, and the handler before comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

import looptools as lt

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="os.kill(SIGINT) ends the process on Windows")


def press():
    os.kill(os.getpid(), signal.SIGINT)


def run_of(step, n=6, **options):
    return lt.workflow(
        [(lt.train(None, [torch.tensor([float(i)]) for i in range(n)], step), 1)], max_epochs=1, **options
    )


@pytest.fixture(autouse=True)
def _pythons_own_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_once_finishes_the_iteration_and_next_hands_it_out():
    """KeyboardInterrupt comes at the boundary; the finished state comes with the next `next`: a body sees each once."""
    steps, seen = [], []

    def step(model, batch):
        steps.append(int(batch))
        if batch == 2 and steps.count(2) == 1:
            press()
            steps.append("after")
        return {"x": batch.sum()}

    run = run_of(step)
    with pytest.raises(KeyboardInterrupt):
        for state in run:
            seen.append(state.iteration)

    assert seen == [0, 1]
    assert run.failed is None
    assert run.progress.iteration == 3
    seen += [state.iteration for state in run]
    assert seen == [0, 1, 2, 3, 4, 5]
    assert steps == [0, 1, 2, "after", 3, 4, 5]


def test_twice_stops_now_and_the_run_goes_on():
    """The second one comes in the middle of the part; it is a failure like any other."""
    reached = []

    def step(model, batch):
        if batch == 2 and not reached:
            reached.append(1)
            press()
            press()
            reached.append("never")
        return {"x": batch.sum()}

    run = run_of(step)
    with pytest.raises(KeyboardInterrupt):
        run.to_end()

    assert reached == [1]
    assert run.failed.part == "train/forward"
    assert [state.iteration for state in run] == [2, 3, 4, 5]


def test_in_the_callers_body_it_does_what_the_handler_before_does():
    """Between two iterations the run is not at work, so Python's own handler acts at once."""
    run = run_of(lambda model, batch: {"x": batch.sum()})
    reached = []

    with pytest.raises(KeyboardInterrupt):
        for state in run:
            press()
            reached.append(state.iteration)

    assert reached == []
    assert next(run).iteration == 1


def test_the_users_own_handler_is_called_and_put_back():
    """A handler of the user's is asked at the boundary, and stands again when the run has ended."""
    calls = []

    def own(number, frame):
        calls.append(run.progress.iteration)

    signal.signal(signal.SIGINT, own)
    run = run_of(lambda model, batch: (press() if batch == 1 else None, {"x": batch.sum()})[1])

    assert len(list(run)) == 6
    assert calls == [2]
    assert signal.getsignal(signal.SIGINT) is own


@pytest.mark.parametrize("way", ["end", "sleep", "close"])
def test_the_handler_before_is_put_back(way):
    """When the run ends, sleeps or closes."""
    run = run_of(lambda model, batch: {"x": batch.sum()})
    next(run)
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    {"end": run.to_end, "sleep": lambda: run.__exit__(), "close": run.close}[way]()

    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_that_was_reset_in_between_is_set_again():
    """A notebook's kernel resets SIGINT at every cell."""
    steps = []

    def step(model, batch):
        steps.append(int(batch))
        if batch == 2:
            press()
        return {"x": batch.sum()}

    run = run_of(step)
    next(run)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    with pytest.raises(KeyboardInterrupt):
        run.to_end()

    assert run.progress.iteration == 3


def test_two_runs_in_turn():
    """`zip` of two runs: one handler serves both, and Ctrl-C in either waits for its boundary."""
    step = lambda model, batch: (press() if batch == 2 else None, {"x": batch.sum()})[1]  # noqa: E731
    left, right = run_of(step), run_of(lambda model, batch: {"x": batch.sum()})
    seen = []

    with pytest.raises(KeyboardInterrupt):
        for a, b in zip(left, right, strict=True):
            seen.append((a.iteration, b.iteration))

    assert seen == [(0, 0), (1, 1)]
    assert [state.iteration for state in left] == [2, 3, 4, 5]
    assert [state.iteration for state in right] == [2, 3, 4, 5]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_inside_another_leaves_it_to_the_outer_one():
    """A validation that an entry calls by hand finishes, and then the outer iteration does."""
    done, presses = [], [press]
    inner_phase = lt.validate(None, [torch.ones(1)] * 3, lambda m, b: {"x": presses.pop()() if presses else b.sum()})

    def step(model, batch):
        if batch == 1:
            done.extend([] if done else list(inner_phase))
        return {"x": batch.sum()}

    run = run_of(step)
    with pytest.raises(KeyboardInterrupt):
        run.to_end()

    assert len(done) == 3
    assert run.progress.iteration == 2


def test_a_run_in_another_thread_leaves_signals_alone():
    """Handlers can only be set in the main thread; elsewhere a run works without."""
    run, seen = run_of(lambda model, batch: {"x": batch.sum()}), []
    thread = threading.Thread(target=lambda: seen.extend(state.iteration for state in run))
    thread.start()
    thread.join()

    assert seen == [0, 1, 2, 3, 4, 5]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


SCRIPT = """
    import sys, time
    import torch
    import looptools as lt

    class Slow(torch.utils.data.Dataset):
        def __len__(self): return 40
        def __getitem__(self, index):
            time.sleep(0.04)
            return torch.tensor([float(index)])

    def main():
        workers, context = int(sys.argv[1]), sys.argv[2]
        loader = torch.utils.data.DataLoader(Slow(), 2, num_workers=workers, multiprocessing_context=context)
        run = lt.workflow([(lt.train(None, loader, lambda m, b: {"x": b.sum()}), 1)], max_epochs=1)
        seen, interrupted = [], 0
        while not run.ended:
            try:
                for state in run:
                    seen += state.batch.flatten().tolist()
                    print("state", flush=True)
            except KeyboardInterrupt:
                interrupted += 1
        print("interrupted", interrupted, "all", seen == [float(n) for n in range(40)], flush=True)

    if __name__ == "__main__":
        main()
"""


@pytest.mark.parametrize(("workers", "context"), [(2, "fork"), (2, "spawn")])
def test_workers_survive_it(tmp_path, workers, context):
    """Ctrl-C goes to the whole process group; workers are deaf to it, and every batch comes through."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    process = subprocess.Popen(
        [sys.executable, str(script), str(workers), context],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "state\n"
    for _ in range(3):
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)

    assert process.returncode == 0, err
    last = out.splitlines()[-1].split()
    assert last[-1] == "True"
    assert int(last[1]) >= 1
