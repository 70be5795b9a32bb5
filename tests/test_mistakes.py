"""What a newcomer types, and what is answered: the error says what to do."""

from __future__ import annotations

import gc
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import looptools as lt


def classify(model, batch):
    images, labels = batch
    return {"loss": F.cross_entropy(model(images), labels)}


def with_backward(model, batch):
    loss = classify(model, batch)["loss"]
    loss.backward()
    return loss


@pytest.fixture
def n():
    """The names that a newcomer's script has: n.model, n.optimizer, n.loader, n.train, n.val."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.randn(12, 3), torch.randint(0, 2, (12,))), 4)
    train, val = lt.train(model, loader, classify), lt.validate(model, loader, classify)
    return SimpleNamespace(model=model, optimizer=optimizer, loader=loader, train=train, val=val)


def run_of(n, **bounds):
    return lt.workflow([(n.train | lt.optimize(n.optimizer), 1)], **(bounds or {"max_epochs": 1}))


def trained_with(n, step):
    return (lt.train(n.model, n.loader, step) | lt.optimize(n.optimizer)).to_end()


# The ten


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        (lambda run: run.take(3), r"run.take\(3\) was never iterated.* Write `for state in run.take\(3\)` or list\("),
        (lambda run: run.stages(), r"run.stages\(\) was never iterated.* `for name, state in run.stages\(\)`"),
    ],
)
def test_a_loop_never_iterated(n, typed, answer):
    """As a statement it does nothing, which Python says of coroutines too."""
    run = run_of(n)

    with pytest.warns(RuntimeWarning, match=answer):
        typed(run)

    assert run.state is None


def test_results_of_a_run_that_was_never_iterated(n):
    """A run does nothing by itself."""
    with pytest.raises(KeyError, match=r"the run has not begun.* next\(run\), for state in run, or run.to_end\(\)"):
        run_of(n).results["train/loss"]


def test_a_spent_run(n):
    """A cell with a loop is run again."""
    run = run_of(n)
    for _ in run:
        pass

    with pytest.raises(RuntimeError, match=r"it is over \(finished: 1 epoch, 3 .*run.reset\(\).* run.extend\("):
        for _ in run:
            pass


@pytest.mark.parametrize(
    "spent", [lambda n: (b for b in n.loader), lambda n: iter(n.loader)], ids=["generator", "iter"]
)
def test_a_spent_source(n, spent):
    """A generator, or the loader's iterator, for more than one pass."""
    phase = lt.train(n.model, spent(n), classify) | lt.optimize(n.optimizer)

    with pytest.raises(ValueError, match=r"spent after one pass, and .* a function that makes it anew \(lambda: ...\)"):
        lt.workflow([(phase, 1)], max_epochs=2).to_end()


def test_parts_in_the_wrong_order(n):
    """Clipping behind the update; tests/test_order.py has all the others."""
    pipe = n.train | lt.optimize(n.optimizer) | lt.clip_grad_norm(n.model.parameters(), 1.0)

    with pytest.raises(ValueError, match="clip_grad_norm stands behind train/update.* Put it between backward and"):
        pipe.to_end()


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        (lambda n: n.train | lt.optimize, r"optimize takes options. Call it first: optimize\(...\)"),
        (
            lambda n: lt.workflow([(n.train, 1)], max_epochs=1) | lt.log,
            r"log is a class. Give it its options first: log",
        ),
        (lambda n: (n.train | every_other).to_end(), r"returned a function.* call it first: every_other\(...\)"),
        (lambda n: n.train | lt.schedule_lr(n.optimizer, lt.schedules.cosine), r"first: lt.schedules.cosine\(\)"),
    ],
    ids=["recipe", "class", "own", "schedule"],
)
def test_a_middleware_not_called(n, typed, answer):
    """Its options are missing."""
    with pytest.raises(TypeError, match=answer):
        typed(n)


def every_other(start=0):
    def middleware(states):
        for state in states:
            if state.index % 2 == start:
                yield state

    return middleware


def frozen(model, batch):
    with torch.no_grad():
        return classify(model, batch)


def backward_of_detached(model, batch):
    classify(model, batch)["loss"].detach().backward()


@pytest.mark.parametrize(
    ("step", "answer"),
    [
        (
            frozen,
            r"backward: the loss of iteration 0 of train has no graph. Was it detached, or computed under no_grad",
        ),
        (backward_of_detached, r"does not require grad(.|\n)*The loss was cut off.* leave that to lt.optimize"),
    ],
    ids=["no_grad", "own backward"],
)
def test_a_loss_without_a_graph(n, step, answer):
    """Nothing can be trained by it."""
    with pytest.raises(RuntimeError, match=answer):  # notes are part of what is matched
        trained_with(n, step)


def test_a_loader_without_length_under_a_schedule_that_needs_one(n):
    """Said when the run is built, with the two ways out."""
    phase = lt.train(n.model, lambda: iter(n.loader), classify)
    pipe = phase | lt.schedule_lr(n.optimizer, lt.schedules.cosine()) | lt.optimize(n.optimizer)

    with pytest.raises(
        ValueError, match=r"source has no length. Bound the run with max_iterations=, or .*iterations\("
    ):
        pipe.to_end()


def test_batch_and_model_on_different_devices(n):
    """The note says where both are, and who moves batches."""
    model = nn.Linear(3, 2, device="meta")

    with pytest.raises(RuntimeError, match='(?s)model: Linear, float32 on meta.* float32 on cpu.*device="model"'):
        lt.train(model, n.loader, classify).to_end()


def test_a_forgotten_optimizer(n):
    """Losses that never fall are found out late."""
    run = lt.workflow([(n.train, 1), (n.val, 1)], max_epochs=2)

    with pytest.warns(UserWarning, match="train: nobody calls backward.* Pipe lt.optimize\\(optimizer\\) on") as told:
        run.to_end()

    assert len(told) == 1  # once is enough


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("val/acc", r"known are train/loss, val/loss, val/accuracy. Did you mean .*'val/accuracy'"),
        ("accuracy", "Did you mean 'val/accuracy'"),
        ("banana", r"known are train/loss, val/loss, val/accuracy\.\"$"),
    ],
)
def test_an_unknown_metric_key(n, key, answer):
    """It lists what is known, the closest last."""
    judge = lambda model, batch: {**classify(model, batch), "accuracy": torch.ones(())}  # noqa: E731
    run = lt.workflow(
        [(n.train | lt.optimize(n.optimizer), 1), (lt.validate(n.model, n.loader, judge), 1)], max_epochs=1
    )

    with pytest.raises(KeyError, match=answer):
        run.to_end()[key]


def test_an_unknown_metric_for_the_best_checkpoint(n, tmp_path):
    """After the first round everybody has written."""
    run = run_of(n) | lt.checkpoint(tmp_path, best=lt.highest("val/acc"))

    with pytest.raises(LookupError, match='no part writes "val/acc"; known are train/loss'):
        run.to_end()


def test_the_same_part_twice(n):
    """A cell that pipes onto its own name is run again."""
    for _ in range(2):
        n.train = n.train | lt.optimize(n.optimizer)

    with pytest.raises(
        ValueError, match="train/backward and train/backward#2 .* If a cell .* ran twice, make the phase"
    ):
        n.train.to_end()


# And others


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        (
            lambda n: lt.train(n.loader, n.model, classify),
            r"source is a module. The model comes first: train\(model, so",
        ),
        (
            lambda n: lt.train(n.model, classify, n.loader),
            r"step must be a function step\(model, batch\), got <.*Loader",
        ),
        (
            lambda n: lt.train(n.model, n.loader, classify(n.model, next(iter(n.loader)))),
            "step must be a function step",
        ),
        (lambda n: lt.train(n.model, n.loader), "give a step.* Linear has no train_step"),
        (
            lambda n: lt.train(n.model, n.loader, lambda batch: batch),
            r"must take \(model, batch\), but takes \(batch\)",
        ),
        (lambda n: lt.train(n.model, DataLoader, classify), "source is the class DataLoader; give an instance"),
        (lambda n: n.train | lt.optimize(n.model), r"optimizer must be a torch.optim.Optimizer, got Linear.* Make one"),
        (lambda n: n.train | lt.optimize(n.model.parameters()), "must be a torch.optim.Optimizer, got <generator"),
        (lambda n: n.train | n.optimizer, r"got a SGD. Write lt.optimize\(optimizer\)"),
        (lambda n: n.train | n.val, "a middleware is a callable that takes a stream of states, got a Phase"),
        (lambda n: n.train | lt.schedule_lr(lt.schedules.cosine(), n.optimizer), "optimizer must be a torch.optim.Opt"),
        (lambda n: lt.workflow([n.train, n.val], max_epochs=1), r"a phase without a count. Write \(train, 1\)"),
        (lambda n: lt.workflow(n.train, max_epochs=1), r"give a list of pairs \(phase, n\)"),
        (lambda n: lt.workflow([(n.train, 0.5)], max_epochs=1), "number of passes must be a whole number, got 0.5"),
        (
            lambda n: next(iter(n.train | lt.log())),
            r"log: pipe it onto the run, not onto a phase: lt.workflow\(...\) \|",
        ),
        (lambda n: lt.checkpoint("runs", best="val/accuracy"), r'best must be lt.highest\("val/accuracy"\)'),
        (
            lambda n: (n.train | n.model).to_end(),
            "(?s)train/Linear could not be called on a stream of states.*yield state",
        ),
    ],
)
def test_swapped_and_misplaced_arguments(n, typed, answer):
    """Most are refused where they are typed."""
    with pytest.raises(TypeError, match=answer):
        typed(n)


@pytest.mark.parametrize(
    ("step", "answer"),
    [
        (lambda model, batch: None, 'the step returned NoneType .* Return the loss, .* or a mapping with "loss"'),
        (lambda model, batch: classify(model, batch)["loss"].item(), "the step returned float in iteration 0"),
        (
            lambda model, batch: {"loss": classify(model, batch)["loss"].item()},
            r"got float.* do not call .item\(\) on it",
        ),
        (lambda model, batch: {"loss": np.float32(1)}, "a tensor of one element, got float32"),
        (lambda model, batch: np.ones(()), "the step returned ndarray"),
        (lambda model, batch: (classify(model, batch)["loss"], 0.5), "the step returned tuple"),
        (
            lambda model, batch: model(batch[0]),
            r"must be a tensor of one element, got shape \(4, 2\). Average it with .mean",
        ),
        (
            lambda model, batch: {"Loss": classify(model, batch)["loss"]},
            "gave no loss, but Loss. Return it, or a mapping",
        ),
        (
            lambda model, batch: model(batch).mean(),
            r"(?s)must be Tensor, not list.*batch: list of \(4, 3\) float32 on cpu, \(",
        ),
    ],
    ids=["no return", "item", "item in dict", "numpy in dict", "numpy", "tuple", "not reduced", "Loss", "model(batch)"],
)
def test_what_a_step_returns(n, step, answer):
    """The step gives the loss, a tensor."""
    with pytest.raises(TypeError, match=answer):
        trained_with(n, step)


def test_a_key_that_the_batch_has_not(n):
    """The note says which it has."""
    step = lambda model, batch: F.cross_entropy(model(batch["image"]), batch["labels"])  # noqa: E731
    batches = [{"image": torch.ones(4, 3), "label": torch.zeros(4).long()}]

    with pytest.raises(
        KeyError, match=r"(?s)labels.*dict of image: \(4, 3\) float32 on cpu, label: \(4,\) int64 on cpu"
    ):
        lt.train(n.model, batches, step).to_end()


def test_a_step_that_calls_backward_itself(n):
    """lt.optimize would call it a second time."""
    with pytest.raises(
        RuntimeError, match=r"(?s)second time.*Does the step call backward itself\? Leave that to lt.optim"
    ):
        trained_with(n, with_backward)


def test_a_step_that_calls_backward_and_an_update(n):
    """`update` waits for `backward` to say when, so nothing would ever move."""
    phase = lt.train(n.model, n.loader, with_backward) | lt.update(n.optimizer)

    with pytest.warns(UserWarning, match="no weight has moved.* Leave backward out of the step, and pipe lt.optimize"):
        phase.to_end()


def test_backward_without_an_update(n):
    """Gradients alone change nothing."""
    with pytest.warns(
        UserWarning, match=r"there are gradients, but no weight has moved. Pipe lt.update\(optimizer\) on"
    ):
        (n.train | lt.backward(n.optimizer)).to_end()


def test_a_validation_with_an_optimizer(n):
    """Its step runs without gradients."""
    with pytest.raises(ValueError, match="backward: val is a validation phase.* onto the training phase"):
        (n.val | lt.optimize(n.optimizer)).to_end()


def test_optimize_on_the_run(n):
    """It would come behind the validation too."""
    run = lt.workflow([(n.train, 1), (n.val, 1)], max_epochs=1) | lt.optimize(n.optimizer)

    with pytest.raises(ValueError, match="backward: piped onto the run, it comes behind val too"):
        next(run)


def test_the_optimizer_of_another_model(n):
    """The model was made anew, the optimizer was not."""
    n.train = lt.train(nn.Linear(3, 2), n.loader, classify)

    with pytest.raises(ValueError, match="moves 2 parameters that no model of the run holds"):
        (n.train | lt.optimize(n.optimizer)).to_end()


def test_frozen_weights(n):
    """Every weight was frozen for a test, and not thawed."""
    n.model.requires_grad_(False)

    with pytest.raises(RuntimeError, match="has no graph"):
        trained_with(n, classify)


def test_two_optimizers_over_one_loss(n):
    """The graph is gone after the first; the note has the ways out."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    first, second = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model)
    train = lt.train(model, n.loader, classify)

    with pytest.raises(
        RuntimeError, match="(?s)second time.*one loss.*lt.forward.*or give both optimizers one backward"
    ):
        (train | lt.optimize(first) | lt.optimize(second)).to_end()
    with pytest.warns(UserWarning, match="nobody zeroes the gradients that train/update#2 moves by"):
        next(iter(train | lt.optimize(first) | lt.update(second)))


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        (lambda n: lt.workflow([(n.train, 1)]), "it would never end. Give max_epochs="),
        (lambda n: lt.train(n.model, [], classify).to_end(), "its source is empty"),
        (lambda n: lt.log(every=0), "n must be at least 1, got 0"),
        (
            lambda n: n.train | lt.optimize(n.optimizer, max_norm=0.0),
            "max_norm must be positive.* drop this middleware",
        ),
    ],
)
def test_values_that_cannot_be(n, typed, answer):
    """Refused where they are typed, or before the first iteration."""
    with pytest.raises(ValueError, match=answer):
        typed(n)


def test_piping_onto_a_started_run(n):
    """What has begun is mended with `replace`."""
    run = run_of(n)
    next(run)

    with pytest.raises(RuntimeError, match="built already. Pipe first, or use run.insert"):
        run | lt.log()


def test_a_misspelt_field_of_the_state(n):
    """States have slots."""
    with pytest.raises(AttributeError, match="State has no 'los'"):
        _ = next(run_of(n)).los


@pytest.mark.parametrize(
    ("part", "answer"),
    [
        (lambda states: None, "returned None, not an iterator of states. Does it `yield state`"),
        (lambda state: print(state.loss), "(?s)could not be called on a stream of states.*for state in states"),
    ],
)
def test_a_part_that_is_no_generator(n, part, answer):
    """It was written for one state."""
    with pytest.raises((TypeError, AttributeError), match=answer):
        (n.train | part).to_end()


# No alarm where nothing is wrong


def steps_by_itself(optimizer):
    def step(model, batch):
        optimizer.zero_grad()
        loss = with_backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def test_a_step_that_trains_by_itself_is_left_alone(n):
    """Warnings are errors here."""
    lt.train(n.model, n.loader, steps_by_itself(n.optimizer)).to_end()


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_a_loop_whose_body_trains_is_left_alone(n, every, fused):
    """`for state in train` with backward and step in the body, also every second time, and with a fused optimizer."""
    optimizer = torch.optim.SGD(n.model.parameters(), lr=0.1, fused=fused)
    for state in n.train.limit(2):
        state.loss.backward()
        if (state.index + 1) % every == 0:
            optimizer.step()
            optimizer.zero_grad()


def test_a_body_that_moves_weights_by_hand_is_left_alone(n):
    """No optimizer at all."""
    for state in n.train:
        gradients = torch.autograd.grad(state.loss, list(n.model.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(n.model.parameters(), gradients, strict=True):
                weight -= 0.1 * gradient


def test_a_part_of_the_users_own_that_trains_is_left_alone(n):
    """Who knows what it does."""

    def my_part(states):
        yield from states

    (n.train | my_part).to_end()


def test_a_phase_without_a_loss_that_could_train_is_left_alone(n):
    """A pass in train mode that only measures, as to renew BatchNorm's statistics."""
    lt.train(n.model, n.loader, frozen).to_end()


def test_stale_gradients_do_not_hide_a_forgotten_optimizer(n):
    """They are left over from what the cell before did."""
    classify(n.model, next(iter(n.loader)))["loss"].backward()

    with pytest.warns(UserWarning, match="nobody calls backward"):
        n.train.to_end()


def test_a_run_that_was_resumed_at_its_end_is_silent(n, tmp_path):
    """A script that is run a second time has nothing to do."""
    for _ in range(2):
        run = run_of(n) | lt.checkpoint(tmp_path)
        run.resume()
        for _ in run:
            pass

    assert run.resumed
    assert run.to_end().keys() == {"train/loss"}


def test_a_loop_that_was_left_early_is_silent(n):
    """It was iterated."""
    run = run_of(n)
    for _ in run.take(2):
        break
    for _ in run.stages():
        break
    next(run.take(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gc.collect()
