"""A try on a few batches, and everything put back."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch.utils.data import DataLoader

import looptools as lt


@pytest.fixture
def run(model, sgd, batches):
    step = lambda model, batch: model(batch)  # noqa: E731
    train = lt.train(model, batches, step) | lt.optimize(sgd, max_norm=0.5)
    return lt.workflow([(train, 1), (lt.validate(model, batches[:1], step), 1)], max_epochs=2) | lt.log(line=None)


def test_rehearse_puts_everything_back(tmp_path):
    """Weights, buffers, gradients, optimizer, modes, generators and folders are as before."""
    from loops import Case, piped

    run = (
        piped(Case(optimizer="AdamW", cosine=True)) | lt.log(tmp_path / "a", line=None) | lt.checkpoint(tmp_path / "a")
    )
    model, optimizer = run.model, run.optimizer or run.cursor and run.optimizer
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    generators = torch.get_rng_state()

    results = run.rehearse(2)

    assert set(results) == {"train/loss", "train/accuracy", "val/loss", "val/accuracy"}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert (optimizer.state_dict()["state"], "initial_lr" in optimizer.param_groups[0]) == ({}, False)
    assert (model.training, model[1].training) == (True, False)
    assert torch.equal(torch.get_rng_state(), generators)
    assert list((tmp_path / "a").iterdir()) == []
    assert run.progress.iteration == 0
    assert len(list(run)) == 28


def test_rehearse_refuses_to_use_up_a_generator(batches):
    """A one-shot source would be spent."""
    run = lt.workflow([(lt.train(None, iter(batches), lambda model, batch: batch), 1)], max_epochs=1)

    with pytest.raises(RuntimeError, match="the source of train can be walked through only once"):
        run.rehearse()


def test_gradients_come_back_as_the_tensors_they_were(run, model):
    """Somebody else may hold them; and the rehearsal adds nothing to them."""
    list(run.take(3))
    grad = model.w.grad
    value = grad.clone()

    run.rehearse()

    assert model.w.grad is grad
    assert torch.equal(grad, value)


@pytest.mark.skipif(sys.platform == "win32", reason="spawned workers would import this module")
def test_a_pass_under_way_goes_on_with_the_workers_it_has():
    """A loader with persistent workers would begin anew for whoever asks it next."""
    from loops import Case, piped

    losses = []
    for rehearses in (False, True):
        run = piped(Case())
        source = run._agenda.phases[0].source
        loader = DataLoader(source.dataset, 4, shuffle=True, num_workers=1, persistent_workers=True)
        train = run._agenda.phases[0].on(loader)
        torch.manual_seed(1)
        run = lt.workflow([(train, 1)], max_epochs=2)
        list(run.take(10))
        if rehearses:
            run.rehearse(2)
        losses.append([state.metrics["loss"].item() for state in run])

    assert losses[0] == losses[1]


def test_what_was_replaced_is_rehearsed(model, sgd, batches, capsys):
    """The mended step, the replaced part, and those of the run."""
    step = lambda model, batch: model(batch)  # noqa: E731
    train = lt.train(model, batches, step) | lt.optimize(sgd, max_norm=0.5, name="D")
    run = lt.workflow([(train, 1)], max_epochs=2) | lt.log(line=None)
    next(run)
    run.replace("train/forward", lambda model, batch: {"loss": model(batch), "mended": 1.0})
    run.replace("log", lt.log(line=print))

    assert run.rehearse(1)["train/mended"] == 1.0
    assert capsys.readouterr().out.startswith("train  epoch 1/1  loss 2.5  mended 1")


def test_parts_of_a_phase_write_elsewhere_too(model, sgd, tmp_path):
    """Traces of a trial go to its temporary folder, wherever the part is piped."""
    train = lt.train(model, [torch.ones(2, 1)] * 4, lambda model, batch: model(batch)) | lt.optimize(sgd)
    profiled = lt.chain(lt.profile(tmp_path, wait=0, warmup=1, active=1, line=None), name="P")
    run = lt.workflow([(train | profiled, 1)], max_epochs=1)

    run.rehearse(3)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["NAdam", "ASGD", "LBFGS", "AdamW"])
def test_optimizers_come_back_to_the_bit_and_as_they_were_held(name, dtype):
    """State that is not of the weights' dtype, and the groups and tensors that somebody else may hold."""
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1).to(dtype)
    batches = [torch.randn(4, 2).to(dtype) for _ in range(3)]
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
    step = lambda model, batch: model(batch).float().pow(2).mean()  # noqa: E731
    run = lt.workflow([(lt.train(model, batches, step) | lt.optimize(optimizer), 1)], max_epochs=3)
    list(run.take(4))
    group = optimizer.param_groups[0]
    held = {key: value for kept in optimizer.state.values() for key, value in kept.items() if torch.is_tensor(value)}
    before = [copy.deepcopy(kept) for kept in optimizer.state.values()]

    run.rehearse(2)
    lt.lr_find(run, iterations=10)

    assert optimizer.param_groups[0] is group
    assert group["lr"] == 0.1
    assert str(before) == str(list(optimizer.state.values()))
    for old, kept in zip(before, optimizer.state.values(), strict=True):
        for key, value in kept.items():
            if torch.is_tensor(value):
                assert (value.dtype, torch.equal(value, old[key])) == (old[key].dtype, True)
    now = {id(value) for kept in optimizer.state.values() for value in kept.values()}
    assert all(id(value) in now for value in held.values())


def test_buffers_that_were_none_are_none_again(batches):
    """A layer may fill them in at its first batch."""

    class Fills(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(3.0))
            self.register_buffer("mean", None)

        def forward(self, batch):
            self.mean = batch.mean()
            return self.w * self.mean

    model = Fills()
    train = lt.train(model, batches, lambda model, batch: model(batch))
    run = lt.workflow([(train | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1)), 1)], max_epochs=1)

    run.rehearse()

    assert model.mean is None
    assert "mean" not in model.state_dict()


def test_weights_without_a_shape_yet_are_refused():
    """A lazy layer has nothing that could be put back."""
    model = torch.nn.LazyLinear(1)
    train = lt.train(model, [torch.ones(1, 2)], lambda model, batch: model(batch).mean())
    run = lt.workflow([(train | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1)), 1)], max_epochs=1)

    with pytest.raises(RuntimeError, match="rehearse: weights of train's model have no shape yet .* model.batch."):
        run.rehearse()
    with pytest.raises(RuntimeError, match="lr_find: weights of train's model have no shape yet"):
        lt.lr_find(run)
