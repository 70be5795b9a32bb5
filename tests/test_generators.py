"""The process's random generators."""

from __future__ import annotations

import functools
import io
import os
import random
import subprocess
import sys
import types

import numpy
import pytest
import torch

import looptools as lt
from looptools.generators import (
    drawn_from,
    generators_within,
    get_generator,
    get_generators,
    seed_generator,
    set_generator,
    set_generators,
)


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


KINDS = {
    "torch": lambda: torch.Generator().manual_seed(1),
    "python": lambda: random.Random(1),
    "randomstate": lambda: numpy.random.RandomState(1),
    **{
        name: lambda name=name: numpy.random.Generator(getattr(numpy.random, name)(1))
        for name in ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
    },
}


def draws(generator):
    if isinstance(generator, torch.Generator):
        return torch.randn(3, generator=generator).tolist()
    if isinstance(generator, random.Random):
        return [generator.gauss(0, 1) for _ in range(3)]
    return [float(generator.normal()) for _ in range(3)]


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_any_generator_is_saved_in_plain_values(make):
    """Loaded by ``torch.load(weights_only=True)``, it draws what it would have drawn."""
    generator = make()
    draws(generator)
    file = io.BytesIO()
    torch.save(get_generator(generator), file)
    file.seek(0)
    state, after = torch.load(file, weights_only=True), draws(generator)
    again = make()

    set_generator(again, state)

    assert draws(again) == after


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_any_generator_is_seeded(make):
    """By a number of up to 128 bits."""
    generator, other = make(), make()
    draws(other)
    seed_generator(generator, 2**120 + 5), seed_generator(other, 2**120 + 5)

    assert draws(generator) == draws(other)
    assert draws(make()) != draws(other)


class Slotted:
    __slots__ = ("noise",)


def test_generators_are_found_wherever_they_hang():
    """In attributes, slots, containers, closures, partials and methods; each once."""
    noise, found = Slotted(), KINDS["torch"]()
    noise.noise = found
    transform = torch.nn.Sequential(torch.nn.Dropout())
    transform.rng = KINDS["python"]()
    in_closure = KINDS["PCG64"]()

    class Data(torch.utils.data.Dataset):
        def __init__(self):
            self.transforms = [noise, transform, functools.partial(max, key=KINDS["randomstate"]())]
            self.augment = lambda x: in_closure.normal() * x
            self.again, self.itself = found, self
            self.process = [torch.default_generator, numpy.random.mtrand._rand, random._inst, random.SystemRandom()]
            self.paths = [KINDS["python"]()] * 100_000  # too long to be looked through

        def __len__(self):
            return 3

    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(Data(), [0]), generator=torch.Generator())

    assert set(generators_within(loader)) == {
        "generator",
        "dataset.dataset.again",
        "dataset.dataset.transforms.1.rng",
        "dataset.dataset.transforms.2.keywords.key",
        "dataset.dataset.augment.in_closure",
    }


def test_a_search_for_generators_ends():
    """Whatever a data set holds on to."""
    deep = [[object() for _ in range(200)] for _ in range(200)]

    assert generators_within(types.SimpleNamespace(deep=deep, process=random)) == {}


def test_what_is_drawn_within_follows_from_the_facts_alone():
    """And afterwards everything goes on as if nothing had been drawn."""
    own = {"noise": random.Random(3)}
    lt.seed_everything(1)
    after = [draw(), own["noise"].random()]
    lt.seed_everything(1)
    own["noise"].seed(3)
    within = []
    for facts in ((1, 2), (1, 2), (12,)):
        with drawn_from(*facts, own=own):
            within.append([draw(), own["noise"].random()])

    assert within[0] == within[1] != within[2]
    assert [draw(), own["noise"].random()] == after
