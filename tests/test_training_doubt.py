"""Training phases in which nobody is seen to train."""

from __future__ import annotations

import gc
import warnings

import pytest
from loops import device_reads
from torch.optim.optimizer import _global_optimizer_post_hooks

import looptools as lt


def square(model, batch):
    return model(batch).pow(2)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_a_forgotten_optimizer_is_said_once(model, batches, iterations):
    """When what follows the first iteration is over; a run that ends with it says so at its end."""
    run = lt.workflow([(lt.train(model, batches, square), 1)], max_iterations=iterations)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        next(run)
        assert not caught
        run.to_end()

    assert [str(w.message).partition(",")[0] for w in caught] == ["train: nobody calls backward"]


def test_each_training_phase_is_asked(model, sgd, batches):
    """The second one of two has no optimizer."""
    phases = [lt.train(model, batches, square) | lt.optimize(sgd), lt.train(model, batches, square, name="more")]

    with pytest.warns(UserWarning, match="more: nobody calls backward"):
        lt.workflow([(phase, 1) for phase in phases], max_epochs=4).to_end()


def test_a_warning_that_is_an_error_loses_nothing(model, batches):
    """The run stands between two iterations, and goes on."""
    run = lt.workflow([(lt.train(model, batches, square), 1)], max_epochs=1)
    next(run)

    with pytest.raises(UserWarning, match="nobody calls backward"):
        next(run)

    assert [state.index for state in run] == [1, 2]


def test_asking_reads_no_device(model, batches):
    """Versions are counted on the host."""
    run = lt.workflow([(lt.train(model, batches, square), 1)], max_epochs=1)
    with device_reads() as reads:
        next(run)
        with pytest.warns(UserWarning, match="nobody calls backward"):
            next(run)

    assert reads == []


def test_the_question_leaves_nothing_behind(model, sgd, batches):
    """Its hook on optimizers goes with the answer, or with the run."""
    hooks = _global_optimizer_post_hooks
    before = len(hooks)
    run = lt.workflow([(lt.train(model, batches, square), 1)], max_epochs=1)
    state = next(run)
    assert len(hooks) == before + 1

    state.loss.backward()
    sgd.step()
    next(run)
    assert len(hooks) == before

    lt.workflow([(lt.train(model, batches, square), 1)], max_epochs=1).explain()
    gc.collect()
    assert len(hooks) == before
