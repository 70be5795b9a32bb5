"""A file of a flight recorder, opened in another run: the same iteration, to the bit."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Planted, assert_same, classify, loader, network
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset

import looptools as lt
from looptools.archives.contents import Refused
from looptools.archives.files import Damaged, write
from looptools.stepping.crash import files_in

Pair = namedtuple("Pair", "images labels")


class Endless(IterableDataset[Any]):
    """A data set whose end only the walk tells; it draws numbers as it goes."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(4)

    def __iter__(self):
        for number in range(6):
            yield torch.randn(4, 3, generator=self.generator), torch.full((4,), number % 2)


SOURCES = {
    "loader": loader,
    "workers": lambda: loader(workers=2),
    "list": lambda: list(loader(shuffle=False)),
    "unknown length": lambda: lambda: iter(loader()),
    "iterable": lambda: DataLoader(Endless(), batch_size=None),
    "own generator": lambda: DataLoader(loader().dataset, 4, shuffle=True, generator=torch.Generator().manual_seed(5)),
    "named tuples": lambda: DataLoader(loader().dataset, 4, shuffle=True, collate_fn=pairs),
    "seeded": lambda: lt.seeded(loader(), 3),
}


def pairs(samples: Any) -> Pair:
    return Pair(torch.stack([image for image, _ in samples]), torch.stack([label for _, label in samples]))


def build(step: Any = classify, source: Any = loader, *parts: Any, **options: Any) -> tuple[lt.Run, nn.Module]:
    """Dropout, BatchNorm, AdamW, windows of two, a schedule, a scaler, an average of weights, validation."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    train = lt.train(model, source(), step)
    if source not in (SOURCES["unknown length"], SOURCES["iterable"]):
        train = train | lt.schedule_lr(optimizer, lt.schedules.cosine(), warmup=3)
    train = train | lt.optimize(optimizer, max_norm=1.0, accumulate=2, scaler=scaler)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train = train | lt.ema(averaged)
    val = lt.validate(model, loader(shuffle=False), step)
    run = lt.workflow([(train, 1), (val, 1)], max_epochs=2, **options)
    for part in parts:
        run = run | part
    return run, nn.ModuleList([model, averaged])


def fails(phase: str, iteration: int, index: int) -> Any:
    def classify_(model, batch, state):
        found = classify(model, batch)
        if (state.phase, state.iteration, state.index) == (phase, iteration, index):
            raise Planted("as planted")
        return found

    classify_.__name__ = "classify"
    return classify_


def rows(run: lt.Run, n: int | None = None) -> list[tuple[Any, ...]]:
    states = run if n is None else run.take(n)
    return [(s.phase, s.epoch, s.iteration, s.index, float(s.metrics["loss"]), s.lr, s.updates) for s in states]


def crash(folder: Path, step: Any, source: Any = loader, **options: Any) -> None:
    run, _ = build(step, source, lt.flight_recorder(folder), **options)
    with pytest.raises(Planted):
        run.to_end()


PLACES = [("train", 0, 0), ("train", 3, 3), ("train", 4, 4), ("train", 6, 6), ("train", 7, 0), ("train", 13, 6)]
PLACES += [("val", 6, 0), ("val", 6, 3), ("val", 13, 6)]


@pytest.mark.parametrize("place", PLACES)
def test_the_run_goes_on_with_the_same_bits(tmp_path, place):
    """Anywhere: the rest of the training is that of a run in which nothing was wrong."""
    whole, wanted = build()
    all_rows = rows(whole)
    crash(tmp_path, fails(*place))

    torch.manual_seed(99)
    run, model = build()
    assert lt.reopen(tmp_path, run) is run

    state = run.state
    assert (state.phase, state.iteration, state.index, run.failed) == (*place, None)
    assert state.first is (place[2] == 0)
    assert state.loss is None
    rest = rows(run)
    assert rest == all_rows[-len(rest) :]
    assert rest[0][:1] + rest[0][2:4] == place
    assert_same(model.state_dict(), wanted.state_dict())
    assert run.results == whole.results
    assert len(run.history) == len(whole.history)


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "named tuples"])
@pytest.mark.parametrize("iteration", [0, 4, 5])
def test_the_batch_comes_from_the_file_and_the_source_goes_on_behind_it(tmp_path, name, iteration):
    """Loaders with workers, of unknown length, over streams, with generators of their own."""
    whole, wanted = build(classify, SOURCES[name])
    all_rows = rows(whole)
    crash(tmp_path, fails("train", iteration, iteration), SOURCES[name])

    torch.manual_seed(99)
    run, model = build(classify, SOURCES[name])
    run.cursor.passes.sources[id(run.cursor.passes.agenda.phases[0])].replay = refuse  # not needed for it
    lt.reopen(tmp_path, run)
    del run.cursor.passes.sources[id(run.cursor.passes.agenda.phases[0])].replay

    rest = rows(run)
    assert rest == all_rows[-len(rest) :]
    assert rest[0][2] == iteration
    assert_same(model.state_dict(), wanted.state_dict())


def refuse() -> None:
    raise AssertionError("the source was asked")


@pytest.mark.parametrize("iteration", [0, 4, 7, 13])
def test_a_batch_that_cannot_be_saved_is_fetched_again(tmp_path, iteration):
    """A class of the user's: the file describes it, and the source gives it once more."""
    source = SOURCES["named tuples"]
    whole, wanted = build(classify, source)
    all_rows = rows(whole)
    crash(tmp_path, fails("train", iteration, iteration % 7), source)

    torch.manual_seed(99)
    run, model = build(classify, source)
    with pytest.warns(UserWarning, match=r"reopen: the batch \(Pair of .*\) could not be saved: the batch is a .*Pair"):
        lt.reopen(tmp_path, run)

    rest = rows(run)
    assert rest == all_rows[-len(rest) :]
    assert rest[0][2] == iteration
    assert_same(model.state_dict(), wanted.state_dict())


def test_a_batch_that_was_changed_in_place_is_fetched_again(tmp_path):
    """What the step has done to it would be done twice."""

    def doubles(model, batch, state):
        batch[0].mul_(2)
        if state.iteration == 4:
            raise Planted
        return classify(model, batch)

    crash(tmp_path, doubles)
    run, _ = build(doubles)
    with pytest.warns(UserWarning, match="could not be saved: it was changed in place"):
        lt.reopen(tmp_path, run)
    other, _ = build(doubles)
    batches = [state.batch for state in other.take(4)] and other.after("batches").batch

    assert torch.equal(run.state.batch[0], batches[0])


def test_a_batch_that_a_part_has_put_another_in_the_place_of(tmp_path):
    """The one that was fetched is saved."""
    seen = []

    def cuts(states):
        for state in states:
            seen.append(state.batch)
            state.batch = [part[:2] for part in state.batch]
            yield state

    run, _ = build(fails("train", 2, 2), loader, lt.flight_recorder(tmp_path))
    run.insert(cuts, before="train/forward")
    with pytest.raises(Planted):
        run.to_end()
    again, _ = build(classify)
    again.insert(cuts, before="train/forward")
    lt.reopen(tmp_path, again)

    assert torch.equal(again.state.batch[0], seen[2][0])
    assert next(again).batch[0].shape == (2, 3)


def test_in_another_process(tmp_path):
    """The loss that the other process printed, and the exception that ended it."""
    code = f"""
import sys, torch
sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parent)]!r}
torch.set_num_threads(1)
from test_reopen import build, lt, classify, Planted
def step(model, batch, state):
    found = classify(model, batch)
    if state.iteration == 9:
        print(found["loss"].item().hex())
        raise Planted("there")
    return found
step.__name__ = "classify"
build(step, build.__defaults__[1], lt.flight_recorder({str(tmp_path)!r}))[0].to_end()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Planted: there" in done.stderr
    assert "lt.reopen(" in done.stderr
    losses = []

    def step(model, batch, state):
        found = classify(model, batch)
        losses.append(found["loss"].item().hex())
        raise Planted("there")

    step.__name__ = "classify"
    run, _ = build(step)
    lt.reopen(tmp_path, run)

    with pytest.raises(Planted, match="there"):
        next(run)
    assert losses == done.stdout.split()


def test_a_nan_in_a_batch_is_found_by_stages(tmp_path):
    """The story: the loss was nan, the file has the batch, the walk shows where it comes from."""
    data = list(loader(shuffle=False))
    data[4] = [data[4][0].clone().index_put_((torch.tensor(1),), torch.tensor(math.nan)), data[4][1]]
    run, _ = build(classify, lambda: data, lt.flight_recorder(tmp_path))
    with pytest.warns(UserWarning, match="flight_recorder: loss is nan"):
        run.to_end()

    again, model = build(classify, lambda: data)
    lt.reopen(files_in(tmp_path)[0], again)

    assert again.state.batch[0].isnan().any(1).tolist() == [False, True, False, False]
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    seen = {name: bool(state.loss.isnan()) for name, state in again.stages() if state.loss is not None}
    assert seen["train/forward"]
    assert list(seen)[0] == "train/forward"


def test_a_mended_step_ends_with_the_bits_of_a_run_that_had_it(tmp_path):
    """Reopened with the step mended in the script: as if it had been so from the beginning."""

    def mended(model, batch, state):
        return classify(model, batch)

    mended.__name__ = "classify"
    crash(tmp_path, fails("train", 9, 2), snapshots=lt.snapshots(every=4))
    whole, wanted = build(mended)
    whole.to_end()

    run, model = build(mended)
    lt.reopen(tmp_path, run).to_end()

    assert_same(model.state_dict(), wanted.state_dict())


def test_the_iteration_fails_again_and_has_its_file_already(tmp_path):
    """Opened where it failed, with a recorder: the note names the file it comes from."""
    crash(tmp_path, fails("train", 9, 2))
    run, _ = build(fails("train", 9, 2), loader, lt.flight_recorder(tmp_path))
    lt.reopen(tmp_path, run)

    with pytest.raises(Planted) as caught:
        next(run)

    assert len(files_in(tmp_path)) == 1
    assert "crash_0001" in "\n".join(caught.value.__notes__)


def test_verbs_on_an_open_iteration(tmp_path):
    """after, before, skip, retry: it is an open iteration like any other."""
    crash(tmp_path, fails("train", 9, 2))
    run, _ = build(snapshots=lt.snapshots(every=5))
    lt.reopen(tmp_path, run)

    assert run.after("forward").iteration == 9
    assert run.before("update").iteration == 9
    assert run.retry().iteration == 9
    assert next(run).iteration == 10
    run.back(2)
    assert next(run).iteration == 9


def test_a_batch_that_could_not_be_fetched(tmp_path):
    """The file stands before the fetch, which next(run) tries again."""
    torch.manual_seed(3)
    whole, wanted = build()
    all_rows = rows(whole)

    class Breaks:
        def __init__(self, batches, breaks):
            self.batches, self.breaks = batches, breaks

        def __iter__(self):
            for number, batch in enumerate(self.batches):
                if self.breaks and number == 5:
                    raise Planted("in the source")
                yield batch

        def __len__(self):
            return len(self.batches)

    crash(tmp_path, classify, lambda: Breaks(loader(), True))
    crash_ = torch.load(files_in(tmp_path)[0], weights_only=True)["crash"]
    assert (crash_["part"], crash_["open"], crash_["index"]) == ("train/batches", False, 5)
    run, model = build(classify, lambda: Breaks(loader(), False))
    lt.reopen(tmp_path, run)

    assert run.state is None
    rest = rows(run)
    assert rest == all_rows[5:]
    assert_same(model.state_dict(), wanted.state_dict())


def test_a_failure_at_the_boundary(tmp_path):
    """What is to be done there fails: the file stands before the iteration, at the last one of a pass too."""
    whole, wanted = build()
    all_rows = rows(whole)

    def asks(at):
        def part(states):
            for state in states:
                if state.trains and state.iteration == at:
                    state.run.at_boundary(lambda run: 1 / 0)
                yield state

        part.only_looks = True
        return part

    for at in (4, 6):
        run, _ = build(classify, loader, asks(at), lt.flight_recorder(tmp_path))
        with pytest.raises(ZeroDivisionError):
            run.to_end()
        run, model = build()
        lt.reopen(tmp_path, run)
        assert run.state.iteration == at
        assert run.state.batch is not None
        rest = rows(run)
        assert rest == all_rows[-len(rest) :]
        assert rest[0][2] == at
        assert_same(model.state_dict(), wanted.state_dict())


def test_a_function_of_the_workflow_leaves_none(tmp_path):
    """What it had changed is not known; the note says so."""

    def breaks(run):
        raise Planted

    model = nn.Linear(1, 1)
    train = lt.train(model, [torch.ones(1, 1)], lambda model, batch: model(batch).mean())
    train = train | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1))
    run = lt.workflow([(train, 1), (breaks, 1)], max_epochs=1) | lt.flight_recorder(tmp_path)
    with pytest.raises(Planted) as caught:
        run.to_end()

    assert "no file was left: what a function of the workflow" in "\n".join(caught.value.__notes__)
    assert not list(tmp_path.iterdir())


def test_passes_of_so_many_batches(tmp_path):
    """Of a source that goes on in the next pass, and begins again within one."""

    def entries(step, *parts):
        torch.manual_seed(0)
        model = network()
        train = lt.train(model, loader(), step) | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1))
        run = lt.workflow([(train, lt.iterations(4)), (lt.validate(model, loader(), step), 1)], max_iterations=20)
        for part in parts:
            run = run | part
        return run, model

    whole, wanted = entries(classify)
    all_rows = rows(whole)
    for iteration in (4, 6, 7, 14, 19):
        run, _ = entries(fails("train", iteration, iteration % 4), lt.flight_recorder(tmp_path))
        with pytest.raises(Planted):
            run.to_end()
        run, model = entries(classify)
        rest = rows(lt.reopen(tmp_path, run))
        assert rest == all_rows[-len(rest) :]
        assert rest[0][2] == iteration
        assert_same(model.state_dict(), wanted.state_dict())


def test_within_a_part_that_drops_states(tmp_path):
    """It waits for the state in the middle of its loop; the file is of that state's beginning."""

    class drops:
        def __call__(self, states):
            for state in states:
                if state.iteration % 3 != 2:
                    yield state

    def dropping(step, *parts):
        run, model = build(step, loader, *parts)
        run.insert(drops(), before="train/backward")
        return run, model

    whole, wanted = dropping(classify)
    all_rows = rows(whole)
    for place in [("train", 3, 3), ("train", 9, 2)]:
        run, _ = dropping(fails(*place), lt.flight_recorder(tmp_path))
        with pytest.raises(Planted):
            run.to_end()
        run, model = dropping(classify)
        rest = rows(lt.reopen(tmp_path, run))
        assert rest == all_rows[-len(rest) :]
        assert rest[0][2] == place[1]
        assert_same(model.state_dict(), wanted.state_dict())


def test_another_pipe_is_refused_unless_accepted(tmp_path):
    """All differences in one error, that begins with the name that was typed; nothing is changed."""
    crash(tmp_path, fails("train", 3, 3))
    run, model = build(classify, lambda: list(loader(shuffle=False))[:6])
    before = {name: value.clone() for name, value in model.state_dict().items()}

    with pytest.raises(
        RuntimeError, match=r"^reopen: the file does not fit.*\n- train: batches 7 saved, 6 here  \(acc"
    ):
        lt.reopen(tmp_path, run)
    assert_same(model.state_dict(), before)

    assert lt.reopen(tmp_path, run, accept="data").state.iteration == 3


def test_it_is_a_checkpoint_too(tmp_path):
    """run.resume(file) stands there as well: the batch is at hand, and comes next."""
    whole, wanted = build()
    whole.to_end()
    crash(tmp_path, fails("train", 9, 2))
    run, model = build()

    run.resume(files_in(tmp_path)[0])

    assert next(run).iteration == 9
    run.to_end()
    assert_same(model.state_dict(), wanted.state_dict())


def test_its_checkpoints_and_log_go_on(tmp_path):
    """It is the same run: its folders take it, and a row stands once."""
    log = lt.log(tmp_path / "log", every=1, line=None, tensorboard=False)
    outward = log, lt.checkpoint(tmp_path / "saved", every=5)
    run, _ = build(fails("train", 9, 2), loader, *outward, lt.flight_recorder(tmp_path / "crashes"))
    with pytest.raises(Planted):
        run.to_end()
    run.__exit__()

    again, _ = build(classify, loader, *outward)
    lt.reopen(tmp_path / "crashes", again).to_end()

    text = (tmp_path / "log" / "log.jsonl").read_text().splitlines()
    assert sum('"kind": "iterations"' in row for row in text) == 14
    assert (tmp_path / "saved" / "epoch_0001-iteration_000010.pt").exists()


def test_bad_calls(tmp_path):
    """Each says what to do."""
    run, _ = build()
    with pytest.raises(FileNotFoundError, match="reopen: there is no .*nowhere"):
        lt.reopen(tmp_path / "nowhere", run)
    with pytest.raises(FileNotFoundError, match="reopen: there is no file of a flight recorder in"):
        lt.reopen(tmp_path, run)
    with pytest.raises(ValueError, match="reopen: accept knows data, batch_size"):
        lt.reopen(tmp_path, run, accept="all")
    with pytest.raises(TypeError, match="reopen: give a run"):
        lt.reopen(tmp_path, [])
    saved = run.save(tmp_path / "saved")
    with pytest.raises(RuntimeError, match="was not left by a flight recorder"):
        lt.reopen(saved, build()[0])
    next(run)
    with pytest.raises(RuntimeError, match="reopen: the run has begun already"):
        lt.reopen(tmp_path, run)


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit",)


def test_hostile_and_damaged_files_are_refused(tmp_path):
    """No code in them runs, and nothing is changed."""
    crash(tmp_path, fails("train", 3, 3))
    (file,) = files_in(tmp_path)
    evil = tmp_path / "evil.pt"
    torch.save({**torch.load(file, weights_only=True), "crash": Evil()}, evil)
    with pytest.raises((Refused, Damaged), match="reopen: "):
        lt.reopen(evil, build()[0])
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(Refused, match="reopen: "):
        lt.reopen(tmp_path / "pickle.pt", build()[0])

    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(Damaged, match="reopen: .* is damaged"):
        lt.reopen(file, build()[0])


@pytest.mark.parametrize("key", ["pass", "sources", "progress", "parts"])
def test_a_file_that_lacks_something_is_refused(tmp_path, key):
    """With a message, not with a KeyError."""
    crash(tmp_path, fails("train", 3, 3))
    (file,) = files_in(tmp_path)
    tree = torch.load(file, weights_only=True)
    del tree[key]
    write(tmp_path / "lacks.pt", tree)

    with pytest.raises(RuntimeError, match="reopen: .*lacks.pt does not hold what this version saves"):
        lt.reopen(tmp_path / "lacks.pt", build()[0])


def test_the_file_has_no_more_than_the_batch(tmp_path):
    """A view of a large tensor is saved by itself."""
    large = torch.randn(200_000, 3)

    def source():
        return [(large[4 * n : 4 * n + 4], torch.tensor([0, 1, 0, 1])) for n in range(7)]

    crash(tmp_path, fails("train", 3, 3), source)

    assert files_in(tmp_path)[0].stat().st_size < 200_000


def test_a_device_that_is_not_here(tmp_path):
    """A batch of another machine's GPU stays on the CPU."""
    crash(tmp_path, fails("train", 3, 3))
    (file,) = files_in(tmp_path)
    tree = torch.load(file, weights_only=True)
    tree["sources"]["train"]["ahead"]["device"] = "cuda:7"
    write(file, tree)
    run, _ = build()

    assert lt.reopen(file, run).state.batch[0].device.type == "cpu"
