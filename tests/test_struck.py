"""Ctrl-C at any opcode of an iteration. At every one of them: ``python tests/struck.py``."""

from __future__ import annotations

import signal

import pytest
from struck import everywhere, press_twice, raise_it


@pytest.fixture(autouse=True)
def _pythons_own_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("do", [raise_it, press_twice])
@pytest.mark.parametrize(("before", "step"), [(0, 1499), (2, 967), (3, 967), (4, 967)])
def test_with_snapshots_it_leaves_no_trace(do, before, step):
    """No torch mode is left switched, and whatever it struck, the run goes on to the same bits."""
    found = everywhere(do, True, before, step, first=7 * (before + 1))

    assert len(found) > 15
    assert [one.where for one in found if not one.same] == []


@pytest.mark.parametrize("do", [raise_it, press_twice])
@pytest.mark.parametrize(("before", "step"), [(0, 997), (2, 67), (3, 199), (4, 139)])
def test_without_snapshots_it_says_what_it_could_not_undo(do, before, step):
    """The same, or the exception says what will be another."""
    found = everywhere(do, False, before, step, first=7 * (before + 1))

    assert len(found) > 15
    assert [one.where for one in found if not one.same and not one.told] == []


def test_something_would_be_found():
    """Without snapshots some strikes leave other bits: the comparison can fail."""
    found = everywhere(raise_it, False, 3, 97)

    assert not all(one.same for one in found)
