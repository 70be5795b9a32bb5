"""A try on a few batches, and everything put back."""

from __future__ import annotations

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
