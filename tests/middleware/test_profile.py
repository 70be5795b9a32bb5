"""Traces of a few iterations."""

from __future__ import annotations

import gc
import json
import subprocess
import sys

import pytest
import torch
from loops import Case, assert_same, by_hand, device_reads, piped

import looptools as lt


def phase_of(model, sgd, n):
    return lt.train(model, [torch.ones(2, 1)] * n, lambda model, batch: model(batch)) | lt.optimize(sgd)


def run_of(model, sgd, part, *, n=8, epochs=1):
    return lt.workflow([(phase_of(model, sgd, n), 1)], max_epochs=epochs) | part


def calls_in(path):
    """How often the optimizer stepped, and how many whole iterations there are, in a trace."""
    names = [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
    return sum("SGD.step" in name for name in names), sum(name.startswith("ProfilerStep") for name in names)


def test_a_trace_of_whole_iterations(model, sgd, tmp_path):
    """After one that is left alone and one to warm up, two of eight are in it, and no more is measured."""
    run = run_of(model, sgd, lt.profile(tmp_path, wait=1, warmup=1, active=2, line=None))

    list(run.take(3))
    assert list(tmp_path.iterdir()) == []
    next(run)
    assert calls_in(tmp_path / "trace_1.json") == (2, 2)
    assert run["run/profile"]._profiler is None
    run.to_end()
    assert [path.name for path in tmp_path.iterdir()] == ["trace_1.json"]


def test_fetching_a_batch_belongs_to_its_iteration(model, sgd, tmp_path):
    """From the first one on: of four iterations, the middle two and their two batches are in the trace."""
    source = torch.utils.data.DataLoader(torch.ones(8, 1), 2)
    phase = lt.train(model, source, lambda model, batch: model(batch)) | lt.optimize(sgd)
    run = lt.workflow([(phase, 1)], max_epochs=1) | lt.profile(tmp_path, wait=0, warmup=1, active=2, line=None)
    run.to_end()

    events = json.loads((tmp_path / "trace_1.json").read_text())["traceEvents"]
    assert sum(event.get("name", "").startswith("enumerate(DataLoader)") for event in events) == 2
    assert calls_in(tmp_path / "trace_1.json") == (2, 2)


def test_a_short_table(model, sgd):
    """The iterations and their time, then eight operators, the longest first."""
    lines = []
    run_of(model, sgd, lt.profile(wait=1, warmup=1, active=3, line=lines.append)).to_end()

    assert lines[0].startswith("profile: 3 iterations of ")
    assert lines[0].endswith(" ms; by time on the CPU:")
    assert len(lines) == 9
    times = [float(line.split(" ms")[0].split()[-1]) for line in lines[1:]]
    assert times == sorted(times, reverse=True)


def test_repeated_cycles_have_traces_of_their_own(model, sgd, tmp_path):
    """Across passes; a file that is there is not written over."""
    (tmp_path / "trace_1.json").write_text("mine")
    part = lt.profile(tmp_path, wait=1, warmup=1, active=1, repeat=2, line=None)
    run_of(model, sgd, part, n=4, epochs=2).to_end()

    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace_1.json", "trace_2.json", "trace_3.json"]
    assert (tmp_path / "trace_1.json").read_text() == "mine"
    assert calls_in(tmp_path / "trace_3.json") == (1, 1)


def test_validations_are_not_counted(model, sgd, tmp_path):
    """They are in a trace that goes across, but the schedule is that of training iterations."""
    val = lt.validate(model, [torch.ones(2, 1)] * 3, lambda model, batch: model(batch))
    entries = [(val, 1), (phase_of(model, sgd, 2), 1)]
    run = lt.workflow(entries, max_epochs=2) | lt.profile(tmp_path, wait=1, warmup=1, active=2, line=None)
    run.to_end()

    assert calls_in(tmp_path / "trace_1.json") == (2, 2)


def test_within_a_phase(model, sgd, tmp_path):
    """The boundary is the iteration's all the same."""
    phase = phase_of(model, sgd, 8) | lt.profile(tmp_path, wait=1, warmup=1, active=2, line=None)
    iter(phase).to_end()

    assert calls_in(tmp_path / "trace_1.json") == (2, 2)


@pytest.mark.parametrize("leave", ["close", "with", "exception"])
def test_a_profiler_that_is_left_open_is_closed(model, sgd, tmp_path, leave):
    """After break, at the end of `with run:`, and after an exception: what there is is written, none is left on."""

    def fails(states):
        for state in states:
            if leave == "exception" and state.index == 3:
                raise KeyError
            yield state

    lines = []
    part = lt.profile(tmp_path, wait=0, warmup=1, active=5, line=lines.append)
    run = lt.workflow([(phase_of(model, sgd, 8) | fails, 1)], max_epochs=1) | part
    if leave == "with":
        with run:
            list(run.take(3))
    else:
        try:
            list(run.take(3 + (leave == "exception")))
        except KeyError:
            pass
        run.close()

    assert not torch.autograd.profiler._is_profiler_enabled
    assert calls_in(tmp_path / "trace_1.json")[0] >= 2
    assert lines[0].startswith("profile: closed half way")


def test_a_run_that_is_forgotten_takes_its_profiler_along(model, sgd):
    """As when a notebook's cell is run again."""
    run = run_of(model, sgd, lt.profile(wait=0, warmup=1, active=5, line=lambda line: None))
    list(run.take(3))
    assert torch.autograd.profiler._is_profiler_enabled
    del run
    gc.collect()

    assert not torch.autograd.profiler._is_profiler_enabled


def test_a_process_may_end_while_it_profiles():
    """An interpreter that ends with torch's profiler running would crash."""
    code = """if True:
        import torch, looptools as lt
        model = torch.nn.Linear(1, 1)
        phase = lt.train(model, [torch.ones(1, 1)] * 9, lambda model, batch: model(batch).mean())
        phase = phase | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1))
        run = lt.workflow([(phase, 1)], max_epochs=1) | lt.profile(wait=0, warmup=1, active=5, line=lambda line: None)
        list(run.take(3))
        print("done")
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert (out.stdout.strip(), out.returncode) == ("done", 0)


def test_a_run_that_slept_begins_its_profile_anew(model, sgd, tmp_path):
    """At the next boundary, so that iterations are whole."""
    run = run_of(model, sgd, lt.profile(tmp_path, wait=1, warmup=1, active=1, line=None))
    with run:
        next(run)
    run.to_end()

    assert calls_in(tmp_path / "trace_1.json") == (1, 1)


def test_a_resumed_run_does_not_profile_again(model, sgd, tmp_path):
    """Unless it is asked to."""
    part = lt.profile(tmp_path / "traces", wait=0, warmup=1, active=1, line=None)
    checkpoint = lt.checkpoint(tmp_path / "saved", every=lt.epochs(1))
    list((run_of(model, sgd, part, n=3, epochs=3) | checkpoint).take(3))
    run = run_of(model, sgd, part, n=3, epochs=3) | checkpoint
    run.resume()

    list(run.take(3))
    assert len(list((tmp_path / "traces").iterdir())) == 1
    run.replace("profile", lt.profile(tmp_path / "traces", wait=0, warmup=1, active=1, repeat=2, line=None))
    run.to_end()
    assert len(list((tmp_path / "traces").iterdir())) == 2


def test_a_rehearsal_writes_elsewhere(model, sgd, tmp_path):
    """Traces of a trial go to its temporary folder."""
    run = run_of(model, sgd, lt.profile(tmp_path, wait=0, warmup=1, active=1, line=None))
    run.rehearse(3)

    assert list(tmp_path.iterdir()) == []


def test_same_as_by_hand_without_a_read(tmp_path):
    """It changes no bit, and reads the device no more often than without it."""
    case, reads = Case("AdamW"), {}
    for profiled in (True, False):
        run = piped(case)
        run = run | lt.profile(tmp_path, wait=1, warmup=1, active=2, line=None) if profiled else run
        with device_reads() as reads[profiled]:
            run.to_end()
        assert_same(run.model.state_dict(), by_hand(case))

    assert reads[True] == reads[False]


def test_when_it_is_through_it_costs_two_calls(model, sgd):
    """Its generator and its link."""
    from test_cost import frames

    calls = {}
    for profiled in (True, False):
        run = run_of(model, sgd, lt.timer(), n=40)
        run = run | lt.profile(wait=0, warmup=1, active=1, line=lambda line: None) if profiled else run
        list(run.take(2))
        calls[profiled] = frames(lambda: next(run))

    assert calls[True] - calls[False] == 2


def test_one_next_is_one_iteration(model, sgd, batches):
    """No second batch is fetched."""
    fetched = []
    source = lambda: (fetched.append(1) or batch for batch in batches)  # noqa: E731
    phase = lt.train(model, source, lambda m, b: m(b)) | lt.optimize(sgd)
    run = lt.workflow([(phase, lt.iterations(3))], max_epochs=1) | lt.profile()
    next(run)
    run.close()

    assert len(fetched) == 1


def test_bad_options(tmp_path):
    """Refused where they are typed."""
    with pytest.raises(ValueError, match="profile: active must be at least 1, got 0"):
        lt.profile(active=0)
    with pytest.raises(ValueError, match="profile: without folder and line nobody sees the result"):
        lt.profile(line=None)
    with pytest.raises(RuntimeError, match="profile: these states belong to no run"):
        next(lt.profile()([lt.State(phase="train")]))


def test_a_trace_that_could_not_be_written_comes_with_the_next_try(model, sgd, tmp_path):
    """It counts as done once it is written."""
    run = run_of(model, sgd, lt.profile(line=None, folder=tmp_path / "ok", wait=0, warmup=1, active=1))
    run["profile"].on_build(run)
    (tmp_path / "ok").rmdir()
    (tmp_path / "ok").write_text("in the way")
    next(run)
    with pytest.raises(OSError):
        next(run)
    assert run["profile"].done == 0
    (tmp_path / "ok").unlink()

    run.to_end()

    assert calls_in(tmp_path / "ok" / "trace_1.json") == (1, 1)
    assert run["profile"].done == 1
