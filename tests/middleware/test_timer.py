"""Seconds of iterations, and those that are left."""

from __future__ import annotations

import pytest
import torch
from loops import Case, assert_same, by_hand, device_reads, piped

import looptools as lt
from looptools import cursor as machine


class Clock:
    """Time that passes only when somebody lets it."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def takes(self, seconds, value=None):
        self.now += seconds
        return value


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(machine, "perf_counter", clock)
    return clock


def phase_of(model, sgd, clock, *, n=3, fetch=1.0, step=2.0):
    """n batches of two samples; fetching one takes a second, the step two."""

    class Batches:
        def __len__(self):
            return n

        def __iter__(self):
            return (clock.takes(fetch, torch.ones(2, 1)) for _ in range(n))

    return lt.train(model, Batches(), lambda model, batch: clock.takes(step, model(batch))) | lt.optimize(sgd)


def test_seconds_of_the_batch_and_of_the_whole_iteration(model, sgd, clock):
    """The user's own code between two states is not counted."""
    run = lt.workflow([(phase_of(model, sgd, clock) | lt.timer(), 1)], max_epochs=1)

    for state in run:
        clock.takes(50.0)
        assert (state.metrics["data_time"], state.metrics["iter_time"]) == (1.0, 3.0)
        assert state.gauges["samples_per_s"] == pytest.approx(2 / 3)

    assert (run.results["train/data_time"], run.results["train/iter_time"]) == (1.0, 3.0)


def test_eta_of_training_alone(model, sgd, clock):
    """Three seconds for each iteration to come."""
    run = lt.workflow([(phase_of(model, sgd, clock) | lt.timer(), 1)], max_epochs=2)

    assert [state.gauges["eta"] for state in run] == [15.0, 12.0, 9.0, 6.0, 3.0, 0.0]


@pytest.mark.parametrize("of_run", [True, False])
def test_eta_counts_validations_once_the_first_is_over(model, sgd, clock, of_run):
    """Each takes 6 seconds, as 2 for each of the 3 iterations before it; where the timer stands makes no difference."""
    train = phase_of(model, sgd, clock)
    val = lt.validate(model, [1, 1], lambda model, batch: {"x": clock.takes(3.0, 1.0)})
    run = lt.workflow([(train if of_run else train | lt.timer(), 1), (val, 1)], max_epochs=3)
    run = run | lt.timer() if of_run else run

    eta = [round(state.gauges["eta"], 6) for state in run if state.trains]

    share = [6 / 4, 6 / 5, 6 / 6, 12 / 7, 12 / 8, 12 / 9]
    expected = [left * (3 + more) for left, more in zip([5, 4, 3, 2, 1, 0], share, strict=True)]
    assert eta == [24.0, 21.0, 18.0] + [round(value, 6) for value in expected]


def test_parts_behind_it_count_for_the_eta(model, sgd, clock):
    """A slow log makes the whole slower, though iter_time ends before it."""

    def slow(states):
        for state in states:
            clock.takes(4.0)
            yield state

    run = lt.workflow([(phase_of(model, sgd, clock, n=4), 1)], max_epochs=1) | lt.timer(window=1) | slow

    states = list(run)
    assert [state.metrics["iter_time"] for state in states] == [3.0] * 4
    assert [state.gauges["eta"] for state in states] == [9.0, 14.0, 7.0, 0.0]


def test_the_window_slides(model, sgd, clock):
    """After two fast iterations nothing is left of the slow first one."""
    phase = phase_of(model, sgd, clock, n=4, fetch=0.0)
    run = lt.workflow([(phase | lt.timer(window=2), 1)], max_epochs=1)
    next(run)
    run.replace("forward", lambda model, batch: clock.takes(1.0, model(batch)))

    assert [state.gauges["samples_per_s"] for state in run] == [4 / 3, 2.0, 2.0]


def test_no_eta_without_a_horizon(model, sgd):
    """A source that does not know its length."""
    phase = lt.train(model, lambda: iter([torch.ones(1, 1)] * 2), lambda m, b: m(b)) | lt.optimize(sgd) | lt.timer()
    run = iter(phase)

    assert all("eta" not in state.gauges and state.gauges["samples_per_s"] > 0 for state in run)


def test_validation_states_are_timed_too(model, sgd, clock):
    """Without rates."""
    val = lt.validate(model, [1, 1], lambda model, batch: {"x": clock.takes(3.0, 1.0)})
    run = lt.workflow([(val, 1)], max_rounds=1) | lt.timer()

    assert [(state.metrics["iter_time"], state.gauges) for state in run] == [(3.0, {})] * 2


def test_the_share_of_validations_is_saved_and_resumed(model, sgd, clock, tmp_path):
    """A resumed run counts them from the start, also the one that came just before."""

    def make():
        val = lt.validate(model, [1], lambda model, batch: {"x": clock.takes(6.0, 1.0)})
        run = lt.workflow([(phase_of(model, sgd, clock), 1), (val, 1)], max_epochs=3)
        return run | lt.timer() | lt.checkpoint(tmp_path)

    list(make().take(8))  # up to the second validation
    run = make()
    run.resume()

    assert next(run).gauges["eta"] == pytest.approx(2 * (3 + 12 / 7))


def test_same_as_by_hand_without_a_read():
    """It changes no bit, and reads the device no more often than without it."""
    case, reads = Case("AdamW"), {}
    for timed in (True, False):
        run = piped(case) | lt.timer() if timed else piped(case)
        with device_reads() as reads[timed]:
            run.to_end()
        assert_same(run.model.state_dict(), by_hand(case))

    assert reads[True] == reads[False]


def test_one_next_is_one_iteration_and_closing_leaves_nothing(model, sgd, batches):
    """No second batch is fetched; no generator stays."""
    fetched = []
    source = lambda: (fetched.append(1) or batch for batch in batches)  # noqa: E731
    phase = lt.train(model, source, lambda m, b: m(b)) | lt.optimize(sgd)
    run = lt.workflow([(phase, lt.iterations(3))], max_epochs=1) | lt.timer()
    next(run)
    run.close()

    assert len(fetched) == 1
    assert all(slot.stream is None for slot in run.cursor.slots)


def test_python_calls_of_a_timed_iteration(model, sgd, batches):
    """Generator, link, two looks at the run's clock, and one of its own: few enough for a microsecond."""
    from test_cost import frames

    calls = {}
    for timed in (True, False):
        run = lt.workflow([(lt.train(model, batches * 20, lambda m, b: m(b)) | lt.optimize(sgd), 1)], max_epochs=1)
        run = run | lt.timer() if timed else run
        calls[timed] = frames(lambda: next(run))

    assert calls[True] - calls[False] <= 5


def test_states_of_no_run_are_refused():
    """Nobody keeps the time."""
    with pytest.raises(RuntimeError, match="timer: these states belong to no run"):
        next(lt.timer()([lt.State(phase="train")]))


def test_bad_options():
    """Refused where they are typed."""
    with pytest.raises(ValueError, match="timer: window must be at least 1, got 0"):
        lt.timer(window=0)
