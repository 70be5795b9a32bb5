"""Runs that go on independently from where another one stands."""

from __future__ import annotations

import functools
import json
import random
import weakref

import attrs
import numpy
import pytest
import torch
from loops import Case, assert_same, classify, loader, network, piped
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

import looptools as lt
from looptools.checkpoints.inventory import inventory
from looptools.generators import get_generators
from looptools.means import number
from looptools.stepping.forking.own_generators import OwnGenerators


def in_turn(*runs):
    """Step them one after another, an iteration each, to their ends."""
    runs = list(runs)
    while runs:
        runs = [run for run in runs if next(run, None) is not None]


def told(run):
    """Everything that must be the same in the end, but for the time."""
    modules = inventory(run.cursor).modules
    times = ("seconds", "data_time", "iter_time", "samples_per_s", "eta")
    history = [{key: value for key, value in row.items() if key.rpartition("/")[2] not in times} for row in run.history]
    return {word: module.state_dict() for word, module in modules.items()}, history


def assert_alike(run, straight):
    (models, history), (expected, rows) = told(run), told(straight)
    assert history == rows
    for word in expected:
        assert_same(models[word], expected[word])


def check_forks_anywhere(make, positions):
    """After each of *positions* iterations: two forks and the run itself end as one that was never forked."""
    straight = make()
    straight.to_end()
    for position in positions:
        run = make()
        list(run.take(position))
        a, b = run.fork(2)
        assert (a.progress.iteration, len(a.history)) == (run.progress.iteration, len(run.history))
        torch.rand(3)  # what the user draws is nothing to a fork
        in_turn(a, b)
        assert_alike(a, straight)
        assert_alike(b, straight)


# The same bits


@pytest.mark.parametrize(
    "case",
    [
        Case(optimizer="AdamW", max_norm=0.5, accumulate=3, cosine=True),
        Case(accumulate=4, across_epochs=True, cosine=True, epochs=3),
        Case(optimizer="Adam", length_known=False, accumulate=2),
        Case(autocast=torch.bfloat16, max_value=0.1),
    ],
    ids=["hard", "across-epochs", "unknown-length", "bf16"],
)
def test_at_every_iteration(case):
    """Fresh, in a window, within and between passes, in the middle of validation, at the very end."""
    check_forks_anywhere(lambda: piped(case), range(15))


def test_two_workers():
    """Each fork has workers of its own, and the order that the run's loader was in."""
    check_forks_anywhere(lambda: piped(Case(workers=2)), [0, 4])


def test_the_run_itself_goes_on_in_any_turn():
    """It keeps the process's generators, and forks leave these alone."""
    straight, run = piped(Case(cosine=True)), piped(Case(cosine=True))
    straight.to_end()
    run = piped(Case(cosine=True))
    list(run.take(4))
    a, b = run.fork(2)
    next(b)
    in_turn(a, run, b)
    c = run.fork(1)[0]
    in_turn(c)

    for one in (a, b, run, c):
        assert_alike(one, straight)
    assert a.ended == run.ended == c.ended == straight.ended


def test_a_fork_of_a_fork():
    """It begins with the generators of that fork, not with those of the process."""
    straight = piped(Case())
    straight.to_end()
    run = piped(Case())
    list(run.take(2))
    (a,) = run.fork(1)
    list(a.take(3))
    run.to_end()
    (b,) = a.fork(1)
    in_turn(b, a)

    assert_alike(a, straight)
    assert_alike(b, straight)


def everything(scheduler, scaled):
    torch.manual_seed(0)
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    lr = scheduler(sgd)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3) if scaled else None
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    step = functools.partial(outputs, scale=2.0)
    train = lt.train(model, loader(), step) | lt.schedule_lr(sgd, lr) | Counting()
    train = train | lt.optimize(sgd, max_norm=1.0, scaler=scaler) | lt.ema(averaged)
    val = lt.validate(averaged, loader(shuffle=False), step) | lt.measure(
        {"worst": lambda logits, labels: logits.max()}, lambda state: (state.outputs["logits"], state.batch[1])
    )
    return lt.workflow([(train, 1), (val, 1)], max_epochs=3) | lt.timer() | lt.log(line=None, every=3)


def outputs(model, batch, *, scale):
    logits = model(batch[0])
    return {"loss": nn.functional.cross_entropy(logits, batch[1]) * scale, "logits": logits}


class Counting:
    """A part of a plain class, whose memory changes the loss."""

    def __init__(self):
        self.seen = [0]
        self._private = 0

    def __call__(self, states):
        for state in states:
            self.seen[0] += 1
            self._private += 1
            state.loss = state.loss * (1 + self.seen[0] / 10 + self._private / 7)
            yield state


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
@pytest.mark.parametrize(
    "scheduler",
    [
        lambda sgd: lt.schedules.cosine(),
        lambda sgd: StepLR(sgd, 4, 0.5),
        lambda sgd: CosineAnnealingLR(sgd, 21),
        lambda sgd: LambdaLR(sgd, lambda done: 1 / (1 + done)),
        lambda sgd: OneCycleLR(sgd, 0.1, total_steps=30),
    ],
    ids=["cosine", "step", "cosine-of-torch", "lambda", "one-cycle"],
)
def test_with_everything(scheduler, scaled):
    """Schedules of both kinds, a scaler, an average of weights, measured metrics, a part of a plain class."""
    check_forks_anywhere(lambda: everything(scheduler, scaled), [0, 1, 7, 10, 16])


def test_frozen_parts():
    """What freeze holds in the run, a fork's own freeze holds and gives back; what the user froze stays."""

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(*network(), nn.BatchNorm1d(2))
        model[5].eval()
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        train = lt.train(model, loader(), classify) | lt.freeze("0", "1", until=lt.epochs(2)) | lt.optimize(sgd)
        return lt.workflow([(train, 1), (lt.validate(model, loader(), classify), 1)], max_epochs=3)

    straight = make()
    flags = [module.training for _ in straight for module in straight.model.modules()]
    for position in (3, 7, 10, 14, 20):
        run = make()
        mine = [module.training for _ in run.take(position) for module in run.model.modules()]
        (a,) = run.fork(1)
        assert mine + [module.training for _ in a for module in a.model.modules()] == flags
        assert_alike(a, straight)
        assert [p.requires_grad for p in a.model.parameters()] == [p.requires_grad for p in straight.model.parameters()]


def test_lbfgs_whose_copy_torch_forgets_half_of(model, batches):
    """Attributes that an optimizer has besides state and groups come along."""
    lbfgs = torch.optim.LBFGS(model.parameters(), lr=0.1)
    train = lt.train(model, batches, lambda model, batch: model(batch).pow(2)) | lt.optimize(lbfgs)
    run = lt.workflow([(train, 1)], max_epochs=2)
    next(run)
    (a,) = run.fork(1)
    in_turn(a, run)

    assert torch.equal(a.model.w, run.model.w)


def test_gradients_are_there_to_be_looked_at(train, model):
    """As they are in the run after an update."""
    run = lt.workflow([(train, 1)], max_epochs=1)
    list(run.take(2))
    (a,) = run.fork(1)

    assert a.model.w.grad == model.w.grad == 2.0
    assert a.model.w.grad is not model.w.grad


# Data


class Noisy(Dataset):
    """Draws from a generator of its own."""

    def __init__(self):
        self.data = torch.arange(12.0)
        self.noise = numpy.random.default_rng(3)

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return self.data[index].reshape(1) + self.noise.random(dtype="float32")


class Stream(IterableDataset):
    def __init__(self):
        self.data, self.at = torch.arange(12.0), 0

    def __iter__(self):
        self.at = 0
        for value in self.data:
            self.at += 1
            yield value.reshape(1) * self.at


def noisy(**options):
    return DataLoader(Noisy(), 2, **options)


@pytest.mark.parametrize(
    "source",
    [
        lambda: noisy(shuffle=True, generator=torch.Generator().manual_seed(5)),
        lambda: noisy(sampler=RandomSampler(range(12), generator=torch.Generator().manual_seed(5))),
        lambda: DataLoader(Stream(), 2),
        lambda: lt.seeded(noisy(shuffle=True), seed=1),
        lambda: DataLoader([torch.ones(1)] * 6, 2, shuffle=True, num_workers=2, persistent_workers=True),
    ],
    ids=["generator", "sampler", "stream", "seeded", "persistent-workers"],
)
def test_data_with_generators_of_its_own(source):
    """Each fork draws what the run would have drawn, in whatever turn."""

    def make():
        torch.manual_seed(0)
        model = nn.Linear(1, 1)
        sgd = torch.optim.SGD(model.parameters(), lr=0.001)
        train = lt.train(model, source(), lambda model, batch: model(batch).mean()) | lt.optimize(sgd)
        return lt.workflow([(train, 1)], max_epochs=3)

    straight = make()
    straight.to_end()
    for position in (0, 2, 6, 7):
        run = make()
        list(run.take(position))
        a, b = run.fork(2)
        in_turn(a, run, b)
        for one in (a, b, run):
            assert_alike(one, straight)


def test_a_data_set_is_shared_unless_it_has_a_state(model):
    """One with a generator is copied, but not the tensors in it."""
    step = lambda model, batch: model.w * 0  # noqa: E731
    plain, own = DataLoader([torch.ones(1)] * 4, 2, shuffle=True), noisy()
    (a,) = lt.workflow([(lt.train(model, plain, step), 1), (lt.train(model, own, step), 1)], max_epochs=2).fork(1)

    first, second = (phase.source for phase in a._agenda.phases)
    assert first is not plain
    assert first.dataset is plain.dataset is first.sampler.data_source
    assert second.dataset is not own.dataset
    assert second.dataset.noise is not own.dataset.noise
    assert second.dataset.data is own.dataset.data


def test_a_source_that_can_be_walked_through_once_is_refused(model, batches):
    """Runs would take batches from each other."""
    run = lt.workflow([(lt.train(model, iter(batches), lambda model, batch: model(batch)), 1)], max_epochs=1)

    with pytest.raises(RuntimeError, match="the source of train can be walked through only once"):
        run.fork(2)


def test_a_function_that_shares_a_generator_is_refused(model):
    """The loader behind it is one for all."""
    shared = DataLoader(range(4), generator=torch.Generator(), shuffle=True)
    run = lt.workflow([(lt.train(model, lambda: iter(shared), lambda model, batch: model.w), 1)], max_epochs=1)

    with pytest.raises(
        RuntimeError, match=r"the source of train: lambda uses 'shared', which is this run's random generator"
    ):
        run.fork(2)


# What is shared must not hold the run's own


@pytest.fixture
def train(model, sgd, batches):
    return lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)


def test_a_closure_that_holds_the_model_is_refused(model, sgd, batches):
    """The error names the step, its variable and the cure."""

    def mine(net, batch):
        return model(batch)

    run = lt.workflow([(lt.train(model, batches, mine) | lt.optimize(sgd), 1)], max_epochs=1)

    with pytest.raises(
        RuntimeError, match=r"train/forward: mine uses 'model', which is this run's model;.*Use the model"
    ):
        run.fork(2)


KEPT = None


def global_part(states):
    for state in states:
        helper()
        yield state


def helper():
    return KEPT.zero_grad


def test_a_global_that_a_function_uses_is_refused(train, sgd, monkeypatch):
    """Also of a function that the part's calls."""
    monkeypatch.setitem(globals(), "KEPT", sgd)

    with pytest.raises(RuntimeError, match=r"train/global_part: helper uses 'KEPT', which is this run's optimizer;"):
        lt.workflow([(train | global_part, 1)], max_epochs=1).fork(2)


def test_an_attribute_of_the_name_of_a_global_is_no_use_of_it(train, model, monkeypatch):
    """``state.KEPT`` is another thing."""
    monkeypatch.setitem(globals(), "KEPT", model)

    def part(states):
        for state in states:
            state.metrics["kept"] = getattr(state.metrics, "KEPT", 0) or (state.metrics.KEPT if False else 0)
            yield state

    assert len(lt.workflow([(train | part, 1)], max_epochs=1).fork(2)) == 2


def test_hooks_and_weak_references_are_looked_at(train, model):
    """A module's hook is a function too; a hook on a parameter has no copy."""
    reference = weakref.ref(model)
    handle = model.register_forward_hook(lambda *given: reference() and None)
    run = lt.workflow([(train, 1)], max_epochs=1)
    with pytest.raises(RuntimeError, match="lambda uses 'reference', which is this run's model"):
        run.fork(2)
    handle.remove()
    model.w.register_hook(lambda gradient: gradient)

    with pytest.raises(RuntimeError, match="model.w has a hook"):
        run.fork(2)


def test_a_function_that_uses_the_run_is_refused(train):
    """It would stop the original."""
    box = {}

    def part(states):
        for state in states:
            box["run"].progress
            yield state

    box["run"] = run = lt.workflow([(train | part, 1)], max_epochs=1)

    with pytest.raises(RuntimeError, match="part uses 'box', which is this run;.*state.run"):
        run.fork(2)


class Holder:
    """A part that holds what it needs, by name and in lists; its method is another one."""

    def __init__(self, model, optimizer):
        self.models, self.params, self.optimizer = {"w": model}, list(model.parameters()), optimizer

    def __call__(self, states):
        for state in states:
            state.metrics["w"] = self.params[0].detach().clone()
            yield state

    def step(self, model, batch):
        return self.models["w"](batch)


def test_attributes_and_bound_arguments_are_copied(model, sgd, batches):
    """Parts with lists and dictionaries, bound methods as steps, functions with bound arguments."""
    holder = Holder(model, sgd)

    def noted(states, weight):
        for state in states:
            state.metrics["also"] = weight.detach().clone()
            yield state

    train = lt.train(model, batches, holder.step) | holder | functools.partial(noted, weight=model.w)
    run = lt.workflow([(train | lt.optimize(sgd), 1)], max_epochs=2)
    (a,) = run.fork(1)
    list(run.take(2))  # the weight is at 3 - 1 - 2 = 0
    state = next(a)

    assert state.metrics["w"] == state.metrics["also"] == 3.0
    assert a.model.w == 2.0
    assert model.w == 0.0
    assert a["Holder"].models["w"] is a.model is a["forward"].step.__self__.models["w"]
    assert a["Holder"].optimizer is a.optimizer


def test_what_cannot_be_copied_is_named(train):
    """An open file, a lock, a tensor with a graph."""
    part = Counting()
    part.handle = open(__file__)  # noqa: SIM115
    run = lt.workflow([(train | part, 1)], max_epochs=1)

    with pytest.raises(RuntimeError, match=r"train/Counting could not be copied \(TypeError.*open files"):
        run.fork(2)
    part.handle.close()


# Places


def test_refused_while_an_iteration_is_open(train):
    """At its boundary it can be forked."""
    run = lt.workflow([(train, 1)], max_epochs=1)
    run.after("backward")
    with pytest.raises(RuntimeError, match="an iteration is open"):
        run.fork(2)
    next(run)

    assert [one.progress.iteration for one in run.fork(2)] == [1, 1]


def test_refused_within_its_own_workflow(train):
    """The fork would come to the same function, and fork again."""
    run = lt.workflow([(lambda run: run.fork(2), 1), (train, 1)], max_epochs=1)

    with pytest.raises(RuntimeError, match="the run is at work"):
        next(run)


def test_forks_of_a_run_that_has_ended(train):
    """They have ended too, and can be extended."""
    run = lt.workflow([(train, 1)], max_epochs=1)
    run.to_end()
    (a,) = run.fork(1)
    assert (a.ended, a.results) == (run.ended, run.results)
    a.extend(max_epochs=2)

    assert len(list(a)) == 3
    assert (a.progress.epoch, run.progress.epoch) == (2, 1)


def test_names_of_replaced_parts_and_muted_ones(train):
    """The pipe as it stands by now."""
    run = lt.workflow([(train, 1)], max_epochs=1) | lt.timer() | lt.memory()
    run.replace("memory", Counting())
    run.cursor.run_slots[0].muted = True
    (a,) = run.fork(1)

    assert [slot.name for slot in a.cursor.slots] == [slot.name for slot in run.cursor.slots]
    assert isinstance(a["memory"], Counting)
    assert a.cursor.run_slots[0].muted


def test_a_pipe_that_was_changed_by_hand(train, model):
    """What was put in, before forward too, taken out and muted by hand, with the changes themselves."""

    def scaled(states):
        for state in states:
            state.batch = state.batch * 2
            yield state

    run = lt.workflow([(train | lt.timer() | Counting(), 1)], max_epochs=3) | lt.memory()
    next(run)
    run.insert(scaled, before="forward")
    run.insert(Counting(), after="backward")
    run.remove("timer")
    run.mute("memory")
    next(run)
    (a,) = run.fork(1)
    (b,) = a.fork(1)
    in_turn(a, run, b)

    names = [slot.name for slot in run.cursor.slots]
    assert names[0] == "train/scaled"
    assert [slot.name for slot in b.cursor.slots] == [slot.name for slot in a.cursor.slots] == names
    assert (a.cursor.run_slots[0].muted, a.changes) == (True, run.changes)
    assert a.model.w == b.model.w == model.w


# Options


def rates(run, n=100):
    return [state.lr for state in run.take(n)]


def test_lr_of_each_without_a_schedule(train):
    """Three iterations with each; the run itself keeps its own."""
    run = lt.workflow([(train, 1)], max_epochs=1)
    a, b = run.fork(lr=[0.5, 0.25])

    assert (rates(a), rates(b), rates(run)) == ([0.5] * 3, [0.25] * 3, [1.0] * 3)
    assert (*map(number, (a.model.w, b.model.w, run.model.w)),) == (0.0, 1.5, -3.0)


@pytest.mark.parametrize("began", [0, 1, 3])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda sgd: lt.schedules.poly(),
        lambda sgd: StepLR(sgd, 2, 0.5),
        lambda sgd: LambdaLR(sgd, lambda done: 1 / (1 + done)),
        lambda sgd: torch.optim.lr_scheduler.SequentialLR(sgd, [StepLR(sgd, 1, 0.5), StepLR(sgd, 2, 0.1)], [2]),
    ],
    ids=["poly", "step", "lambda", "sequential"],
)
def test_lr_is_what_a_schedule_begins_from(model, batches, schedule, began):
    """Half the base value is half of all that follows."""
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    train = lt.train(model, batches, lambda model, batch: model(batch))
    run = lt.workflow([(train | lt.schedule_lr(sgd, schedule(sgd)) | lt.optimize(sgd), 1)], max_epochs=2)
    list(run.take(began))
    a, b = run.fork(lr=[0.5, 1.0])

    expected = rates(run)
    assert rates(b) == pytest.approx(expected)
    assert rates(a) == pytest.approx([rate / 2 for rate in expected])


def test_a_change_by_hand_gives_way_to_the_new_base_value(model, batches):
    """The user's last word counts."""
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    train = lt.train(model, batches, lambda model, batch: model(batch))
    run = lt.workflow([(train | lt.schedule_lr(sgd, lt.schedules.constant()) | lt.optimize(sgd), 1)], max_epochs=3)
    next(run)
    sgd.param_groups[0]["lr"] = 3.0
    with pytest.warns(UserWarning, match="changed by hand from 1 to 3"):
        next(run)
    a, b = run.fork(2)
    (c,) = run.fork(lr=[0.5])

    assert (rates(a, 2), rates(b, 2), rates(c, 2)) == ([3.0, 3.0], [3.0, 3.0], [0.5, 0.5])


def test_several_options_and_groups(model, batches):
    """Each in every group that has it."""
    other = nn.Parameter(torch.ones(()))
    model.other = other
    sgd = torch.optim.SGD([{"params": [model.w], "lr": 1.0}, {"params": [other]}], lr=0.1, momentum=0.9)
    train = lt.train(model, batches, lambda model, batch: model(batch) * model.other) | lt.optimize(sgd)
    a, b = lt.workflow([(train, 1)], max_epochs=1).fork(lr=[0.5, 0.25], momentum=[0.0, 0.5])

    assert [(group["lr"], group["momentum"]) for group in a.optimizer.param_groups] == [(0.5, 0.0)] * 2
    assert [(group["lr"], group["momentum"]) for group in b.optimizer.param_groups] == [(0.25, 0.5)] * 2
    assert [group["lr"] for group in sgd.param_groups] == [1.0, 0.1]


def test_one_cycle_has_bounds_of_its_own(model, batches):
    """What lr would mean there is not plain."""
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = OneCycleLR(sgd, 0.1, total_steps=30)
    train = lt.train(model, batches, lambda model, batch: model(batch)) | lt.schedule_lr(sgd, scheduler)
    run = lt.workflow([(train | lt.optimize(sgd), 1)], max_epochs=1)

    with pytest.raises(ValueError, match="lr is moved by OneCycleLR between bounds of its own"):
        run.fork(lr=[0.1, 0.2])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, TypeError, "say how many"),
        ({"n": 0}, ValueError, "fork: n must be"),
        ({"lr": 0.1}, TypeError, r"a value of lr for each run, as in lr=\[0.1\]"),
        ({"lr": []}, ValueError, "as many of everything as there are runs, got lr: 0"),
        ({"n": 3, "lr": [1, 2]}, ValueError, "got n: 3, lr: 2"),
        ({"lr": [1, 2], "momentum": [1]}, ValueError, "got lr: 2, momentum: 1"),
        ({"lrr": [1, 2]}, LookupError, "no optimizer has an option 'lrr'. There are: lr, momentum"),
        ({"n": 2, "folders": ["a"]}, ValueError, "got n: 2, folders: 1"),
        ({"folders": "a"}, TypeError, r"folders=\['a'\]"),
        ({"folders": ["a", "a"]}, ValueError, "a is given twice"),
    ],
)
def test_bad_options(train, given, error, message):
    """Refused before anything is copied."""
    run = lt.workflow([(train, 1)], max_epochs=1)

    with pytest.raises(error, match=message):
        run.fork(*([given.pop("n")] if "n" in given else []), **given)


# Files


def test_parts_that_write_are_muted(train, tmp_path):
    """Nothing of a fork comes into the run's folder, and what it says nobody hears."""
    lines = []
    run = lt.workflow([(train, 1)], max_epochs=2) | lt.log(tmp_path, line=lines.append, every=1)
    run = run | lt.checkpoint(tmp_path, every=1) | lt.profile(wait=0, warmup=1, active=1, line=lines.append)
    next(run)
    before = [path.name for path in sorted(tmp_path.rglob("*"))]
    said, rows = list(lines), (tmp_path / "log.jsonl").read_text()
    a, b = run.fork(2)
    in_turn(a, b)
    a.close()

    assert [path.name for path in sorted(tmp_path.rglob("*"))] == before
    assert (lines, (tmp_path / "log.jsonl").read_text()) == (said, rows)
    assert [slot.muted for slot in a.cursor.run_slots] == [True, True, True]
    run.to_end()
    assert torch.equal(a.model.w, run.model.w)


def test_folders_of_their_own(train, tmp_path):
    """Rows and checkpoints of what the fork itself did, under an id of its own; it can be resumed from there."""

    def make(folder):
        return (
            lt.workflow([(train, 1)], max_epochs=2) | lt.log(folder / "log", line=None) | lt.checkpoint(folder, every=2)
        )

    run = make(tmp_path / "run")
    list(run.take(4))
    files = sorted(tmp_path.rglob("*"))
    (tmp_path / "a" / "log").mkdir(parents=True)
    (tmp_path / "a" / "log" / "log.jsonl").write_text("of another run\n" * 99)
    a, b = run.fork(folders=[tmp_path / "a", tmp_path / "b"])
    in_turn(a, b)

    assert set(files) <= set(tmp_path.rglob("*"))
    rows = [json.loads(line) for line in (tmp_path / "a" / "log" / "log.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [5]
    assert (tmp_path / "a" / "log" / "log.1.jsonl").read_text().startswith("of another run")
    ids = [json.loads((tmp_path / name / "checkpoints.json").read_text())["run"] for name in ("run", "a", "b")]
    assert len(set(ids)) == 3
    run.close()
    with torch.no_grad():
        run.model.w.fill_(7.0)
    again = make(tmp_path / "a")
    again.resume()
    assert torch.equal(again.model.w, a.model.w)


def test_the_run_s_own_folder_is_refused(train, tmp_path):
    """Two runs in one folder would lose one of them."""
    run = lt.workflow([(train, 1)], max_epochs=2) | lt.log(tmp_path, line=None)

    with pytest.raises(ValueError, match="is the run's own. Give each fork a folder of its own"):
        run.fork(folders=[tmp_path, tmp_path / "b"])


def test_a_fork_is_saved_as_any_run_is(tmp_path):
    """With its own generators, and with what its parts of plain classes remember from before the fork."""

    class Remembering:
        def __init__(self):
            self.best, self.count = 0, 0

        def __call__(self, states):
            for state in states:
                self.best = 5 if state.iteration == 0 else self.best
                self.count += 1
                state.loss = state.loss * self.best
                yield state

    def make():
        torch.manual_seed(0)
        model = network()
        sgd = torch.optim.SGD(model.parameters(), lr=0.01)
        phase = lt.train(model, loader(), classify) | Remembering() | lt.optimize(sgd)
        return lt.workflow([(phase, 1)], max_epochs=2)

    run = make()
    list(run.take(3))
    (a,) = run.fork(1)
    list(a.take(1))
    drawn = torch.get_rng_state()
    torch.rand(5)
    a.save(tmp_path)
    again = make()
    again.resume(tmp_path)
    with OwnGenerators(get_generators()):
        again.to_end()
    torch.set_rng_state(drawn)
    in_turn(a, run)

    assert again["Remembering"].best == 5
    assert_alike(a, run)
    assert_alike(again, run)


def test_validating_on_demand_draws_from_the_fork_s_own(model):
    """As the run itself would have drawn, between two of its iterations."""

    def make():
        torch.manual_seed(0)
        net = network()
        sgd = torch.optim.SGD(net.parameters(), lr=0.05)
        return lt.workflow([(lt.train(net, loader(), classify) | lt.optimize(sgd), 1)], max_epochs=2)

    straight = make()
    list(straight.take(2))
    straight.validate(lt.validate(straight.model, loader(), classify))
    straight.to_end()
    run = make()
    list(run.take(2))
    (a,) = run.fork(1)
    torch.rand(9), random.random()
    a.validate(lt.validate(a.model, loader(), classify))
    a.to_end()

    assert_same(a.model.state_dict(), straight.model.state_dict())


def test_a_fork_that_is_reset_keeps_its_own_generators():
    """Being built anew does not lose them: the process's stand still."""
    (a,) = piped(Case()).fork(1)
    next(a)
    a.reset()
    before = torch.get_rng_state()
    next(a)

    assert torch.equal(torch.get_rng_state(), before)


def test_a_schedule_in_a_fork_of_a_run_that_began_is_not_begun_anew(model, batches):
    """The value that the schedule wrote last is no base value."""
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    phase = lt.train(model, batches, lambda model, batch: model(batch))
    run = lt.workflow([(phase | lt.schedule_lr(sgd, lt.schedules.poly()) | lt.optimize(sgd), 1)], max_epochs=2)
    list(run.take(3))
    sgd.param_groups[0]["lr"] = 0.25  # by hand, half of the half
    (a,) = run.fork(1)
    with pytest.warns(UserWarning, match="changed by hand"):
        mine = rates(a)
    with pytest.warns(UserWarning, match="changed by hand"):
        assert mine == rates(run)


def test_a_compiled_model():
    """The copy runs the copy."""
    torch.manual_seed(0)
    model = torch.compile(nn.Linear(1, 1), backend="eager")
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    phase = lt.train(model, [torch.ones(2, 1)] * 3, lambda model, batch: model(batch).mean()) | lt.optimize(sgd)
    run = lt.workflow([(phase, 1)], max_epochs=2)
    list(run.take(2))
    a, b = run.fork(lr=[0.1, 0.0])
    in_turn(a, b)
    before = b.model._orig_mod.weight.clone()
    run.to_end()

    assert torch.equal(a.model._orig_mod.weight, model._orig_mod.weight)
    assert torch.equal(b.model._orig_mod.weight, before)


@attrs.define(eq=False)
class Spike:
    """A part of the user's, with memory in fields."""

    model: nn.Module
    seen: int = attrs.field(default=0, init=False)

    def __call__(self, states):
        for state in states:
            self.seen += 1
            with torch.no_grad():
                self.model.w.add_(self.seen)
            yield state


def test_a_part_of_the_user_s_own_with_fields(train, model):
    """Options are mapped onto the copies, memory comes along."""
    run = lt.workflow([(train | Spike(model), 1)], max_epochs=2)
    next(run)
    a, b = run.fork(2)
    in_turn(b, a, run)

    assert a.model.w == b.model.w == run.model.w
    assert a["Spike"].seen == 6


def test_options_must_be_numbers():
    """A text would fail somewhere within."""
    model = network()
    train = lt.train(model, loader(), classify) | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1))

    with pytest.raises(TypeError, match=r"fork: lr must be numbers, as in lr=\[1e-3, 3e-4\], got 'a'"):
        lt.workflow([(train, 1)], max_epochs=1).fork(lr=["a", "b"])
