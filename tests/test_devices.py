"""Batches: their size, and their way to a device."""

from __future__ import annotations

import collections
import dataclasses

import attrs
import pytest
import torch
from torch import nn

import looptools as lt
from looptools.devices import count_samples, move


def one(phase):
    """The phase's first state."""
    return next(iter(phase))


@attrs.define
class Sample:
    image: torch.Tensor
    name: str = "a"


@dataclasses.dataclass
class Pair:
    image: torch.Tensor
    label: torch.Tensor


Named = collections.namedtuple("Named", "image label")
FOUR = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (FOUR, 4),
        ((FOUR, torch.zeros(4)), 4),
        ([FOUR, FOUR], 4),
        ({"image": FOUR, "label": 1}, 4),
        (Named(FOUR, FOUR), 4),
        (Sample(FOUR), 4),
        (Pair(FOUR, FOUR), 4),
        (["a", "b"], 2),
        (
            ((torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)), ({}, {})),
            2,
        ),  # a detector's tuple of images of different sizes
        ([{"image": FOUR}, {"image": FOUR}, {"image": FOUR}], 3),
        (torch.zeros(()), 1),
        (None, 1),
        ({}, 1),
    ],
    ids=str,
)
def test_samples_of_a_batch(batch, count):
    """The first dimension of the first field."""
    assert count_samples(batch) == count


def test_nested_batches_move(model):
    """Tuples, lists, named tuples, dicts, attrs classes, dataclasses and what has `.to`; all else stays."""

    class Own:
        def to(self, device):
            return ("moved", device)

    meta = torch.device("meta")
    batch = {
        "a": (FOUR, [FOUR]),
        "b": Named(FOUR, "x"),
        "c": Sample(FOUR),
        "d": Pair(FOUR, FOUR),
        "e": Own(),
        "f": None,
    }

    moved = move(batch, meta)

    assert moved["a"][0].device == moved["a"][1][0].device == moved["b"].image.device == meta
    assert moved["c"].image.device == moved["d"].label.device == meta
    assert (type(moved["b"]), moved["b"].label, moved["e"], moved["f"]) == (Named, "x", ("moved", meta), None)
    assert move(batch, torch.device("cpu"))["a"][0] is FOUR


def test_device_model_follows_the_models_parameters():
    """`device="model"` asks the model at each pass; None leaves batches alone."""
    meta = nn.Linear(3, 1, device="meta")
    step = lambda model, batch: {"x": 1.0}  # noqa: E731

    assert one(lt.validate(meta, [FOUR], step, device="model")).batch.device.type == "meta"
    assert one(lt.validate(meta, [FOUR], step, device="meta")).batch.device.type == "meta"
    assert one(lt.validate(meta, [FOUR], step)).batch is FOUR
