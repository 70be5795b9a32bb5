"""Where batches come from."""

from __future__ import annotations

import collections.abc
import gc
import io
import random
import weakref

import attrs
import numpy
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import looptools as lt
from looptools.data import replaying
from looptools.data.sources import END, Source
from looptools.generators import get_generators, same_states, set_generators

# torchdata 0.11 with torch 2.13; it stands at the caller's line
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated, please do not call:UserWarning")
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


# Finding the place again, in another process


class Noisy(torch.utils.data.Dataset):
    """Counts what is loaded; its samples are drawn from all generators."""

    def __init__(self, n=12):
        self.n = n
        self.loaded = 0
        self.torchs = torch.Generator().manual_seed(1)
        self.numpys = [numpy.random.default_rng(2), numpy.random.RandomState(3)]
        self.pythons = {"one": random.Random(4)}

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        self.loaded += 1
        process = [torch.rand(()).item(), numpy.random.rand(), random.random()]
        own = [torch.rand((), generator=self.torchs).item(), *(g.normal() for g in self.numpys)]
        return torch.tensor([index, *process, *own, self.pythons["one"].random()], dtype=torch.float64)


class Still(torch.utils.data.Dataset):
    """Counts what is loaded in this process."""

    def __init__(self, n):
        self.n = n
        self.loaded = 0

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        self.loaded += 1
        return index


class Streamed(IterableDataset):
    """Numbers in an order of the process's generator, with noise."""

    def __iter__(self):
        for n in torch.randperm(9).tolist():
            yield torch.tensor([n + torch.rand(()).item()])


class Remembering(Streamed):
    """Knows where it stands, and in which epoch."""

    def __init__(self):
        self.epoch, self.at = 0, 0

    def __iter__(self):
        while self.at < 9:
            self.at += 1
            yield torch.tensor([100.0 * self.epoch + self.at + torch.rand(()).item()])
        self.epoch, self.at = self.epoch + 1, 0

    def state_dict(self):
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state):
        self.epoch, self.at = state["epoch"], state["at"]


class Tape:
    """Any object that has both methods."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < 6:
            self.at += 1
            yield [self.at]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@attrs.define(eq=False)
class Walker:
    """Fetches from a source as a run does, draws as dropout would, and says what it has seen."""

    source: Source
    ahead: bool = False
    seen: list = attrs.field(factory=list)

    def on(self, n):
        source = self.source
        for _ in range(n):
            if not source.under_way:
                source.begin()
            batch = source.fetch()
            if batch is END:
                source.begin()
                batch = source.fetch()
            self.seen.append(batch.tolist() if isinstance(batch, torch.Tensor) else batch)
            self.seen[-1] = [self.seen[-1], torch.rand(()).item(), random.random()]
            if self.ahead and not source.peek() or not self.ahead and source.taken == source.length:
                source.end()
        return self


def saved(source):
    """What another process reads from a checkpoint."""
    file = io.BytesIO()
    tree = {"source": source.state_dict(), "generators": get_generators()}
    torch.save(tree, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def elsewhere(make, tree, ahead=False):
    """A source of another process, which stands where *tree* was saved."""
    lt.seed_everything(99)
    walker = Walker(Source(make(), "train"), ahead)
    walker.source.load_state_dict(tree["source"])
    set_generators(tree["generators"])
    return walker


def start(make, ahead=False):
    lt.seed_everything(5)
    return Walker(Source(make(), "train"), ahead)


def loader(data, batch=2, **options):
    return DataLoader(data, batch, **options)


def generator():
    return torch.Generator().manual_seed(8)


LOADERS = {
    "sequential": lambda: loader(Noisy()),
    "shuffled": lambda: loader(Noisy(), shuffle=True),
    "short-last": lambda: loader(Noisy(11), shuffle=True),
    "one-by-one": lambda: loader(Noisy(), None, sampler=torch.utils.data.RandomSampler(range(12))),
    "own-generator": lambda: loader(Noisy(), shuffle=True, generator=generator()),
    "drawn-as-it-goes": lambda: loader(
        Noisy(80), sampler=torch.utils.data.RandomSampler(range(80), True, generator=generator())
    ),
    "weighted": lambda: loader(Noisy(), sampler=torch.utils.data.WeightedRandomSampler([1.0] * 12, 12)),
    "batch-sampler": lambda: DataLoader(
        Noisy(), batch_sampler=torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(range(12)), 5, False)
    ),
    "stateful": lambda: StatefulDataLoader(Noisy(), 2, shuffle=True),
    "stateful-generator": lambda: StatefulDataLoader(Noisy(), 2, shuffle=True, generator=generator()),
    "in-a-function": lambda: (lambda kept: lambda: kept)(loader(Noisy(), shuffle=True, generator=generator())),
}


@pytest.mark.parametrize("k", [1, 3, 6, 8])
@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS.keys())
def test_a_loader_goes_on_to_the_bit_in_another_process(make, k, ahead):
    """Order, what samples draw from any generator, and what everybody else draws, into later walks."""
    straight = start(make, ahead).on(20).seen

    tree = saved(start(make, ahead).on(k).source)

    assert elsewhere(make, tree, ahead).on(20 - k).seen == straight[k:]


WORKERS = {
    "shuffled": lambda: loader(torch.arange(24.0), shuffle=True, num_workers=2),
    "own-generator": lambda: loader(torch.arange(24.0), shuffle=True, num_workers=2, generator=generator()),
    "drawn-as-it-goes": lambda: loader(
        torch.arange(90.0),
        num_workers=2,
        sampler=torch.utils.data.RandomSampler(range(90), True, generator=generator()),
    ),
    "persistent": lambda: loader(torch.arange(24.0), shuffle=True, num_workers=1, persistent_workers=True),
    "stateful": lambda: StatefulDataLoader(torch.arange(24.0), 2, shuffle=True, num_workers=1),
    "stateful-persistent": lambda: StatefulDataLoader(
        torch.arange(24.0), 2, shuffle=True, num_workers=1, persistent_workers=True, generator=generator()
    ),
}


@pytest.mark.parametrize(("k", "ahead"), [(5, False), (12, True), (17, True)])
@pytest.mark.parametrize("make", WORKERS.values(), ids=WORKERS.keys())
def test_a_loader_with_workers_goes_on_in_its_order(make, k, ahead):
    """Workers fetch batches before they are asked for, which changes nothing."""
    straight = start(make, ahead).on(30).seen

    tree = saved(start(make, ahead).on(k).source)

    assert elsewhere(make, tree, ahead).on(30 - k).seen == straight[k:]


@pytest.mark.parametrize("stateful", [False, True])
def test_passed_samples_are_not_loaded(stateful):
    """Batch 9,000 of 10,000 is reached at once: only what comes next is asked of the data set."""
    data = Still(10_000)
    make = lambda: (StatefulDataLoader if stateful else DataLoader)(data, 1, shuffle=True)  # noqa: E731
    tree = saved(start(make).on(9_000).source)
    data.loaded = 0

    walker = elsewhere(make, tree).on(1)

    assert data.loaded == 1
    assert walker.seen == start(make).on(9_001).seen[-1:]


def test_elements_of_sequences_are_passed_by_number():
    """A list, and what only has __getitem__, are not walked through again."""
    asked = []

    class Numbers:
        def __len__(self):
            return 9

        def __getitem__(self, n):
            asked.append(n)
            if n >= 9:
                raise IndexError(n)
            return [n]

    class Counted(collections.abc.Sequence):
        __len__, __getitem__ = Numbers.__len__, Numbers.__getitem__

    for make in (Numbers, Counted, lambda: [[n] for n in range(9)], lambda: lambda: range(9)):
        tree = saved(start(make).on(7).source)
        asked.clear()
        walker = elsewhere(make, tree).on(1)

        assert asked in ([], [7])
        assert walker.on(2).seen == start(make).on(10).seen[7:]


ITERABLES = {
    "loader": lambda: loader(Streamed()),
    "loader-with-workers": lambda: loader(Streamed(), num_workers=1),
    "function": lambda: lambda: iter(Streamed()),
    "iterable": Streamed,
}


@pytest.mark.parametrize("k", [1, 4, 9, 13])
@pytest.mark.parametrize("make", ITERABLES.values(), ids=ITERABLES.keys())
@pytest.mark.filterwarnings("ignore:train. its batches were walked through again:UserWarning")
def test_batches_without_indices_are_made_once_more(make, k):
    """They are walked through from the first, and what they draw is drawn as it was."""
    straight = start(make, ahead=True).on(16).seen

    tree = saved(start(make, ahead=True).on(k).source)

    assert elsewhere(make, tree, ahead=True).on(16 - k).seen == straight[k:]


STATEFUL = {
    "loader": lambda: StatefulDataLoader(Remembering(), 2),
    "loader-with-workers": lambda: StatefulDataLoader(Remembering(), 2, num_workers=2),
    "object": Tape,
}


@pytest.mark.filterwarnings("ignore:train. its order is exact, but random transforms:UserWarning")
@pytest.mark.filterwarnings("ignore:train. its loader keeps its workers:UserWarning")
@pytest.mark.parametrize("k", [1, 4, 5, 6, 9])
@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL.keys())
def test_a_source_with_a_state_of_its_own_goes_on_from_that(make, k):
    """Also behind its last batch, where torchdata's own loader would give an empty epoch."""
    workers = getattr(make(), "num_workers", 0)
    number = lambda entry: [int(x) for row in entry[0] for x in (row if isinstance(row, list) else [row])]  # noqa: E731
    straight = start(make, ahead=True).on(16).seen

    tree = saved(start(make, ahead=True).on(k).source)
    seen = elsewhere(make, tree, ahead=True).on(16 - k).seen

    if workers:  # what workers draw is not exact, and said not to be
        seen, straight = list(map(number, seen)), list(map(number, straight))
    assert seen == straight[k:]


@pytest.mark.filterwarnings("ignore:train. its order is exact, but random transforms:UserWarning")
def test_what_kept_workers_knew_of_earlier_passes_is_said_to_be_lost():
    """The epoch that their data set counts, say; in the middle of a pass their own state is loaded."""
    make = lambda: StatefulDataLoader(Remembering(), 2, num_workers=1, persistent_workers=True)  # noqa: E731
    with pytest.warns(UserWarning, match="train: its loader keeps its workers from pass to pass, and what"):
        walker = elsewhere(make, saved(start(make, True).on(7).source)).on(2)
    assert [int(n) for (n,) in walker.seen[1][0]] == [107, 108]
    with pytest.warns(UserWarning, match="train: its loader keeps its workers from pass to pass, and what"):
        elsewhere(make, saved(start(make, True).on(5).source)).on(1)


def test_a_state_of_its_own_spares_the_walk():
    """What was taken is not asked of the data set again."""
    tree = saved(start(Tape).on(4).source)
    tape = Tape()
    tape.load_state_dict = lambda state: asked.append(dict(state)) or Tape.load_state_dict(tape, state)
    asked = []

    walker = elsewhere(lambda: tape, tree).on(1)

    assert (asked, walker.seen[0][0]) == ([{"at": 4}], [5])


@attrs.define
class Picture:
    """A batch that no checkpoint could hold."""

    x: torch.Tensor

    def tolist(self):
        return self.x.tolist()


class Pictures(IterableDataset):
    def __iter__(self):
        for _ in range(7):
            yield Picture(torch.rand(1))


def pictured(samples):
    return Picture(torch.stack(samples))


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize(
    "make",
    [Pictures, lambda: lambda: iter(loader(Noisy(), collate_fn=pictured))],
    ids=["walked", "in-a-function"],
)
@pytest.mark.filterwarnings("ignore:train. its batches were walked through again:UserWarning")
def test_a_batch_ahead_that_cannot_be_saved_is_fetched_again(make, k):
    """With the generators as they stood before it was fetched, and then as they stood afterwards."""

    def see(walker, n):
        seen = walker.on(n).seen
        return [[entry[0].tolist() if isinstance(entry[0], Picture) else entry[0], *entry[1:]] for entry in seen]

    straight = see(start(make, ahead=True), 13)
    tree = saved(start(make, ahead=True).on(k).source)
    assert "before" in tree["source"].get("ahead", {"before": 0}) or k == 6

    assert see(elsewhere(make, tree, ahead=True), 13 - k) == straight[k:]


def test_the_batch_ahead_is_in_the_state():
    """Where the length is not known, the next batch is fetched before the checkpoint is saved."""
    walker = start(lambda: lambda: iter([torch.tensor([n]) for n in range(3)]), ahead=True).on(2)

    assert walker.source.state_dict()["ahead"] == {"batch": torch.tensor([2]), "device": None}
    walker.source.fetch(), walker.source.peek()
    assert walker.source.state_dict()["ahead"] == {"end": True}


class Torn(torch.utils.data.Dataset):
    """Fails at one sample, once; in a worker, each worker fails once."""

    def __init__(self, at):
        self.at, self.loaded = at, []

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == self.at:
            self.at = None
            raise OSError("torn")
        self.loaded.append(index)
        return index


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}])
@pytest.mark.filterwarnings("ignore:train. its order is exact, but random transforms:UserWarning")
def test_after_a_failed_batch_the_order_goes_on(options):
    """In the first walk and in a later one; what came before is not loaded once more."""

    def seen(at):
        lt.seed_everything(5)
        data = Torn(at)
        source, seen = Source(loader(data, 1, shuffle=True, **options), "train"), []
        for _ in range(2):
            source.begin()
            while (batch := fetch(source, data)) is not END:
                seen.append(batch.tolist())
        return seen, torch.rand(()).item(), data.loaded

    def fetch(source, data):
        try:
            return source.fetch()
        except OSError:
            data.at = None
            return source.fetch()

    whole = seen(None)
    assert seen(whole[0][4][0]) == whole
    assert seen(whole[0][0][0]) == whole


def test_workers_that_were_let_go_leave_the_batch_ahead():
    """A sleep between two batches, with the next one fetched already."""
    make = lambda: loader(Streamed(), num_workers=1)  # noqa: E731
    walker = start(make, ahead=True).on(3)
    walker.source.release()

    assert walker.on(4).seen == start(make, ahead=True).on(7).seen


# What cannot be exact is said


def test_transforms_within_workers_are_said_once_not_to_be_reproduced():
    """The order is; and at the border of a pass everything is, so that nothing is said."""
    make = lambda: loader(Noisy(), shuffle=True, num_workers=2)  # noqa: E731
    straight = start(make).on(18).seen
    tree = saved(start(make).on(4).source)
    walker = elsewhere(make, tree)

    with pytest.warns(UserWarning, match=r"train: its order is exact, but .* 2 workers are not"):
        walker.on(1)
    walker.source.release()
    walker.on(1)  # a second warning would be an error

    numbers = lambda seen: [[row[0] for row in entry[0]] for entry in seen]  # noqa: E731
    assert numbers(walker.seen) == numbers(straight[4:6])


@pytest.mark.parametrize("k", [6, 12])
def test_transforms_within_workers_are_exact_at_the_border_of_a_pass(k):
    """Workers are made anew there, with a seed that is drawn from the process's generator."""
    make = lambda: loader(Noisy(), shuffle=True, num_workers=2)  # noqa: E731
    tree = saved(start(make).on(k).source)

    assert elsewhere(make, tree).on(18 - k).seen == start(make).on(18).seen[k:]


def test_workers_that_a_loader_keeps_are_said_at_the_border_too():
    """Theirs are the generators of the passes before."""
    make = lambda: loader(Noisy(), num_workers=1, persistent_workers=True)  # noqa: E731
    walker = elsewhere(make, saved(start(make).on(6).source))

    with pytest.warns(UserWarning, match="random transforms within its 1 workers are not reproduced"):
        walker.on(1)


class Whims(torch.utils.data.Sampler):
    """Draws from the process's generator for each index."""

    def __len__(self):
        return 12

    def __iter__(self):
        for _ in range(12):
            yield torch.randint(12, ()).item()


def test_a_sampler_that_draws_as_it_goes_is_said_not_to_be_exact():
    """Its draws lie between those of transforms and dropout, which are not replayed."""
    make = lambda: loader(Still(12), sampler=Whims())  # noqa: E731

    with pytest.warns(UserWarning, match="train: its sampler draws from the process's random generators as it goes"):
        elsewhere(make, saved(start(make).on(3).source)).on(1)
    elsewhere(make, saved(start(make).on(1).source)).on(1)  # nothing lay between, so this is exact


def test_batches_in_any_order_are_said_not_to_be_exact():
    """Which of them came is not known."""
    make = lambda: loader(torch.arange(24.0), num_workers=2, in_order=False)  # noqa: E731

    with pytest.warns(UserWarning, match="train: its loader has in_order=False"):
        elsewhere(make, saved(start(make).on(3).source)).on(1)


def test_a_generator_that_is_not_there_is_said():
    """It was made by the first sample, say, and no sample was loaded yet."""
    tree = saved(start(lambda: loader(Noisy())).on(1).source)

    with pytest.warns(UserWarning, match=r"train: the random generator at dataset.torchs, dataset.numpys.0, "):
        elsewhere(lambda: loader(Still(12)), tree)


@pytest.mark.parametrize("tqdm", [True, False])
def test_a_long_walk_shows_how_far_it_is(capsys, monkeypatch, tqdm):
    """On stderr, as a bar if tqdm is installed; a short one is silent."""
    make = lambda: lambda: iter(range(2000))  # noqa: E731
    tree = saved(start(make).on(1500).source)
    elsewhere(make, tree).on(1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(replaying, "QUIET", 0.0)
    if not tqdm:
        monkeypatch.setattr(replaying.importlib.util, "find_spec", lambda name: None)

    elsewhere(make, tree).on(1)

    shown = capsys.readouterr().err
    assert "train: walking through its batches again, up to where it stood: " in shown
    assert ("batch/s" in shown) is tqdm


def test_a_source_that_gives_fewer_than_before_is_an_error():
    """Both where batches are passed over and where they are made once more."""
    for before, now in [
        (lambda: loader(Still(12)), lambda: loader(Still(4))),
        (lambda: lambda: iter(range(6)), lambda: lambda: iter(range(2))),
    ]:
        walker = elsewhere(now, saved(start(before).on(5).source))
        drawn = get_generators()

        with pytest.raises(RuntimeError, match="train: its source gave fewer batches than before; it had given 5"):
            walker.on(1)
        assert same_states(get_generators(), drawn)


def test_a_state_of_an_older_version_still_loads():
    """There the own generators were a list of torch's."""
    make = lambda: loader(torch.arange(12.0), shuffle=True, generator=generator())  # noqa: E731
    tree = saved(start(make).on(2).source)
    for place in (tree["source"], tree["source"]["at_start"]):
        place["own"] = [place["own"]["generator"]]

    assert elsewhere(make, tree).on(9).seen == start(make).on(11).seen[2:]


def test_a_source_goes_as_soon_as_nobody_holds_it():
    """Its workers with it: not some time later, when Python looks for cycles, perhaps in a process that was forked."""
    source = Source(loader(torch.arange(8.0), num_workers=1), "train")
    source.begin(), source.fetch(), source.release(), source.fetch()
    iterator = weakref.ref(source._iterator)
    gc.disable()
    try:
        del source
        assert iterator() is None
    finally:
        gc.enable()


def test_a_walk_that_draws_between_others_draws_is_said(tmp_path):
    """A shuffle buffer is filled with other samples then; a source with a generator of its own is exact."""

    class Buffered(IterableDataset):
        def __iter__(self):
            buffer = list(range(4))
            for sample in range(4, 12):
                place = int(torch.randint(4, ()))
                yield buffer[place]
                buffer[place] = sample

    def make():
        torch.manual_seed(0)
        step = lambda model, batch: {"x": torch.rand(())}  # noqa: E731
        return lt.workflow([(lt.train(None, DataLoader(Buffered(), 2), step), 1)], max_epochs=1)

    run = make()
    list(run.take(3))
    run.save(tmp_path)
    run = make()
    run.resume(tmp_path)

    with pytest.warns(UserWarning, match="draws from the process's random generators as it goes, between other draws"):
        run.to_end()
