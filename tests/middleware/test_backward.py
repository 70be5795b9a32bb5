"""Gradients over windows of iterations."""

from __future__ import annotations

import pytest

import looptools as lt


def phase_of(model, batches, *parts):
    phase = lt.train(model, batches, lambda model, batch: model(batch))
    for part in parts:
        phase = phase | part
    return phase


def test_gradients_stay_to_be_looked_at(model, sgd, batches):
    """They are zeroed when the next window opens, not after the update."""
    run = iter(phase_of(model, batches, lt.optimize(sgd, accumulate=2)))

    assert [(next(run).updates, model.w.grad.item()) for _ in range(3)] == [(False, 0.5), (True, 1.5), (True, 3.0)]


def test_accumulation_has_a_correct_tail(model, sgd, batches):
    """Three batches by two: the mean of the first two, then the third alone."""
    run = lt.workflow([(phase_of(model, batches, lt.optimize(sgd, accumulate=2)), 1)], max_epochs=2)

    weights = [(state.updates, model.w.item()) for state in run]

    assert weights == [(False, 3.0), (True, 1.5), (True, -1.5)] + [(False, -1.5), (True, -3.0), (True, -6.0)]
    assert list(run.progress.updates.values()) == [4]


def test_a_skipped_batch_leaves_the_window_one_short(model, sgd, batches):
    """Its share is made up for: the window's gradient is the mean of what came."""

    def fails(states):
        for state in states:
            if state.index == 2:
                raise ValueError
            yield state

    phase = phase_of(model, batches, fails, lt.optimize(sgd, accumulate=3))
    run = lt.workflow([(phase.on(batches + batches), 1)], max_epochs=1)
    with pytest.raises(ValueError):
        run.to_end()
    run.skip()
    next(run)

    assert model.w.item() == pytest.approx(3 - (1 + 2 + 1) / 3)


def test_a_loss_without_a_graph_is_named(model, sgd, batches):
    """Detached, or computed in validation."""
    with pytest.raises(RuntimeError, match="the loss of iteration 0 of train has no graph. Was it detached"):
        next(iter(lt.train(model, batches, lambda model, batch: model(batch).detach()) | lt.optimize(sgd)))
    with pytest.raises(RuntimeError, match="A validation phase has none; leave optimize out of it"):
        next(iter(lt.validate(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)))
