"""The process's random generators."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy
import pytest
import torch

import looptools as lt
from looptools.generators import get_generators, set_generators


def draw():
    return random.random(), float(numpy.random.rand()), torch.rand(2).tolist(), torch.randperm(5).tolist()


@pytest.fixture(autouse=True)
def _generators_as_before():
    before = get_generators()
    yield
    set_generators(before)


def test_one_seed_for_all():
    """Python, NumPy and torch draw the same again, as with their own functions."""
    assert lt.seed_everything(3) == 3
    first = draw()
    random.seed(3), numpy.random.seed(3), torch.manual_seed(3)

    assert draw() == first
    lt.seed_everything(4)
    assert draw() != first


def test_a_whole_training_is_the_same_again():
    """Weights, order and dropout follow from the seed."""
    from loops import Case, assert_same, classify, loader, network

    weights = []
    for _ in range(2):
        lt.seed_everything(11)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        iter(lt.train(model, loader(workers=Case().workers), classify) | lt.optimize(optimizer)).to_end()
        weights.append(model.state_dict())

    assert_same(*weights)


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_range_of_seeds(seed):
    """NumPy's: both ends are allowed."""
    assert lt.seed_everything(seed) == seed


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (-1, ValueError, r"seed_everything: seed must be from 0 to 2\*\*32 - 1, got -1"),
        (2**32, ValueError, r"seed_everything: seed must be from 0 to 2\*\*32 - 1, got 4294967296"),
        (1.0, TypeError, "seed_everything: seed must be a whole number, got 1.0"),
        (True, TypeError, "seed_everything: seed must be a whole number, got True"),
        (None, TypeError, "seed_everything: seed must be a whole number, got None"),
    ],
)
def test_bad_seeds_change_nothing(seed, error, message):
    """Refused before any generator is touched."""
    before = torch.get_rng_state()
    with pytest.raises(error, match=message):
        lt.seed_everything(seed)

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workspace", [None, ":16:8"])
def test_deterministic_algorithms(workspace):
    """All switches, in a process of its own; a workspace that the user has chosen stays."""
    code = """if True:
        import os, torch, looptools as lt
        lt.seed_everything(0)
        print(torch.are_deterministic_algorithms_enabled(), "CUBLAS_WORKSPACE_CONFIG" in os.environ)
        torch.backends.cudnn.benchmark = True
        lt.seed_everything(0, deterministic=True)
        cudnn = torch.backends.cudnn
        print(torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark)
        print(os.environ["CUBLAS_WORKSPACE_CONFIG"])
    """
    environment = {key: value for key, value in os.environ.items() if key != "CUBLAS_WORKSPACE_CONFIG"}
    environment |= {"CUBLAS_WORKSPACE_CONFIG": workspace} if workspace else {}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)

    assert out.stdout.split("\n")[:3] == [f"False {workspace is not None}", "True True False", workspace or ":4096:8"]


def test_generators_are_saved_and_set_together():
    """What is drawn after setting them back is what was drawn after saving."""
    state = get_generators()
    first = draw()
    set_generators(state)

    assert draw() == first
