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
            "ReduceLROnPlateau waits for a metric",
        ),
        (lambda sgd, w: lt.schedules.multistep([3, 2]), ValueError, "milestones must be positive and increasing"),
        (lambda sgd, w: lt.schedules.cosine(0.1, end_ratio=0.1), ValueError, "give end or end_ratio, got both"),
        (lambda sgd, w: lt.average(window=0), ValueError, "average: window must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused_where_they_are_typed(model, sgd, make, error, message):
    """What is wrong, what was given, what to do."""
    with pytest.raises(error, match=message):
        make(sgd, model.w)
