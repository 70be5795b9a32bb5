"""What a pipe costs, counted rather than timed."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from loops import classify, device_reads, loader, network
from torch import nn

import looptools as lt

ITERATIONS = 12


def frames(advance: Callable[[], object]) -> float:
    """Python frames entered by one call of *advance*, on average over some, after a few to warm up."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event == "call"

    for _ in range(5):
        advance()
    gc.collect()  # garbage of other tests has callbacks, which would count here
    gc.disable()
    sys.setprofile(profile)
    try:
        for _ in range(ITERATIONS):
            advance()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count / ITERATIONS


BATCHES = list(loader(shuffle=False))[:6] * 4  # all of 4 samples


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = network()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def train_by_hand() -> Iterator[None]:
    model, optimizer = make()
    parameters = list(model.parameters())
    model.train()
    for batch in BATCHES:
        loss = classify(model, batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        yield


def validate_by_hand() -> Iterator[None]:
    model, _ = make()
    model.eval()
    for batch in BATCHES:
        classify(model, batch)
        yield


def parts(run: lt.Run) -> int:
    """Parts of the pass under way, its batches not counted."""
    return len(run.cursor.line)


def test_python_calls_of_a_training_iteration(tmp_path):
    """At most 15 + 2k more than by hand, for the main job's pipe of k parts: schedule, clipping, log, checkpoint."""
    by_hand = train_by_hand()
    model, optimizer = make()
    phase = lt.train(model, BATCHES, classify) | lt.schedule_lr(optimizer, lt.schedules.cosine(), warmup=50)
    run = lt.workflow([(phase | lt.optimize(optimizer, max_norm=1.0), 1)], max_epochs=3)
    run = run | lt.log(tmp_path, every=50, line=None) | lt.checkpoint(tmp_path)

    more = frames(lambda: next(run)) - (frames(lambda: next(by_hand)) - 1)  # by hand without its generator

    assert parts(run) == 8
    assert more <= 15 + 2 * parts(run)


@pytest.mark.parametrize("k", [0, 5, 20])
def test_python_calls_of_a_pipe_of_plain_parts(k):
    """Each further part costs two calls: its generator and its link."""

    def plain(states):
        for state in states:
            yield state

    by_hand = train_by_hand()
    model, optimizer = make()
    phase = lt.train(model, BATCHES, classify) | lt.optimize(optimizer, max_norm=1.0)
    for _ in range(k):
        phase = phase | plain
    run = lt.workflow([(phase, 1)], max_epochs=3)

    more = frames(lambda: next(run)) - (frames(lambda: next(by_hand)) - 1)

    assert parts(run) == 5 + k
    assert more <= 15 + 2 * parts(run)


def test_python_calls_of_a_validation_iteration():
    """The same bound for a validation, whose loop by hand switches gradients off once and not each time."""
    by_hand = validate_by_hand()
    model, _ = make()
    run = lt.workflow([(lt.validate(model, BATCHES, classify), 1)], max_rounds=2)

    with torch.no_grad():
        expected = frames(lambda: next(by_hand)) - 1
    more = frames(lambda: next(run)) - expected

    assert parts(run) == 2
    assert more <= 15 + 2 * parts(run)


def test_no_device_read_without_a_row():
    """Training and validating read nothing but what torch itself reads; each pass reads its means once."""
    model, optimizer = make()
    phases = [lt.train(model, BATCHES, classify) | lt.optimize(optimizer), lt.validate(model, BATCHES, classify)]
    run = lt.workflow([(phase, 1) for phase in phases], max_epochs=1)
    next(run)

    with device_reads() as reads:
        list(run.take(5))
        assert reads == []
        run.to_end()

    assert reads == ["tolist"] * 2


def test_importing_looptools_imports_nothing_optional():
    """Neither TensorBoard nor any extra comes with `import looptools`."""
    code = """if True:
        import sys, torch
        before = set(sys.modules)
        import looptools
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(sorted(new & {"tensorboard", "tqdm", "matplotlib", "sklearn", "numpy", "IPython"}))
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert out.stdout.strip() == "[]"
