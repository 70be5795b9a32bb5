"""Weighted means."""

from __future__ import annotations

import pytest
import torch

from looptools.means import Means


def test_means_fold_without_losing_digits():
    """Folded every 256 entries, a mean of 10,000 float64 values is the mean to 1e-12."""
    means, values = Means(), torch.rand(10_000, dtype=torch.float64)
    for number, value in enumerate(values):
        means.add({"x": value, "n": number}, weight=1 + number % 3)

    weights = 1 + torch.arange(10_000) % 3
    assert means.read()["x"] == pytest.approx(float((values * weights).sum() / weights.sum()), rel=1e-12)
    copy = Means()
    copy.load_state_dict(means.state_dict())
    assert copy.read() == means.read()


def test_entries_with_other_keys_come_back_in_their_order():
    """Nothing is added up for a checkpoint, whatever keys an entry has; a mean has the same bits afterwards."""
    means, again = Means(window=3), Means(window=3)
    for values, weight in (({"a": 1.0}, 1), ({"a": torch.tensor(0.1), "b": 2.0}, 2), ({"a": torch.tensor(0.7)}, 3)):
        means.add(values, weight)

    again.load_state_dict(means.state_dict())

    assert list(again.entries) == list(means.entries)
    assert again.read() == means.read()
