"""No part waits for the device more often than the same loop by hand; what must decide on the host says so."""

from __future__ import annotations

import copy

import pytest
import torch
from loops import classify, device_reads, loader, network
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import looptools as lt

ITERATIONS = 5


def make():
    torch.manual_seed(0)
    model = network()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def average_of(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


def reads_of(build):
    """Names of the reads of some iterations in the middle of a pass, between two rows of the log."""
    model, optimizer = make()
    batches = list(loader(shuffle=False))
    phase, parts = build(model, optimizer, lt.train(model, batches, classify))
    run = lt.workflow([(phase, 1)], max_epochs=2)
    for part in parts:
        run = run | part
    next(run)
    with device_reads() as reads:
        list(run.take(ITERATIONS))
    return reads


def everything(model, optimizer, phase, folder):
    """A pipe of all parts that have nothing to decide on the host."""
    params = list(model.parameters())
    phase = (
        phase
        | lt.freeze("0", until=2)
        | lt.schedule_lr(optimizer, lt.schedules.one_cycle(), warmup=3)
        | lt.schedule_momentum(optimizer, lt.schedules.one_cycle_momentum())
        | lt.schedule(optimizer, "weight_decay", lt.schedules.linear(end=0.0))
        | lt.backward(optimizer, accumulate=2, across_epochs=True, weigh=lambda state: (state.batch[1] >= 0).sum())
        | lt.unused_params(model)
        | lt.grad_noise(params)
        | lt.watch(model, every=2)
        | lt.clip_grad_value(params, 1.0)
        | lt.clip_grad_norm(params, 1.0, norm_type=float("inf"))
        | lt.update(optimizer)
        | lt.measure({"mean": torch.mean}, lambda state: state.outputs["accuracy"])
        | lt.average(window=3)
    )
    best = lt.highest("train/accuracy")
    run_parts = [
        lt.leak_guard(),
        lt.timer(),
        lt.memory(every=1),
        lt.log(folder, every=100, line=None, csv=True),
        lt.checkpoint(folder, best=best),
        lt.early_stop(best),
        lt.stop_after(lt.target("train/accuracy", at_least=2.0)),
    ]
    return phase, run_parts


def test_a_pipe_of_nearly_everything_reads_nothing_between_two_rows(tmp_path):
    """The loop by hand that does all this without looking reads nothing either."""
    assert reads_of(lambda model, optimizer, phase: everything(model, optimizer, phase, tmp_path)) == []


def test_reads_are_found():
    """The test above can fail."""

    def looks(states):
        for state in states:
            if state.loss > 1e9:
                raise ValueError
            yield state

    assert reads_of(lambda model, optimizer, phase: (phase | looks, [lt.log(line=None)])) == ["__bool__"] * ITERATIONS


def test_an_average_of_weights_reads_what_torchs_own_does():
    """AveragedModel looks at its counter by itself, with the part and without."""
    model, optimizer = make()
    averaged = average_of(model)
    averaged.update_parameters(model)
    with device_reads() as by_hand:
        averaged.update_parameters(model)

    reads = reads_of(lambda model, opt, phase: (phase | lt.optimize(opt) | lt.ema(average_of(model)), []))

    assert reads == by_hand * ITERATIONS


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_scaler_reads_what_torchs_own_does(accumulate):
    """Once for each update."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    reads = reads_of(lambda model, opt, phase: (phase | lt.optimize(opt, scaler=scaler, accumulate=accumulate), []))

    assert len(reads) <= -(-ITERATIONS // accumulate)


def test_lbfgs_reads_what_torchs_own_does():
    """The part adds nothing to what LBFGS asks."""
    model, _ = make()
    twin = copy.deepcopy(model)
    batch = next(iter(loader(shuffle=False)))
    options = {"max_iter": 3}
    lbfgs, by_hand = torch.optim.LBFGS(model.parameters(), **options), torch.optim.LBFGS(twin.parameters(), **options)

    def closure():
        by_hand.zero_grad()
        loss = classify(twin, batch)["loss"]
        loss.backward()
        return loss

    torch.manual_seed(1)
    with device_reads() as expected:
        by_hand.step(closure)
    run = iter(lt.train(model, [batch] * 2, classify) | lt.optimize(lbfgs))
    torch.manual_seed(1)
    with device_reads() as reads:
        next(run)

    assert len(expected) > 0
    assert reads == expected
