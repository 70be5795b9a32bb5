"""Momentum, iteration by iteration."""

from __future__ import annotations

import pytest
import torch
from loops import Case, assert_same, classify

import looptools as lt


def momenta(run, optimizer):
    group = optimizer.param_groups[0]
    return [round(group["betas"][0] if "betas" in group else group["momentum"], 6) for state in run if state.trains]


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_one_cycle_is_torchs_to_the_bit(name):
    """Rate and momentum (or the first beta): a training under OneCycleLR, stepped by hand after each update."""
    model, optimizer, train, _ = Case(optimizer=name).make()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=2 * len(train))
    model.train()
    for _ in range(2):
        for batch in train:
            optimizer.zero_grad()
            classify(model, batch)["loss"].backward()
            optimizer.step()
            if scheduler.last_epoch + 1 < 2 * len(train):
                scheduler.step()
    by_hand = model.state_dict()

    model, optimizer, train, _ = Case(optimizer=name).make()
    phase = lt.train(model, train, classify) | lt.schedule_lr(optimizer, lt.schedules.one_cycle(0.1))
    phase = phase | lt.schedule_momentum(optimizer, lt.schedules.one_cycle_momentum()) | lt.optimize(optimizer)
    lt.workflow([(phase, 1)], max_epochs=2).to_end()

    assert_same(model.state_dict(), by_hand)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop])
def test_a_warm_up_divides_a_momentum(model, batches, kind):
    """So that it begins high: 0.76 / 0.95 = 0.8, then half way, then 0.76."""
    optimizer = kind(model.parameters(), lr=0.1, momentum=0.76)
    part = lt.schedule_momentum(optimizer, lt.schedules.constant(), warmup=2)
    phase = lt.train(model, batches, lambda model, batch: model(batch)) | part | lt.optimize(optimizer)

    assert momenta(phase, optimizer) == [0.8, round(0.76 / 0.975, 6), 0.76]


def test_betas_stay_a_tuple_and_keep_the_others(model, batches):
    """Only the first changes; its base is noted in the group."""
    adam = torch.optim.Adam(model.parameters(), betas=(0.8, 0.99))
    part = lt.schedule_momentum(adam, lt.schedules.linear(end=0.5))
    list(lt.train(model, batches, lambda model, batch: model(batch)) | part | lt.optimize(adam))

    group = adam.param_groups[0]
    assert group["betas"] == (pytest.approx(0.6), 0.99)
    assert group["initial_momentum"] == 0.8


@pytest.mark.parametrize(
    ("optimizer", "schedule", "warmup", "message"),
    [
        (torch.optim.SGD, lt.schedules.constant(), lt.schedules.warmup(5), "would be 9 at update 0. A warm-up divides"),
        (torch.optim.Adam, lt.schedules.constant(), lt.schedules.warmup(5, ratio=0.9), "would be 1 at update 0"),
        (torch.optim.SGD, lt.schedules.cyclic(1.2, 1.0, rising=0.5, anneal="linear"), 0, "would be 1.02 at update 2"),
    ],
)
def test_a_momentum_past_one_is_refused_when_the_run_is_built(model, batches, optimizer, schedule, warmup, message):
    """mmcv went on with it. A momentum of just 1 is borne by SGD; Adam would divide by 0."""
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    optimizer = optimizer(model.parameters(), lr=0.1, **options)
    part = lt.schedule_momentum(optimizer, schedule, warmup=warmup)
    phase = lt.train(model, batches * 2, lambda model, batch: model(batch)) | part | lt.optimize(optimizer)
    run = iter(phase)

    with pytest.raises(ValueError, match=f"schedule_momentum: the momentum {message}"):
        next(run)
    assert run.progress.iteration == 0


def test_a_momentum_past_one_that_could_not_be_foreseen_is_refused_when_it_comes(model, batches):
    """Where the length of the run is not known, or a hand has scaled it."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    part = lt.schedule_momentum(sgd, lambda done, total, base: base * (1 + done))
    source = lambda: iter(batches)  # noqa: E731
    run = iter(lt.train(model, source, lambda model, batch: model(batch)) | part | lt.optimize(sgd))

    next(run)
    with pytest.raises(ValueError, match="the momentum would be 1.8 at update 1"):
        next(run)
