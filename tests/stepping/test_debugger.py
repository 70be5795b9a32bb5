"""`breakpoint()` and `%debug` land where one expects: in the user's own step or part."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

TRAINING = """
import torch
import looptools as lt

class Weight(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, batch):
        return self.w * batch.mean()

batches = [torch.full((2, 1), float(n)) for n in (1, 2, 3)]
model = Weight()
sgd = torch.optim.SGD(model.parameters(), lr=1.0)
whose = "the training's own"
"""


def session(code: str, typed: list[str]) -> str:
    """What a process that runs *code* shows, when *typed* is entered line by line."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        input="\n".join(typed) + "\n",
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONBREAKPOINT": "pdb.set_trace", "TERM": "dumb"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_breakpoint_in_a_step_stands_in_the_step():
    """Its locals are there, `up` leads to the line that called the run, and `c` continues to the right weight."""
    code = f"""{TRAINING}
def step(model, batch):
    loss = model(batch)
    if batch[0] == 2.0:
        breakpoint()
    return loss

run = lt.workflow([(lt.train(model, batches, step) | lt.optimize(sgd), 1)], max_epochs=1)
run.to_end()
print("ended:", run.ended, model.w.item(), run.failed)
"""
    shown = session(code, ["p 'here', batch.shape, loss.item(), model.w.item()", "up 99", "p whose", "c"])

    assert "('here', torch.Size([2, 1]), 4.0, 2.0)" in shown
    assert "the training's own" in shown
    assert f"ended: finished: 1 epoch, 3 iterations {3 - 1 - 2 - 3}.0 None" in shown


def test_one_frame_up_is_the_part_that_called_the_step():
    """`forward` with the state, which the whole run hangs on."""
    code = f"""{TRAINING}
def step(model, batch):
    breakpoint()
    return model(batch)

run = lt.workflow([(lt.train(model, batches[:1], step) | lt.optimize(sgd), 1)], max_epochs=1)
run.to_end()
"""
    shown = session(code, ["up", "p state.phase, state.iteration, state.run.progress.iteration", "c"])

    assert "('train', 0, 0)" in shown


def test_a_breakpoint_in_a_part_stands_in_the_part():
    """What is changed there counts, as in any loop."""
    code = f"""{TRAINING}
def halve(states):
    for state in states:
        factor = 0.5
        if state.iteration == 1:
            breakpoint()
        state.model.w.grad.mul_(factor)
        yield state

train = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd, between=halve)
run = lt.workflow([(train, 1)], max_epochs=1)
for state in run:
    pass
print("ended:", run.ended, model.w.item())
"""
    shown = session(code, ["p state.iteration, state.loss.item()", "factor = 0.0", "up 99", "p whose", "c"])

    assert "(1, 5.0)" in shown
    assert "the training's own" in shown
    assert "ended: finished: 1 epoch, 3 iterations 1.0" in shown  # 3 - 1/2 - 0 - 3/2


def test_stepping_out_of_a_step_goes_through_the_loop_and_comes_back():
    """`n` behind the step's return, and a breakpoint set by hand in the caller's body."""
    code = f"""{TRAINING}
def step(model, batch):
    loss = model(batch)
    if batch[0] == 1.0:
        breakpoint()
    return loss

run = lt.workflow([(lt.train(model, batches, step) | lt.optimize(sgd), 1)], max_epochs=1)
seen = []
for state in run:
    seen.append(state.iteration)
print("ended:", seen, model.w.item())
"""
    shown = session(code, ["n", "n", "n", "until", "c"])

    assert "ended: [0, 1, 2] -3.0" in shown


def test_leaving_the_debugger_loses_nothing():
    """`q` raises BdbQuit in the step; the next cell goes on with the same batch."""
    code = f"""{TRAINING}
import bdb
stops = [1]

def step(model, batch):
    if batch[0] == 2.0 and stops and stops.pop():
        breakpoint()
    return model(batch)

run = lt.workflow([(lt.train(model, batches, step) | lt.optimize(sgd), 1)], max_epochs=1)
try:
    run.to_end()
except bdb.BdbQuit:
    print("left:", run.failed.part, run.failed.state.iteration)
run.to_end()
print("ended:", run.ended, model.w.item())
"""
    shown = session(code, ["q"])

    assert "left: train/forward 1" in shown
    assert "ended: finished: 1 epoch, 3 iterations -3.0" in shown


FAILING = """
def step(model, batch):
    scale = 2.0 - float(batch[0])
    return model(batch) / {divide}

run = lt.workflow([(lt.train(model, batches, step) | lt.optimize(sgd), 1)], max_epochs=1)
"""


def cells(*sources: str) -> str:
    """A script that runs cells in IPython, as a notebook does."""
    pytest.importorskip("IPython")
    return f"""
import os, tempfile
os.environ["IPYTHONDIR"] = tempfile.mkdtemp()
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.colors = "nocolor"
shell.history_manager.enabled = False
for source in {list(sources)!r}:
    shell.run_cell(source)
"""


def test_debug_after_a_failed_cell_stands_in_the_users_step():
    """Its locals can be read; the mended step then goes on in the same run."""
    code = cells(
        TRAINING + FAILING.format(divide="(1 // int(scale != 0))"),
        "run.to_end()",
        "%debug",
        "step_of = lambda model, batch: model(batch)\nrun.replace('step', step_of)\nrun.retry()\nrun.to_end()",
        "print('ended:', run.ended, model.w.item())",
    )
    shown = session(code, ["p 'here', scale, batch.sum().item()", "up 99", "p whose", "q"])

    assert "('here', 0.0, 4.0)" in shown
    assert "the training's own" in shown
    assert "ended: finished: 1 epoch, 3 iterations -3.0" in shown


def test_debug_after_a_failed_part_stands_in_the_users_part():
    """Also where the part is a generator, whose frame the run has let go of."""
    part = """
def guard(states):
    for state in states:
        limit = 8.5
        assert state.loss < limit, "too large"
        yield state

train = lt.train(model, batches[::-1], lambda model, batch: model(batch)) | guard | lt.optimize(sgd)
run = lt.workflow([(train, 1)], max_epochs=1)
"""
    code = cells(TRAINING + part, "run.to_end()", "%debug", "run.skip(); run.to_end(); print('w', model.w.item())")
    shown = session(code, ["p 'here', limit, state.iteration, state.loss.item()", "q"])

    assert "('here', 8.5, 0, 9.0)" in shown
    assert "w 0.0" in shown  # 3 - 2 - 1
