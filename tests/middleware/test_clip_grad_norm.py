"""Clipping."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import looptools as lt


def phase_of(model, batches, *parts):
    phase = lt.train(model, batches, lambda model, batch: model(batch))
    for part in parts:
        phase = phase | part
    return phase


def test_grad_norm_is_measured_before_clipping(model, sgd, batches):
    """The update obeys max_norm, and grad_norm reports what was clipped."""
    state = next(iter(phase_of(model, batches[1:], lt.optimize(sgd, max_norm=1.0))))

    assert state.grad_norm == 2.0
    assert model.w.item() == pytest.approx(2.0)


def test_norm_types(model, sgd, batches):
    """Any order; inf for the largest element."""
    pair = nn.ParameterList([nn.Parameter(torch.zeros(2))])
    optimizer = torch.optim.SGD(pair.parameters(), lr=1.0)
    step = lambda model, batch: (model[0] * torch.tensor([3.0, 4.0])).sum()  # noqa: E731

    for norm_type, norm in [(2.0, 5.0), (1.0, 7.0), (math.inf, 4.0)]:
        part = lt.optimize(optimizer, max_norm=100.0, norm_type=norm_type)
        assert next(iter(lt.train(pair, [1], step) | part)).grad_norm.item() == pytest.approx(norm)


def test_infinity_measures_without_clipping(model, sgd, batches):
    """`max_norm=inf` leaves the gradients alone."""
    run = iter(phase_of(model, batches, lt.optimize(sgd, max_norm=math.inf)))

    assert [state.grad_norm.item() for state in run] == [1.0, 2.0, 3.0]
    assert model.w.item() == 3 - 1 - 2 - 3
