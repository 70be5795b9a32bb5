"""The notebook's stop button, for real: a live Jupyter kernel, interrupted as a notebook's server does it.

The signal goes to the kernel's whole process group, its DataLoader workers included. It is sent when the cell has said
that it is where it should be struck, and the cell waits there for it: no test hangs on a time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest

jupyter_client = pytest.importorskip("jupyter_client")
pytest.importorskip("ipykernel")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no process groups")

TESTS = Path(__file__).parent
PATIENCE_S = 60

FIRST = """
import os, signal, threading, time, torch
from loops import classify, loader, network
import looptools as lt
from looptools.interrupts import interrupts

torch.set_num_threads(1)

def build(workers, strike=None):
    '''14 iterations; in the tenth, *strike* is called once, before the model is.'''
    left = [strike] if strike is not None else []

    def step(model, batch, state):
        if state.iteration == 9 and left:
            left.pop()()
        return classify(model, batch)

    torch.manual_seed(0)
    model = network()
    adam = torch.optim.AdamW(model.parameters(), lr=0.01)
    train = lt.train(model, loader(workers), step) | lt.schedule_lr(adam, lt.schedules.cosine()) | lt.optimize(adam)
    return lt.workflow([(train, 1)], max_epochs=2), model

def say_and_wait(word, until):
    print(word, flush=True)
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline, "no interrupt came"
        time.sleep(0.01)

def once():
    say_and_wait("<here>", lambda: interrupts.pending)

def twice():
    once()
    say_and_wait("<there>", lambda: False)

def once_or_twice():
    say_and_wait("<here><there>", lambda: interrupts.pending)
    time.sleep(0.5)

def same(model):
    run, whole = build(0)
    run.to_end()
    pairs = zip(model.state_dict().values(), whole.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
"""


class Kernel:
    """A kernel and its client, as a notebook has them."""

    def __init__(self, folder: Path) -> None:
        self.manager = jupyter_client.KernelManager(kernel_name="python3")
        paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.manager.start_kernel(cwd=str(folder), env=environment)
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=PATIENCE_S)

    def cell(self, code: str, *words: str, answers: Sequence[str] = ()) -> tuple[str, str]:
        """Run a cell, press stop once for each of *words* when it has been printed, and give *answers* when asked.

        Returns:
            What the cell printed, and its traceback as the notebook shows it; empty if nothing was raised.
        """
        mine, said, error = self.client.execute(code, allow_stdin=bool(answers)), "", ""
        for answer in answers:
            self.client.get_stdin_msg(timeout=PATIENCE_S)
            self.client.input(answer)
        waiting = list(words)
        while True:
            message = self.client.get_iopub_msg(timeout=PATIENCE_S)
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != mine:
                continue
            if kind == "stream":
                said += content["text"]
            if kind == "error":
                error = "\n".join(content["traceback"])
            while waiting and waiting[0] in said:
                waiting.pop(0)
                self.manager.interrupt_kernel()
            if kind == "status" and content["execution_state"] == "idle":
                return said, error

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernel")
    names = ("JUPYTER_PATH", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    with mock.patch.dict(os.environ, {**dict.fromkeys(names, str(folder)), "JUPYTER_PLATFORM_DIRS": "1"}):
        kernel = Kernel(folder)
        try:
            assert kernel.cell(FIRST) == ("", "")
            yield kernel
        finally:
            kernel.close()


both = pytest.mark.parametrize("workers", [0, 2])


@both
def test_stop_once_finishes_the_iteration(kernel, workers):
    """The prompt is back after it; the next cell goes on, to the same bits as if nobody had pressed anything."""
    kernel.cell(f"run, model = build({workers}, once)")
    said, error = kernel.cell("run.to_end()", "<here>")

    assert "KeyboardInterrupt" in error
    assert f"{os.sep}looptools{os.sep}" not in error
    assert kernel.cell("print(run.progress.iteration, run.failed)") == ("10 None\n", "")
    assert kernel.cell("run.to_end(); print(run.ended, same(model))") == (
        "finished: 2 epochs, 14 iterations True\n",
        "",
    )


@both
def test_stop_twice_stops_at_once(kernel, workers):
    """In the middle of the step; the same batch comes again, and nothing is lost."""
    kernel.cell(f"run, model = build({workers}, twice)")
    said, error = kernel.cell("run.to_end()", "<here>", "<there>")

    assert "KeyboardInterrupt" in error
    assert kernel.cell("print(run.progress.iteration, run.failed.part)") == ("9 train/forward\n", "")
    assert kernel.cell("run.retry(); run.to_end(); print(same(model))") == ("True\n", "")


def test_stop_twice_without_waiting(kernel):
    """Two presses in a row may come as one signal or as two; either way nothing is lost."""
    kernel.cell("run, model = build(2, once_or_twice)")
    said, error = kernel.cell("run.to_end()", "<here>", "<there>")

    assert "KeyboardInterrupt" in error
    assert kernel.cell("run.to_end(); print(same(model))") == ("True\n", "")


@both
def test_stop_while_idle_does_nothing(kernel, workers):
    """Between two cells, in the middle of a pass: kernel, run and workers stay as they are."""
    kernel.cell(f"run, model = build({workers})")
    kernel.cell("for state in run.take(9): pass")
    kernel.manager.interrupt_kernel()

    assert kernel.cell("run.to_end(); print(run.progress.iteration, same(model))") == ("14 True\n", "")


def test_the_users_own_handler(kernel):
    """It is asked at the boundary, and stands again when the run has ended."""
    kernel.cell("run, model = build(0, once)")
    said, error = kernel.cell(
        "came = []\n"
        "own = lambda number, frame: came.append(run.progress.iteration)\n"
        "before = signal.signal(signal.SIGINT, own)\n"
        "run.to_end()\n"
        "print(came, signal.getsignal(signal.SIGINT) is own)\n"
        "signal.signal(signal.SIGINT, before)",
        "<here>",
    )

    assert (said.splitlines()[-1], error) == ("[10] True", "")


def test_the_kernels_own_handler_stands_after_a_run(kernel):
    """A stop in the user's own code after the run raises at once there."""
    kernel.cell("run, model = build(0)")
    said, error = kernel.cell("run.to_end(); say_and_wait('<here>', lambda: False)", "<here>")

    assert "KeyboardInterrupt" in error
    assert kernel.cell("print(interrupts.pending, run.ended)") == ("False finished: 2 epochs, 14 iterations\n", "")


FAILS = """
import gc, sys, weakref

def fails():
    logits = torch.ones(3)
    references.append(weakref.ref(logits))
    raise ValueError("planted")

references = []
run, model = build(0, fails)
"""


def test_a_failure_is_shown_debugged_and_let_go(kernel):
    """The user's lines alone, `%debug` stands in them, and IPython pins nothing once the run has gone on."""
    kernel.cell(FAILS)
    said, error = kernel.cell("run.to_end()")

    assert f"{os.sep}looptools{os.sep}" not in error
    assert "run.to_end()" in error
    assert "left.pop()()" in error
    assert "looptools: train/forward (iteration 9, epoch 1" in error

    said, error = kernel.cell("%debug", answers=("p logits.sum()", "up", "p state.iteration", "q"))
    assert "tensor(3.)" in said
    assert "9\n" in said

    alive = "gc.collect(); print(type(sys.last_value).__name__, references[0]() is not None)"
    assert kernel.cell(alive) == ("ValueError True\n", "")
    assert kernel.cell("state = run.retry()") == ("", "")
    assert kernel.cell(alive) == ("ValueError False\n", "")
