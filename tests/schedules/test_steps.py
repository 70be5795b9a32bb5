"""Drops by a factor."""

from __future__ import annotations

import pytest

import looptools as lt


@pytest.mark.parametrize("drop", [lt.schedules.step(2, floor=0.05), lt.schedules.multistep([2, 4], floor=0.05)])
def test_a_floor_holds_the_value_up(drop):
    """It also raises a base that is below it, which is mmcv's quirk."""
    assert [drop(done, None, 1.0) for done in (0, 2, 4)] == [1.0, 0.1, 0.05]
    assert drop(0, None, 0.02) == 0.05


def test_inverse_falls_with_its_power():
    """base · (1 + gamma · done)^(-power)."""
    assert lt.schedules.inverse(1.0, 2.0)(3, None, 16.0) == 1.0


def test_no_milestones_is_a_constant():
    """As some published recipes have it."""
    assert lt.schedules.multistep([])(100, None, 0.1) == 0.1
