"""The user's step: how it is called, and what it may return."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import looptools as lt


def one(phase):
    """The phase's first state."""
    return next(iter(phase))


def test_a_third_parameter_is_filled_by_its_name(model, batches):
    """`state` gets the State, `train_mode` (mmcv's batch_processor) whether the phase trains."""
    seen = []

    def with_state(model, batch, state):
        seen.append(state.index)
        return model(batch)

    def batch_processor(model, data, train_mode):
        seen.append(train_mode)
        return {"loss": model(data), "log_vars": {"mine": 1.5}, "num_samples": 7}

    one(lt.train(model, batches, with_state))
    one(lt.train(model, batches, batch_processor))
    state = one(lt.validate(model, batches, batch_processor))

    assert seen == [0, True, False]
    assert (state.metrics["mine"], state.metrics["loss"].item(), state.num_samples) == (1.5, 3.0, 7)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda model, batch, epoch: 0, "the third parameter of lambda must be named state or train_mode, got 'epoch'"),
        (lambda model: 0, r"lambda must take \(model, batch\), but takes \(model\)"),
        (3, r"step must be a function step\(model, batch\), got 3"),
    ],
)
def test_a_step_of_another_form_is_refused_where_it_is_typed(model, batches, step, message):
    """Before anything runs."""
    with pytest.raises(TypeError, match=message):
        lt.train(model, batches, step)


def test_further_arguments_are_bound_by_keyword(model, batches):
    """functools.partial, callable objects and bound methods are steps like any other."""

    def scaled(model, batch, *, factor):
        return factor * model(batch)

    class Task:
        def step(self, model, batch):
            return model(batch)

        __call__ = step

    for step in (functools.partial(scaled, factor=1), Task(), Task().step):
        assert one(lt.train(model, batches, step)).loss.item() == 3.0


class Old(nn.Module):
    """A model with mmcv's own steps."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(3.0))
        self.seen = []

    def train_step(self, data, optimizer, **options):
        self.seen.append(("train", optimizer))
        return {"loss": self.w * data.mean(), "log_vars": {"loss": 3.0, "extra": 1}, "num_samples": 2}

    def val_step(self, data, optimizer=None):
        self.seen.append(("val", optimizer))
        return {"log_vars": {"score": 0.5}, "num_samples": 2}


def test_models_with_their_own_steps_work_as_they_are(batches):
    """`train_step(data, optimizer)` and `val_step` are called, and log_vars is what is logged."""
    model = Old()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    run = lt.workflow(
        [(lt.train(model, batches) | lt.optimize(sgd), 1), (lt.validate(model, batches[:1]), 1)], max_epochs=1
    )

    assert run.to_end() == {"train/loss": 3.0, "train/extra": 1.0, "val/score": 0.5}
    assert model.seen == [("train", sgd)] * 3 + [("val", sgd)]
    assert model.w.item() == 3 - 1 - 2 - 3


def test_a_model_without_a_step_says_what_to_give(model, batches):
    """`lt.train(model, loader)` needs a train_step."""
    with pytest.raises(TypeError, match=r"give a step, a function step\(model, batch\).* Weight has no train_step"):
        lt.train(model, batches)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, r"the step returned NoneType in iteration 0 of train. Return the loss"),
        ((1, 2), "the step returned tuple"),
        (0.5, "the step returned float"),
        (torch.ones(2), r"must be a tensor of one element, got shape \(2,\). Average it with .mean\(\)"),
        ({"loss": 0.5}, "must be a tensor of one element, got float"),
        ({"loss": torch.ones(()), "num_samples": torch.tensor(2)}, "num_samples must be an int"),
    ],
)
def test_a_result_that_is_neither_a_loss_nor_a_mapping_is_refused(model, batches, result, message):
    """The error names phase and iteration."""
    with pytest.raises(TypeError, match=message):
        one(lt.train(model, batches, lambda model, batch: result))


def test_a_training_step_without_a_loss_is_refused_by_backward(model, sgd, batches):
    """A mapping need not have one, but then there is nothing to differentiate."""
    with pytest.raises(TypeError, match="backward: the step of iteration 0 of train gave no loss"):
        one(lt.train(model, batches, lambda model, batch: {"x": 1.0}) | lt.optimize(sgd))


def test_metrics_are_the_scalars_without_graph(model, batches):
    """Numbers and tensors of shape (), and a loss of shape (1,); one-sample logits and the like stay in outputs."""
    step = lambda model, batch: {"loss": model(batch).reshape(1), "x": torch.ones(()), "n": 3, "one": torch.ones(1)}  # noqa: E731

    state = one(lt.train(model, batches, step))

    assert set(state.metrics) == {"loss", "x", "n"}
    assert (state.metrics["loss"].shape, state.metrics["loss"].requires_grad, state.loss.requires_grad) == (
        (),
        False,
        True,
    )
    assert set(state.outputs) == {"loss", "x", "n", "one"}


# The loss of the same batch once more


def test_recompute_draws_anew_and_changes_nothing_on_the_state():
    """Dropout draws fresh numbers, the weights are those of now, and the state stays as forward left it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5))
    state = one(lt.train(net, [torch.ones(2, 4)], lambda model, batch: {"loss": model(batch).sum(), "extra": 1.0}))
    before = state.loss, state.outputs, dict(state.metrics), state.num_samples

    loss = state.forwarded.recompute(state)

    assert loss.requires_grad
    assert not torch.equal(loss, state.loss)
    assert (state.loss, state.outputs, state.metrics, state.num_samples) == before


@pytest.mark.parametrize("kind", ["train", "validate"])
def test_recompute_is_in_the_phases_modes(kind):
    """Train or eval, gradients or none, the same autocast; also where the caller has switched gradients off."""
    seen = []

    def step(model, batch):
        seen.append((model.training, torch.is_grad_enabled(), model(batch).dtype))
        return model(batch).float().mean()

    net = nn.Linear(2, 2)
    state = one(getattr(lt, kind)(net, [torch.ones(1, 2)], step, autocast="bfloat16"))
    net.train(kind != "train")
    with torch.no_grad():
        state.forwarded.recompute(state)

    assert seen == [(kind == "train", kind == "train", torch.bfloat16)] * 2
    assert torch.is_grad_enabled()


def test_recompute_needs_a_loss(model, batches):
    """A step that gave one before and gives none now is named."""
    results = iter([model(batches[0]), {"x": 1}])
    state = one(lt.train(model, batches, lambda model, batch: next(results)))

    with pytest.raises(TypeError, match="forward: the loss of iteration 0 of train was to be computed again, but"):
        state.forwarded.recompute(state)
