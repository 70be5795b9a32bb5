"""Gentle beginnings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import looptools as lt

warmup = lt.schedules.warmup


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 10_000), ratio=st.floats(1e-6, 1.0), kind=st.sampled_from(["linear", "exponential"]))
def test_it_grows_from_the_ratio_to_one_without_a_jump(count, ratio, kind):
    """The last step before the end differs from 1 by about one step's growth."""
    factor = warmup(count, ratio=ratio, kind=kind)

    assert factor(0) == pytest.approx(ratio)
    assert factor(count) == factor(count + 1) == 1.0
    slope = 1 - ratio if kind == "linear" else 1 - ratio ** (1 / count)
    assert 1 - factor(count - 1) == pytest.approx(slope / (count if kind == "linear" else 1), abs=1e-9)
    assert factor(count // 2) <= factor(count - 1) <= 1.0


def test_a_constant_one_jumps_at_its_end():
    """*ratio* for *count* steps."""
    assert [warmup(2, ratio=0.3, kind="constant")(done) for done in range(4)] == [0.3, 0.3, 1.0, 1.0]


def counts(model, sgd, source, warmup, by="update", **bounds):
    """The warm-up's count in a run."""
    part = lt.schedule_lr(sgd, lt.schedules.constant(), warmup=warmup, by=by)
    phase = lt.train(model, source, lambda model, batch: model(batch)) | part | lt.optimize(sgd, accumulate=2)
    run = lt.workflow([(phase, 1)], **bounds)
    return run["train/schedule_lr"]._warmup.count


@pytest.mark.parametrize(("by", "expected"), [("update", 4), ("epoch", 4), ("iteration", 6)])
def test_epochs_are_turned_into_steps(model, sgd, batches, by, expected):
    """Two epochs of three batches make two updates each; under a schedule by epoch it counts updates too."""
    assert counts(model, sgd, batches, lt.epochs(2), by, max_epochs=5) == expected
    assert counts(model, sgd, batches, warmup(lt.epochs(2), ratio=0.5), by, max_epochs=5) == expected


def test_a_run_that_is_shorter_than_its_warm_up_has_the_beginning_of_it(model, sgd, batches):
    """One epoch, to try it out, under a warm-up of five: as steep as in the whole training."""
    assert counts(model, sgd, batches, lt.epochs(5), max_epochs=1) == 10


def test_epochs_of_unknown_length_are_refused_when_the_run_is_built(model, sgd, batches):
    """With the cure, which works."""
    source = lambda: iter(batches)  # noqa: E731
    with pytest.raises(ValueError, match=r"updates of 2 epochs cannot be counted, .* Give the count itself"):
        counts(model, sgd, source, lt.epochs(2), max_epochs=5)

    assert counts(model, sgd, source, 4, max_epochs=5) == 4
