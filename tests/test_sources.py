"""Where batches come from."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import looptools as lt

STEP = lambda model, batch: {"x": torch.as_tensor(batch).float().mean()}  # noqa: E731


def run_of(source, **bounds):
    return lt.workflow([(lt.train(None, source, STEP), 1)], **(bounds or {"max_epochs": 2}))


class Counting(IterableDataset):
    """Gives three samples, and says what it is told to of its length."""

    def __init__(self, says):
        self.says = says

    def __iter__(self):
        return iter([1.0, 2.0, 3.0])

    def __len__(self):
        return self.says


@pytest.mark.parametrize(
    "source",
    [[1, 2, 3], (1, 2, 3), lambda: [1, 2, 3], lambda: iter([1, 2, 3]), DataLoader([1, 2, 3], None)],
    ids=["list", "tuple", "callable", "callable-iterator", "loader"],
)
def test_any_iterable_or_a_function_that_makes_one(source):
    """Each pass walks through it from its beginning; a length is not needed."""
    assert [(state.epoch, int(state.batch), state.last) for state in run_of(source)] == [
        (epoch, n, n == 3) for epoch in range(2) for n in (1, 2, 3)
    ]


def test_a_generator_is_spent_after_one_pass():
    """An error on the second, not an empty epoch."""
    run = run_of((n for n in (1, 2, 3)), max_epochs=2, max_iterations=9)  # how many passes it takes, nobody knows
    list(run.take(3))

    with pytest.raises(
        RuntimeError, match=r"train: its source is a generator, which is spent after one pass. Give a function"
    ):
        next(run)


def test_a_generator_without_end_serves_passes_by_iterations():
    """`lt.iterations(n)` takes n at a time and goes on where it stood."""

    def numbers():
        n = 0
        while True:
            yield n
            n += 1

    run = lt.workflow([(lt.train(None, numbers(), STEP), lt.iterations(2))], max_iterations=6)

    assert [state.batch for state in run] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("says", [1, 3, 100])
def test_the_length_of_an_iterable_data_set_is_not_trusted(says):
    """`len` of a DataLoader over one is the data set's own guess: what comes counts."""
    run = run_of(DataLoader(Counting(says), None))

    assert [state.last for state in run] == [False, False, True] * 2


class Lies:
    def __init__(self, says):
        self.says = says

    def __len__(self):
        return self.says

    def __iter__(self):
        return iter([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("says", "message"),
    [(4, "its source has len 4, but ended after 3 batches"), (2, "its source has len 2, but gives more batches")],
)
def test_a_trusted_length_that_proves_wrong_is_an_error(says, message):
    """Schedules and progress count on it."""
    with pytest.raises(RuntimeError, match=f"train: {message}"):
        run_of(Lies(says)).to_end()


def test_empty_sources_are_named():
    """With a length when the run is built, without one when its first batch is fetched."""
    with pytest.raises(ValueError, match=r"train: its source is empty \(len 0\)"):
        next(run_of([]))
    with pytest.raises(RuntimeError, match="train: its source gave no batch"):
        next(run_of(lambda: iter([])))


@pytest.mark.parametrize("source", [3, None, list])
def test_what_is_no_source_is_refused_where_it_is_typed(source):
    """A number, None, a class."""
    with pytest.raises(TypeError, match="source"):
        lt.train(None, source, STEP)


@pytest.mark.parametrize("known", [True, False], ids=["len", "no-len"])
def test_limit_ends_each_pass_early(known):
    """`phase.limit(n)`: at most n batches, fewer if there are fewer."""
    phase = lt.validate(None, [1, 2, 3] if known else lambda: iter([1, 2, 3]), STEP)

    assert [(state.batch, state.last) for state in phase.limit(2)] == [(1, False), (2, True)]
    assert [state.batch for state in phase.limit(9)] == [1, 2, 3]
    with pytest.raises(ValueError, match="val: limit must be at least 1, got 0"):
        phase.limit(0)


def test_on_puts_the_same_pipe_on_other_data(model, sgd, batches):
    """`train.on([batch])` overfits one batch with everything that is piped on."""
    train = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)

    (state,) = train.on([batches[2]])

    assert (state.updates, model.w.item()) == (True, 0.0)


def test_samplers_are_told_the_number_of_the_walk():
    """`set_epoch` of a sampler or batch sampler, before each walk through the loader."""
    told = []

    class Sampler(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch):
            told.append(epoch)

    data = [1, 2, 3, 4]
    loader = DataLoader(data, batch_size=2, sampler=Sampler(data))

    run_of(loader, max_epochs=3).to_end()
    assert told == [0, 1, 2]
    told.clear()
    lt.workflow([(lt.train(None, loader, STEP), lt.iterations(3))], max_iterations=6).to_end()
    assert told == [0, 1, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_by_default_the_loader_draws_what_it_draws_in_the_plain_loop(workers):
    """Order, and the generator's state afterwards."""

    def loader():
        return DataLoader(torch.arange(10.0), 3, shuffle=True, num_workers=workers)

    torch.manual_seed(5)
    by_hand = [batch for _ in range(2) for batch in loader()]
    after = torch.get_rng_state()
    torch.manual_seed(5)
    run = [state.batch for _ in range(2) for state in run_of(loader(), max_epochs=1)]

    assert all(torch.equal(a, b) for a, b in zip(by_hand, run, strict=True))
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("persistent", [False, True])
def test_the_order_is_the_same_after_a_sleep_within_a_later_pass(persistent):
    """A new iterator draws a seed that a loader with persistent workers draws only for its first one."""

    def seen(sleeps):
        torch.manual_seed(0)
        data = DataLoader(torch.arange(12.0), 2, shuffle=True, num_workers=1, persistent_workers=persistent)
        run = lt.workflow([(lt.validate(None, data, lambda model, batch: {}), 1)], max_rounds=3)
        batches = []
        for state in run:
            batches.append(state.batch.tolist())
            if len(batches) in sleeps:
                with run:
                    pass
        return batches, torch.rand(1).item()

    assert seen({2, 8, 15}) == seen(())
