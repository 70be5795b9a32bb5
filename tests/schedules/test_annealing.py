"""Ways down to an end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import looptools as lt

WITH_ENDS = {
    "cosine": lt.schedules.cosine,
    "linear": lt.schedules.linear,
    "flat_cosine": lambda **ends: lt.schedules.flat_cosine(0.5, **ends),
    "cosine_restarts": lambda **ends: lt.schedules.cosine_restarts([10], **ends),
}


@pytest.mark.parametrize("name", WITH_ENDS)
def test_a_ratio_is_an_end_relative_to_base(name):
    """end=0.2 and end_ratio=0.1 are the same from a base of 2."""
    by_value, by_ratio = WITH_ENDS[name](end=0.2), WITH_ENDS[name](end_ratio=0.1)

    values = [by_value(done, 10, 2.0) for done in range(10)]
    assert values == [by_ratio(done, 10, 2.0) for done in range(10)]
    assert values[0] == 2.0
    assert 0.2 < values[-1] < 0.5


@settings(max_examples=40, deadline=None)
@given(total=st.integers(1, 100), start=st.floats(0, 1))
def test_flat_cosine_is_flat_and_then_a_cosine(total, start):
    """From step round(start · total) on it is a cosine over what is left."""
    flat = round(start * total)
    values = [lt.schedules.flat_cosine(start)(done, total, 1.0) for done in range(total)]

    cosine = [lt.schedules.cosine()(done, total - flat, 1.0) for done in range(total - flat)]
    assert values == pytest.approx([1.0] * flat + cosine)


def test_restarts_end_with_their_last_period():
    """In a run whose length is not known, past the last period is an error too, with the cure."""
    restarts = lt.schedules.cosine_restarts([2, 3])

    assert restarts(4, None, 1.0) == pytest.approx(0.25)
    with pytest.raises(ValueError, match=r"are 5 steps, but step 5 was asked for. Add periods"):
        restarts(5, None, 1.0)


@pytest.mark.parametrize("name", ["cosine", "linear", "flat_cosine"])
def test_past_the_end_the_end_value_stays(name):
    """As when a run is longer than it was thought to be."""
    assert WITH_ENDS[name](end=0.25)(12, 10, 1.0) == 0.25
