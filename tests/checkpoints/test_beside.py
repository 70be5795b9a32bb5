"""Trainings in parts and steps of the user's own are saved whole, too; what cannot be seen is said."""

from __future__ import annotations

import warnings

import pytest
import torch
from loops import assert_same, classify, loader, network
from test_anywhere import check_resumes_anywhere
from torch import nn

import looptools as lt


def own(kind):
    """A training by a part of the user's own, which adds up three gradients for an update."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def train(states, optimizer):
        for state in states:
            (state.loss / 3).backward()
            if state.iteration % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
            yield state

    def by_closure(states):
        yield from train(states, optimizer)

    class by_attribute:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def __call__(self, states):
            yield from train(states, self.optimizer)

    part = by_closure if kind == "closure" else by_attribute(optimizer)
    return lt.workflow([(lt.train(model, loader(), classify) | part, 1)], max_epochs=2)


@pytest.mark.parametrize("kind", ["closure", "attribute"])
def test_an_optimizer_in_a_part_of_ones_own(tmp_path, kind):
    """It is found in closure or attribute, and the gradients that wait for its step are saved."""
    check_resumes_anywhere(lambda: own(kind), tmp_path)


def test_a_step_that_does_all_by_itself(tmp_path):
    """The step's own optimizer and a second model that it trains."""

    def make():
        torch.manual_seed(0)
        model, critic = network(), nn.Linear(2, 1)
        optimizer = torch.optim.Adam([*model.parameters(), *critic.parameters()], lr=0.01)

        def step(model, batch):
            loss = critic(model(batch[0])).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        return lt.workflow([(lt.train(model, loader(), step), 1)], max_epochs=2)

    check_resumes_anywhere(make, tmp_path, positions={1, 5, 9})


def test_an_optimizer_in_the_body_of_the_loop_is_said_once(tmp_path):
    """Nobody can find it again when the run is resumed."""
    torch.manual_seed(0)
    model = network()
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    run = lt.workflow([(lt.train(model, loader(), classify), 1)], max_epochs=1)
    for state in run.take(3):
        state.loss.backward()
        adam.step()

    with pytest.warns(UserWarning, match="Adam moves model, but no part of the run holds it, so its state is not"):
        run.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.save(tmp_path)


def test_the_plain_pipe_saves_no_gradients(tmp_path):
    """After an update they are only there to be looked at."""
    from loops import Case, piped

    run = piped(Case())
    next(run)
    tree = torch.load(run.save(tmp_path), weights_only=True)

    assert run.model[0].weight.grad is not None
    assert tree["gradients"] == {}
    assert_same(tree["weights"], run.model.state_dict())
