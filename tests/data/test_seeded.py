"""A loader whose order and random transforms follow from a seed."""

from __future__ import annotations

import io
import random

import numpy
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
)

import looptools as lt
from looptools.data.sources import END, Source
from looptools.generators import get_generators, same_states, set_generators

SAMPLES, BATCHES = 23, 6


class Noisy(Dataset):
    """Its samples are drawn from every generator there is, and from its own."""

    def __init__(self, torchs=True):
        first = [torch.Generator()] if torchs else []
        self.own = [*first, numpy.random.default_rng(), numpy.random.RandomState(), random.Random()]
        self.loaded = 0

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        self.loaded += 1
        process = [torch.rand(()).item(), numpy.random.rand(), random.random()]
        *first, arrays, older, python = self.own
        own = [arrays.random(), older.rand(), python.random(), *(torch.rand((), generator=g).item() for g in first)]
        return torch.tensor([index, *process, *own], dtype=torch.float64)


class AtOnce(Noisy):
    """Loads a whole batch in one go."""

    def __getitems__(self, indices):
        return [self[index] + 100 for index in indices]


def mixed(samples):
    """A collate_fn that draws."""
    return torch.stack(samples) * torch.rand(()).double() + random.random()


def loader(data=None, batch=4, **options):
    return DataLoader(Noisy() if data is None else data, batch, collate_fn=mixed, **options)


def walk(loader, epochs=2):
    seen = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        seen += list(loader)
    return seen


def same(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.fixture(scope="module")
def reference():
    return walk(lt.seeded(loader(shuffle=True), 7))


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 1},
        {"num_workers": 2, "persistent_workers": True},
        {"num_workers": 3, "prefetch_factor": 1},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes:UserWarning")
def test_the_batches_are_the_same_for_any_number_of_workers(reference, options):
    """To the bit: order, transforms of the data set, and what collate_fn draws; and once more."""
    torch.manual_seed(random.randrange(9))
    seeded = lt.seeded(loader(shuffle=True, **options), 7)

    assert same(walk(seeded), reference)
    assert same(walk(seeded), reference)


def test_the_loader_can_be_sent_to_a_process():
    """As start methods other than fork do. (Torch itself cannot send a data set with a torch.Generator.)"""
    make = lambda **options: lt.seeded(loader(Noisy(torchs=False), shuffle=True, **options), 7)  # noqa: E731

    assert same(walk(make(num_workers=1, multiprocessing_context="spawn"), 1), walk(make(), 1))


def test_epochs_seeds_and_batches_differ(reference):
    """Nothing is drawn twice."""
    rows = {tuple(row) for batch in reference for row in batch[:, 1:].tolist()}

    assert len(reference) == 2 * BATCHES
    assert len(rows) == 2 * SAMPLES
    assert all(len(set(row)) == len(row) for row in rows)
    assert not same(walk(lt.seeded(loader(shuffle=True), 8)), reference)
    assert not same(reference[:BATCHES], reference[BATCHES:])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_process_and_the_data_set_draw_as_if_nothing_had_been(workers):
    """Its generators stand where they stood, those of the data set and of the loader too."""
    data, generator = Noisy(), torch.Generator()
    plain = loader(data, shuffle=True, num_workers=workers, generator=generator)
    seeded = lt.seeded(plain, 7)
    before, own = get_generators(), [data.own[0].get_state(), data.own[3].getstate(), generator.get_state()]

    walk(seeded)

    assert same_states(get_generators(), before)
    after = [data.own[0].get_state(), data.own[3].getstate(), generator.get_state()]
    assert torch.equal(after[0], own[0])
    assert after[1] == own[1]
    assert torch.equal(after[2], own[2])


def test_generators_are_put_back_after_a_sample_that_fails():
    """The exception is the data set's own."""

    class Torn(Noisy):
        def __getitem__(self, index):
            torch.rand(1)
            raise OSError("torn")

    before = get_generators()
    with pytest.raises(OSError, match="torn"):
        next(iter(lt.seeded(loader(Torn()), 7)))
    assert same_states(get_generators(), before)


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (lambda: DataLoader(Noisy(), 5, shuffle=True, drop_last=True), [5] * 4),
        (lambda: DataLoader(Noisy(), batch_sampler=BatchSampler(RandomSampler(range(20)), 8, False)), [8, 8, 4]),
        (lambda: DataLoader(Noisy(), 8, sampler=WeightedRandomSampler([1.0] * 23, 10)), [8, 2]),
        (lambda: DataLoader(Noisy(), None), [None] * SAMPLES),
        (lambda: DataLoader(AtOnce(), 20), [20, 3]),
    ],
    ids=["drop-last", "batch-sampler", "weighted", "no-batches", "getitems"],
)
def test_batches_are_those_of_the_loader(make, sizes):
    """Their number and size, from any sampler."""
    seeded = lt.seeded(make(), 7)
    batches = list(seeded)

    assert [len(batch) if batch.ndim == 2 else None for batch in batches] == sizes
    assert len(seeded) == len(sizes)
    assert same(batches, list(lt.seeded(make(), 7)))


def test_without_shuffling_the_order_is_that_of_the_data():
    """Only transforms are seeded."""
    seeded = lt.seeded(DataLoader(Noisy(), 4), 7)

    assert torch.cat(list(seeded))[:, 0].tolist() == list(range(SAMPLES))


def test_ranks_share_the_order_and_draw_other_numbers():
    """A DistributedSampler is told the epoch, and gives each rank its part."""

    def of(rank):
        sampler = DistributedSampler(range(SAMPLES), 2, rank, seed=1)
        return walk(lt.seeded(DataLoader(Noisy(), 4, sampler=sampler), 7))

    left, right = of(0), of(1)

    assert {int(n) for batch in left[:3] + right[:3] for n in batch[:, 0]} == set(range(SAMPLES))
    assert [n for batch in left[:3] for n in batch[:, 0]] != [n for batch in left[3:] for n in batch[:, 0]]
    assert not torch.equal(left[0][:, 1], right[0][:, 1])


def test_what_it_was_made_of_can_be_read_off():
    """For fingerprints, and for code that asks the data set."""
    data = Noisy()
    data.classes = ["a", "b"]
    seeded = lt.seeded(DataLoader(data, 4), 7)

    assert seeded.dataset.dataset is data
    assert seeded.dataset.facts() == {"seed": 7, "batch_size": 4}
    assert len(seeded.dataset) == SAMPLES
    assert seeded.dataset.classes == ["a", "b"]
    with pytest.raises(AttributeError, match="colours"):
        seeded.dataset.colours  # noqa: B018


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("k", [1, BATCHES, BATCHES + 2])
def test_a_source_goes_on_in_the_middle_of_an_epoch(workers, k):
    """In another process, with another number of workers; nothing that was seen is loaded, no generator saved."""

    def batches(source, n):
        seen = []
        for _ in range(n):
            if not source.under_way:
                source.begin()
            batch = source.fetch()
            if batch is END:
                source.begin()
                batch = source.fetch()
            seen.append(batch)
        return seen

    straight = batches(Source(lt.seeded(loader(shuffle=True), 7), "train"), 15)
    source = Source(lt.seeded(loader(shuffle=True, num_workers=workers), 7), "train")
    batches(source, k)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    torch.manual_seed(99)
    data = Noisy()
    source = Source(lt.seeded(loader(data, shuffle=True), 7), "train")
    source.load_state_dict(state)

    rest = batches(source, 15 - k)

    assert same(rest, straight[k:])
    assert data.loaded == sum(map(len, rest))
    assert state["own"] == {}
    assert state["at_start"] in (None, {"resets": False})


def test_a_run_numbers_the_epochs():
    """`set_epoch` is called before each pass."""
    run = lt.workflow([(lt.train(None, lt.seeded(loader(shuffle=True), 7), lambda model, batch: {}), 1)], max_epochs=2)

    assert same([state.batch for state in run], walk(lt.seeded(loader(shuffle=True), 7)))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class Endless:
    def __iter__(self):
        return iter(int, 1)


class Own(DataLoader):
    def __iter__(self):
        yield from range(3)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: DataLoader(Stream()), TypeError, "seeded: the data set, a Stream, has no indices"),
        (lambda: [1, 2], TypeError, "seeded: give a torch.utils.data.DataLoader, got a list"),
        (lambda: DataLoader(Noisy(), sampler=Endless()), TypeError, "seeded: the BatchSampler has no len"),
        (lambda: Own(Noisy()), TypeError, "seeded: Own has an __iter__ of its own"),
        (lambda: lt.seeded(DataLoader(Noisy()), 1), ValueError, "seeded: the loader is seeded already"),
        (lambda: DataLoader(Noisy(), num_workers=1, in_order=False), ValueError, "seeded: in_order=False"),
    ],
)
def test_what_cannot_be_seeded_is_refused(make, kind, message):
    """Where it is typed, with the reason."""
    with pytest.raises(kind, match=message):
        lt.seeded(make(), 7)


@pytest.mark.parametrize("seed", [1.5, None, True, "7"])
def test_a_seed_is_a_whole_number(seed):
    """Of any size."""
    with pytest.raises(TypeError, match="seeded: seed must be a whole number"):
        lt.seeded(loader(), seed)
    assert len(lt.seeded(loader(), 10**40)) == BATCHES


@pytest.fixture(autouse=True)
def _generators_as_before():
    before = get_generators()
    yield
    set_generators(before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_whole_run_ends_with_the_same_bits(tmp_path, workers):
    """Saved in the middle of an epoch, and resumed with another number of workers."""
    from loops import assert_same, network

    def step(model, batch):
        return model(batch[:, 1:4].float()).square().mean()

    def make(workers):
        lt.seed_everything(0)
        model = network()
        data = lt.seeded(DataLoader(Noisy(), 4, shuffle=True, num_workers=workers), 7)
        train = lt.train(model, data, step) | lt.optimize(torch.optim.AdamW(model.parameters(), 0.01))
        return lt.workflow([(train, 1)], max_epochs=2)

    straight = make(0)
    straight.to_end()
    first = make(workers)
    list(first.take(BATCHES + 2))
    first.save(tmp_path)
    first.close()
    run = make(2 - workers)
    torch.rand(3)
    run.resume(tmp_path)
    run.to_end()

    assert_same(run.model.state_dict(), straight.model.state_dict())
