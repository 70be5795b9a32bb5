"""Where torch has a schedule of the same formula, the figures are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import looptools as lt

bases = st.floats(1e-5, 10.0)
gammas = st.floats(0.5, 1.0)
totals = st.integers(1, 60)
few = settings(max_examples=40, deadline=None)


def by_torch(make: Callable[..., Any], base: float, steps: int, **options: Any) -> list[dict[str, Any]]:
    """The param group at each of *steps* steps under one of torch's schedulers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=base, momentum=0.9)
    scheduler = make(optimizer, **options)
    rows = []
    for step in range(steps):
        rows.append({key: optimizer.param_groups[0][key] for key in ("lr", "momentum")})
        optimizer.step()
        if step + 1 < steps:
            scheduler.step()
    return rows


def ours(schedule: Any, base: float, steps: int) -> list[float]:
    return [schedule(done, steps, base) for done in range(steps)]


@few
@given(base=bases, gamma=gammas, every=st.integers(1, 20), steps=totals)
def test_step(base, gamma, every, steps):
    """StepLR."""
    rows = by_torch(torch.optim.lr_scheduler.StepLR, base, steps, step_size=every, gamma=gamma)

    assert ours(lt.schedules.step(every, gamma), base, steps) == pytest.approx([row["lr"] for row in rows], rel=1e-12)


@few
@given(base=bases, gamma=gammas, milestones=st.sets(st.integers(1, 50), min_size=1), steps=totals)
def test_multistep(base, gamma, milestones, steps):
    """MultiStepLR."""
    milestones = sorted(milestones)
    rows = by_torch(torch.optim.lr_scheduler.MultiStepLR, base, steps, milestones=milestones, gamma=gamma)

    got = ours(lt.schedules.multistep(milestones, gamma), base, steps)
    assert got == pytest.approx([row["lr"] for row in rows], rel=1e-12)


@few
@given(base=bases, gamma=gammas, steps=totals)
def test_exponential(base, gamma, steps):
    """ExponentialLR."""
    rows = by_torch(torch.optim.lr_scheduler.ExponentialLR, base, steps, gamma=gamma)

    assert ours(lt.schedules.exponential(gamma), base, steps) == pytest.approx([row["lr"] for row in rows], rel=1e-12)


@few
@given(base=bases, end=st.floats(0.0, 1.0), steps=totals)
def test_cosine(base, end, steps):
    """CosineAnnealingLR over all steps; it goes from one value to the next, which costs it some digits."""
    rows = by_torch(torch.optim.lr_scheduler.CosineAnnealingLR, base, steps, T_max=steps, eta_min=end)

    got = ours(lt.schedules.cosine(end=end), base, steps)
    assert got == pytest.approx([row["lr"] for row in rows], rel=1e-9, abs=1e-14)


@few
@given(base=bases, power=st.floats(0.5, 3.0), steps=totals)
def test_poly(base, power, steps):
    """PolynomialLR over all steps."""
    rows = by_torch(torch.optim.lr_scheduler.PolynomialLR, base, steps, total_iters=steps, power=power)

    assert ours(lt.schedules.poly(power), base, steps) == pytest.approx([row["lr"] for row in rows], rel=1e-9)


@few
@given(base=bases, period=st.integers(1, 20), count=st.integers(1, 3))
def test_cosine_restarts(base, period, count):
    """CosineAnnealingWarmRestarts."""
    steps = period * count
    rows = by_torch(torch.optim.lr_scheduler.CosineAnnealingWarmRestarts, base, steps, T_0=period)

    got = ours(lt.schedules.cosine_restarts([period] * count), base, steps)
    assert got == pytest.approx([row["lr"] for row in rows], rel=1e-12)


@few
@given(
    peak=bases,
    rising=st.floats(0.05, 0.45),
    steps=st.integers(3, 60),
    three_phase=st.booleans(),
    anneal=st.sampled_from(["cosine", "linear"]),
)
def test_one_cycle(peak, rising, steps, three_phase, anneal):
    """OneCycleLR to the bit, rate and momentum, so that a training is the same under either."""
    assume(rising * steps != 1)  # there the peak falls on step 0, and torch divides by 0
    options = {"pct_start": rising, "three_phase": three_phase, "anneal_strategy": anneal[:3].replace("lin", "linear")}
    rows = by_torch(torch.optim.lr_scheduler.OneCycleLR, 0.1, steps, max_lr=peak, total_steps=steps, **options)

    own: dict[str, Any] = {"rising": rising, "three_phase": three_phase, "anneal": anneal}
    assert ours(lt.schedules.one_cycle(**own), peak, steps) == [row["lr"] for row in rows]
    assert ours(lt.schedules.one_cycle_momentum(**own), 0.5, steps) == [row["momentum"] for row in rows]
