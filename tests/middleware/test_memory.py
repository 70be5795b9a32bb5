"""Peaks of memory."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from loops import Case, assert_same, by_hand, device_reads, piped

import looptools as lt
from looptools.middleware import memory as module


def run_of(model, sgd, batches, part):
    phase = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd) | part
    return lt.workflow([(phase, 1)], max_epochs=2)


@pytest.mark.skipif(sys.platform == "win32", reason="resource is Unix")
def test_on_the_cpu_it_is_the_peak_of_the_process(model, sgd, batches):
    """In MiB, close to what the system says; in run.results it is that of the pass's last state."""
    import resource

    run = run_of(model, sgd, batches, lt.memory())
    results = run.to_end()

    unit = 1 if sys.platform == "darwin" else 1024
    assert results["train/memory_mb"] == pytest.approx(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, rel=0.01
    )


def test_every_so_often_and_at_the_end_of_a_pass(model, sgd, batches):
    """Every second training iteration, and the last of each pass of three."""
    run = run_of(model, sgd, batches, lt.memory(every=2))

    assert ["memory_mb" in state.gauges for state in run] == [False, True, True, True, False, True]


@pytest.mark.parametrize(("platform", "mib"), [("linux", 3.0), ("darwin", 3.0)])
def test_units_of_each_system(monkeypatch, platform, mib):
    """Linux says KiB, macOS bytes."""
    said = {"linux": 3 * 1024, "darwin": 3 * 2**20}[platform]
    fake = SimpleNamespace(getrusage=lambda who: SimpleNamespace(ru_maxrss=said), RUSAGE_SELF=0)
    monkeypatch.setitem(sys.modules, "resource", fake)
    monkeypatch.setattr(module.sys, "platform", platform)

    assert next(lt.memory(every=1)([lt.State(phase="train")])).gauges == {"memory_mb": mib}


@pytest.mark.parametrize("installed", [True, False])
def test_windows_needs_psutil(monkeypatch, installed):
    """Without it there is no gauge."""
    info = SimpleNamespace(peak_wset=3 * 2**20)
    monkeypatch.setattr(module.sys, "platform", "win32")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setitem(
        sys.modules, "psutil", SimpleNamespace(Process=lambda: SimpleNamespace(memory_info=lambda: info))
    )

    gauges = next(lt.memory(every=1)([lt.State(phase="train")])).gauges

    assert gauges == ({"memory_mb": 3.0} if installed else {})


def test_on_cuda_it_is_the_peak_of_the_models_device(model, sgd, batches, monkeypatch):
    """Asked of torch, and begun anew with each pass if that is wanted."""
    asked, cuda = [], torch.device("cuda", 1)
    monkeypatch.setattr(module, "model_device", lambda model: cuda)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 5 * 2**20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append("reset"))

    for reset, expected in [(False, [cuda] * 2), (True, ["reset", cuda] * 2)]:
        asked.clear()
        assert run_of(model, sgd, batches, lt.memory(reset=reset)).to_end()["train/memory_mb"] == 5.0
        assert asked == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_of_a_cuda_device_does_not_wait_for_it(model, batches):
    """A tensor of 8 MiB more is seen."""
    model = model.cuda()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    step = lambda model, batch: model(batch) + torch.zeros(2**21, device="cuda").sum()  # noqa: E731
    phase = lt.train(model, batches, step, device="model") | lt.optimize(sgd) | lt.memory(every=1, reset=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert next(iter(phase)).gauges["memory_mb"] >= 8
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_same_as_by_hand_without_a_read():
    """It changes no bit, and reads the device no more often than without it."""
    case, reads = Case("AdamW"), {}
    for measured in (True, False):
        run = piped(case) | lt.memory(every=1) if measured else piped(case)
        with device_reads() as reads[measured]:
            run.to_end()
        assert_same(run.model.state_dict(), by_hand(case))

    assert reads[True] == reads[False]


def test_one_next_is_one_iteration_and_closing_leaves_nothing(model, sgd, batches):
    """No second batch is fetched; no generator stays."""
    fetched = []
    source = lambda: (fetched.append(1) or batch for batch in batches)  # noqa: E731
    phase = lt.train(model, source, lambda m, b: m(b)) | lt.optimize(sgd) | lt.memory()
    run = lt.workflow([(phase, lt.iterations(3))], max_epochs=1)
    next(run)
    run.close()

    assert len(fetched) == 1
    assert all(slot.stream is None for slot in run.cursor.slots)


def test_python_calls_of_an_iteration_that_is_not_due(model, sgd, batches):
    """Generator, link, and the question whether it is due."""
    from test_cost import frames

    calls = {}
    for measured in (True, False):
        run = lt.workflow([(lt.train(model, batches * 20, lambda m, b: m(b)) | lt.optimize(sgd), 1)], max_epochs=1)
        run = run | lt.memory() if measured else run
        calls[measured] = frames(lambda: next(run))

    assert calls[True] - calls[False] <= 3


def test_bad_options():
    """Refused where they are typed."""
    with pytest.raises(TypeError, match="reset"):
        lt.memory(reset="yes")
    with pytest.raises(TypeError, match="every must be a number of iterations"):
        lt.memory(every="often")
