"""Bad options are refused where they are typed."""

from __future__ import annotations

import pytest
import torch

import looptools as lt


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda sgd, w: lt.optimize(w), TypeError, "optimize: optimizer must be a torch.optim.Optimizer"),
        (
            lambda sgd, w: lt.optimize(sgd, max_norm=-1.0),
            ValueError,
            "clip_grad_norm: max_norm must be positive, got -1.0",
        ),
        (
            lambda sgd, w: lt.optimize(sgd, max_norm="1"),
            TypeError,
            "clip_grad_norm: max_norm must be a number, got '1'",
        ),
        (lambda sgd, w: lt.optimize(sgd, accumulate=0), ValueError, "backward: accumulate must be at least 1, got 0"),
        (lambda sgd, w: lt.optimize(sgd, accumulate=1.5), TypeError, "backward: accumulate must be a whole number"),
        (lambda sgd, w: lt.clip_grad_norm([], 1.0), TypeError, "clip_grad_norm: params must be tensors"),
        (lambda sgd, w: lt.update(torch.optim.LBFGS([w])), TypeError, "LBFGS evaluates the loss several times"),
        (lambda sgd, w: lt.schedule_lr(sgd, 0.1), TypeError, "schedule_lr: schedule must be one of lt.schedules"),
        (lambda sgd, w: lt.schedule_lr(sgd, lt.schedules.cosine), TypeError, "needs its options first"),
        (
            lambda sgd, w: lt.schedule_lr(sgd, lt.schedules.cosine(), by="step"),
            ValueError,
            "by must be one of 'update'",
        ),
        (lambda sgd, w: lt.schedule_lr(sgd, lt.schedules.cosine(), warmup=-1), ValueError, "count must be at least 0"),
        (
            lambda sgd, w: lt.schedule_lr(sgd, torch.optim.lr_scheduler.StepLR(torch.optim.SGD([w], lr=1), 1)),
            ValueError,
            "was made for another optimizer",
        ),
        (
            lambda sgd, w: lt.schedule_lr(sgd, torch.optim.lr_scheduler.ReduceLROnPlateau(sgd)),
            TypeError,
            r"ReduceLROnPlateau waits for a metric, .* Write lt.schedules.plateau\(lt.lowest",
        ),
        (
            lambda sgd, w: lt.schedule_lr(w, lt.schedules.cosine()),
            TypeError,
            "schedule_lr: optimizer must be a torch.optim.Optimizer",
        ),
        (
            lambda sgd, w: lt.schedule_lr(sgd, [lt.schedules.cosine()] * 2),
            ValueError,
            "schedule_lr: got 2 schedules for 1 param groups. Give one for all, or one for each",
        ),
        (
            lambda sgd, w: lt.schedule_lr(sgd, lt.schedules.cosine(), warmup=lt.rounds(1)),
            TypeError,
            r"schedule_lr: warmup must be a count, lt.epochs\(n\) or",
        ),
        (
            lambda sgd, w: lt.schedule_lr(sgd, torch.optim.lr_scheduler.StepLR(sgd, 1), warmup=5),
            ValueError,
            "schedule_lr: warmup goes with lt.schedules only. .* put a LinearLR before yours",
        ),
        (
            lambda sgd, w: lt.schedule(sgd, "weight_dekay", lt.schedules.cosine()),
            LookupError,
            "schedule: SGD has no option 'weight_dekay'; it has .*lr, momentum, weight_decay",
        ),
        (
            lambda sgd, w: lt.schedule(sgd, "nesterov", lt.schedules.cosine()),
            TypeError,
            "schedule: nesterov must be a number to be scheduled, but is False",
        ),
        (
            lambda sgd, w: lt.schedule_momentum(torch.optim.Adagrad([w]), lt.schedules.cosine()),
            LookupError,
            "schedule_momentum: Adagrad has no option 'momentum'; it has .*lr",
        ),
        (
            lambda sgd, w: lt.schedule_momentum(sgd, torch.optim.lr_scheduler.StepLR(sgd, 1)),
            TypeError,
            r"schedule_momentum: schedule must be one of lt.schedules, a torch scheduler \(for all learning rates\)",
        ),
        (lambda sgd, w: lt.schedules.multistep([3, 2]), ValueError, "milestones must be positive and increasing"),
        (
            lambda sgd, w: lt.schedules.multistep([2.5]),
            TypeError,
            "multistep: a milestone must be a whole number, got 2.5",
        ),
        (lambda sgd, w: lt.schedules.step(0), ValueError, "step: every must be at least 1, got 0"),
        (
            lambda sgd, w: lt.schedules.exponential(0.0),
            ValueError,
            r"gamma must be positive, .* use schedules.constant",
        ),
        (lambda sgd, w: lt.schedules.cosine(end=0.1, end_ratio=0.1), ValueError, "give end or end_ratio, got both"),
        (lambda sgd, w: lt.schedules.linear(end="0"), TypeError, "linear: end must be a number, got '0'"),
        (
            lambda sgd, w: lt.schedules.flat_cosine(75),
            ValueError,
            "flat_cosine: start must be at least 0 and at most 1",
        ),
        (lambda sgd, w: lt.schedules.cosine_restarts([]), ValueError, "cosine_restarts: periods must not be empty"),
        (lambda sgd, w: lt.schedules.cosine_restarts([2, 3], [1]), ValueError, "a weight for each of the 2 periods"),
        (
            lambda sgd, w: lt.schedules.one_cycle(rising=30),
            ValueError,
            "one_cycle: rising must be at least 0 and at most",
        ),
        (lambda sgd, w: lt.schedules.one_cycle(float("inf")), ValueError, "one_cycle: peak must be finite, got inf"),
        (
            lambda sgd, w: lt.schedules.one_cycle(rising=0.6, three_phase=True),
            ValueError,
            "with three_phase, rising must be at most 0.5, got 0.6",
        ),
        (lambda sgd, w: lt.schedules.cyclic(rising=1), ValueError, "cyclic: rising must be at least 0 and below 1"),
        (lambda sgd, w: lt.schedules.cyclic(anneal="cos"), ValueError, "anneal must be one of 'cosine', 'linear'"),
        (lambda sgd, w: lt.schedules.plateau("val/loss"), TypeError, r"plateau: best must be lt.lowest\("),
        (
            lambda sgd, w: lt.schedules.plateau(lt.lowest("val/loss"), factor=1.0),
            ValueError,
            "plateau: factor must be above 0 and below 1, got 1.0",
        ),
        (lambda sgd, w: lt.schedules.warmup(5, ratio=1.5), ValueError, "warmup: ratio must be above 0 and at most 1"),
        (lambda sgd, w: lt.average(window=0), ValueError, "average: window must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused_where_they_are_typed(model, sgd, make, error, message):
    """What is wrong, what was given, what to do."""
    with pytest.raises(error, match=message):
        make(sgd, model.w)


def test_several_optimizers_where_one_is_wanted_are_told_so(sgd):
    """Not by printing both."""
    with pytest.raises(TypeError, match=r"optimizer must be one optimizer, got 2. Pipe on one for each.$"):
        lt.schedule_lr([sgd, sgd], lt.schedules.cosine())
