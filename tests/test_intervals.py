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
