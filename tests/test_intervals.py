"""How often."""

from __future__ import annotations

import pytest
import torch

import looptools as lt


@pytest.mark.parametrize("every", [0, 2.5, "often", lt.epochs])
def test_bad_intervals_are_refused(every):
    """Where they are typed."""
    with pytest.raises((TypeError, ValueError), match="must be"):
        lt.log(every=every)


@pytest.mark.parametrize(
    ("every", "fires"),
    [
        (3, [2, 5, 8, 11]),
        (lt.epochs(2), [7]),
        (lt.rounds(1), []),
        (lt.samples(5), [1, 3, 5, 7, 9, 11]),
        (lambda state: state.trains and state.index == 0, [0, 4, 8]),
    ],
)
def test_intervals(every, fires):
    """Which training iterations each kind picks: three epochs of four batches of 3, 3, 3 and 1; then a validation."""
    from looptools.intervals import interval

    every, seen = interval(every), []

    def watch(states):
        for state in states:
            if every(state):
                seen.append(state.iteration if state.trains else "val")
            yield state

    data = [torch.ones(n) for n in (3, 3, 3, 1)]
    step = lambda model, batch: {"x": batch.sum()}  # noqa: E731
    entries = [(lt.train(None, data, step), 1), (lt.validate(None, data, step), 1)]

    (lt.workflow(entries, max_epochs=3) | watch).to_end()

    assert seen == (["val"] * 3 if isinstance(every, lt.rounds) else fires)


def test_seconds_count_the_runs_own_work(monkeypatch):
    """Due on the first iteration that begins in the next n seconds of work."""
    clock = iter(range(10_000))
    monkeypatch.setattr("looptools.cursor.perf_counter", lambda: float(next(clock)))
    seen = []

    def watch(states):
        for state in states:
            if lt.seconds(6)(state):
                seen.append(state.run.began)
            yield state

    phase = lt.train(None, [1.0] * 12, lambda model, batch: {"x": batch})
    (lt.workflow([(phase, 1)], max_epochs=1) | watch).to_end()

    assert seen
    assert all(now // 6 > before // 6 for before, now in seen)


def test_seconds_are_not_due_at_once_in_a_resumed_run(tmp_path, monkeypatch):
    """What the run had done before is behind it."""
    clock = iter(range(10_000))
    monkeypatch.setattr("looptools.cursor.perf_counter", lambda: float(next(clock)))

    def make(due):
        def watch(states):
            for state in states:
                due.append(lt.seconds(80)(state))
                yield state

        phase = lt.train(None, [1.0] * 4, lambda model, batch: {"x": batch})
        return lt.workflow([(phase, 1)], max_epochs=9) | watch | lt.checkpoint(tmp_path)

    list(make([]).take(24))
    due: list[bool] = []
    run = make(due)
    run.resume()
    assert 80 < run.progress.seconds < 150
    next(run)

    assert due == [False]


@pytest.mark.parametrize(
    ("bounds", "error", "words"),
    [
        ({}, ValueError, "give either at_least= or at_most= for val/x"),
        ({"at_least": 1.0, "at_most": 2.0}, ValueError, "give either at_least= or at_most= for val/x"),
        ({"at_least": "1"}, TypeError, "the bound of val/x must be a number, got '1'"),
        ({"at_most": True}, TypeError, "the bound of val/x must be a number, got True"),
    ],
)
def test_bad_targets_are_refused(bounds, error, words):
    """Where they are typed."""
    with pytest.raises(error, match=f"^target: {words}"):
        lt.target("val/x", **bounds)


@pytest.mark.parametrize(
    ("target", "due"),
    [
        (lt.target("val/x", at_least=2.0), [1, 2]),
        (lt.target("val/x", at_most=2.0), [0, 1]),
    ],
)
def test_a_target_is_due_on_the_last_state_of_passes_that_reach_it(target, due):
    """Of its own phase, on the bound too; what is not a number never reaches one."""
    left, seen = iter([1.0, 2.0, 3.0, float("nan")]), []

    def watch(states):
        for state in states:
            if target(state):
                assert (state.phase, state.last) == ("val", True)
                seen.append(state.plan.round)
            yield state

    val = lt.validate(None, lambda: [next(left)], lambda model, batch: {"x": batch})
    train = lt.train(None, [1.0, 2.0], lambda model, batch: {"x": batch})
    (lt.workflow([(val, 1), (train, 1)], max_rounds=4) | watch).to_end()

    assert seen == due


def test_a_target_that_nobody_writes_is_found_after_the_first_round():
    """With the known ones; states without a run have no results."""
    val = lt.validate(None, [1.0], lambda model, batch: {"x": batch})
    run = lt.workflow([(val, 1)], max_rounds=1) | lt.stop_after(lt.target("val/y", at_least=1.0))

    with pytest.raises(LookupError, match='target: no part writes "val/y"; known are val/x'):
        run.to_end()
    with pytest.raises(RuntimeError, match="target: these states belong to no run"):
        lt.target("val/x", at_most=1.0)(lt.State(phase="val", last=True))


def test_samples_of_a_dropped_state_fill_no_multiple():
    """As it counts none."""
    due = []

    def drops(states):
        for state in states:
            if state.index != 1:
                yield state

    def watch(states):
        for state in states:
            due.append((state.dropped, lt.samples(2)(state)))
            yield state

    phase = lt.train(None, [torch.ones(1)] * 2, lambda model, batch: {"x": batch.sum()}) | drops
    (lt.workflow([(phase, 1)], max_epochs=2) | watch).to_end()

    assert due == [(False, False), (True, False), (False, True), (True, False)]


def test_a_phase_that_the_workflow_does_not_know_has_a_round_more():
    """The loop's body may validate it; a misspelt one is told after the second round."""
    val = lt.validate(None, [1.0], lambda model, batch: {"x": batch})
    run = lt.workflow([(val, 1)], max_rounds=4) | lt.stop_after(lt.target("vall/x", at_least=1.0))
    next(run)

    with pytest.raises(LookupError, match=r'target: no part writes "vall/x"; .* mean \'val/x\''):
        run.to_end()
    assert run.progress.round == 1
