"""Training phases in which nobody is seen to train."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from loops import device_reads
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

import looptools as lt


def square(model, batch):
    return model(batch).pow(2)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_a_forgotten_optimizer_is_said_once(model, batches, iterations):
    """When what follows the last iteration of the pass is over; a run that ends with it says so at its end."""
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
    """The run stands between two passes, and goes on."""
    run = lt.workflow([(lt.train(model, batches, square), 1)], max_epochs=2)
    list(run.take(3))

    with pytest.raises(UserWarning, match="nobody calls backward"):
        next(run)

    assert [state.index for state in run] == [0, 1, 2]


def test_the_device_is_read_once_before_the_warning(model, sgd, batches):
    """Versions are counted on the host; where the weights are seen to move, nothing is read."""
    run = lt.workflow([(lt.train(model, batches, square), 1)], max_epochs=1)
    with device_reads() as reads:
        list(run.take(3))
        assert reads == ["tolist"]  # the means of the pass
        with pytest.warns(UserWarning, match="nobody calls backward"):
            run.to_end()
    assert reads == ["tolist"] * 2

    with device_reads() as reads:
        for state in lt.train(model, batches, square):
            state.loss.backward()
            sgd.step()
            assert state.last or reads == []


def test_a_long_pass_is_not_waited_for(model):
    """After 32 iterations without a gradient it is said; losses may be summed up over fewer."""
    run = lt.workflow([(lt.train(model, [torch.ones(1)] * 100, square), 1)], max_epochs=1)
    list(run.take(32))

    with pytest.warns(UserWarning, match="train: nobody calls backward"):
        next(run)


def summed(model, sgd, batches):
    """The losses of three iterations, and one backward."""
    losses = []
    for state in lt.train(model, batches * 2, square):
        losses.append(state.loss)
        if len(losses) == 3:
            torch.stack(losses).mean().backward()
            sgd.step()
            losses.clear()


def differentiated(model, sgd, batches):
    """`torch.autograd.grad`, and an update each second iteration."""
    total = 0
    for state in lt.train(model, batches, square):
        total = total + torch.autograd.grad(state.loss, model.w)[0]
        if state.index % 2:
            with torch.no_grad():
                model.w -= 0.1 * total


def evolved(model, sgd, batches):
    """A plain function of the workflow moves the weights."""

    def evolve(run):
        with torch.no_grad():
            model.w.add_(1.0)

    lt.workflow([(lt.train(model, batches, square), 1), (evolve, 1)], max_epochs=2).to_end()


def unseen(model, sgd, batches):
    """`p.data` has a version counter of its own."""
    for state in lt.train(model, batches, square):
        model.zero_grad()
        state.loss.backward()
        model.w.data -= 0.1 * model.w.grad


def unseen_without_gradients(model, sgd, batches):
    """As in an evolution strategy."""
    for _ in lt.train(model, batches, square):
        model.w.data.add_(0.1)


def frozen(model, sgd, batches):
    """The inputs are trained, not the model."""
    model.requires_grad_(False)
    inputs = torch.ones(2, 1, requires_grad=True)
    for state in lt.train(model, batches, lambda model, batch: model(batch + inputs)):
        torch.autograd.grad(state.loss, inputs)


def lazy(model, sgd, batches):
    """A model whose parameters are made by its first batch."""
    model, optimizer = nn.Sequential(nn.LazyLinear(1)), None
    for state in lt.train(model, batches, lambda model, batch: model(batch).mean()):
        optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
        state.loss.backward()
        optimizer.step()


@pytest.mark.parametrize(
    "train", [summed, differentiated, evolved, unseen, unseen_without_gradients, frozen, lazy], ids=lambda f: f.__name__
)
def test_who_trains_in_a_way_of_his_own_is_not_told_that_nothing_is_trained(model, sgd, batches, train):
    """Warnings are errors here."""
    train(model, sgd, batches)


def test_a_phase_that_renews_batchnorm_of_a_model_that_another_one_trains(batches):
    """It is there for the buffers; alone it is told how to say so."""
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))
    step = lambda model, batch: model(batch).mean()  # noqa: E731
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    renew = lt.train(model, batches, step, name="renew")

    lt.workflow([(lt.train(model, batches, step) | lt.optimize(sgd), 1), (renew, 1)], max_epochs=2).to_end()
    by_hand = lt.workflow([(lt.train(model, batches, step), 1), (renew, 1)], max_epochs=2)
    for state in by_hand:
        if state.phase == "train":
            state.loss.backward()
            sgd.step()

    with pytest.warns(UserWarning, match=r"nobody calls backward.*BatchNorm, compute the loss under torch.no_grad"):
        renew.to_end()


def test_a_lazy_model_is_asked_in_its_second_pass(batches):
    """In the first one its weights are made."""
    run = lt.workflow(
        [(lt.train(nn.LazyLinear(1), batches, lambda model, batch: model(batch).mean()), 1)], max_epochs=2
    )
    list(run.take(4))

    with pytest.warns(UserWarning, match="nobody calls backward"):
        run.to_end()


def test_tensors_without_a_version_are_asked_as_well(model, batches):
    """Those that were made in inference mode have none."""
    with torch.inference_mode():
        model.register_buffer("table", torch.ones(1))

    with pytest.warns(UserWarning, match="nobody calls backward"):
        lt.train(model, batches, square).to_end()


def test_a_model_that_cannot_be_asked_stops_nothing(model, batches):
    """The question is dropped, not the training."""

    class odd(nn.Parameter):
        @property
        def grad(self):
            raise RuntimeError("no gradients here")

    model.odd = odd(torch.ones(()))
    run = lt.workflow([(lt.train(model, batches, square), 1)], max_epochs=1)
    run.to_end()

    assert run.cursor.unsure is None


def test_the_question_leaves_nothing_behind(model, sgd, batches):
    """Its hook on optimizers goes with the answer, or with the run."""
    hooks = _global_optimizer_post_hooks
    gc.collect()
    before = len(hooks)
    run = lt.workflow([(lt.train(model, batches, square), 1)], max_epochs=1)
    held, state = run.cursor.unsure, next(run)
    assert len(hooks) == before + 1

    state.loss.backward()
    sgd.step()
    next(run)
    assert held is not None
    assert len(hooks) == before

    lt.workflow([(lt.train(model, batches, square), 1)], max_epochs=1).explain()
    gc.collect()
    assert len(hooks) == before
