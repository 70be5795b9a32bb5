"""A run's future, said beforehand and then lived through."""

from __future__ import annotations

import copy
import json
import math
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

import looptools as lt
from looptools.stepping.foreseeing.simulation import changes


class Pair(nn.Module):
    """Two weights; each optimizer, or param group, can have its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, batch):
        return self.a(batch).mean() + self.b(batch).mean()


def step(model, batch):
    return model(batch)


BATCHES = [torch.full((2, 1), float(n)) for n in range(7)]


def sgd_of(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)


def train_of(model, *parts, batches=7, name="train"):
    phase = lt.train(model, BATCHES[:batches], step, name=name)
    for part in parts:
        phase = phase | part
    return phase


def val_of(model):
    return lt.validate(model, BATCHES[:3], step)


# Pipes: each makes the entries and the bounds of a workflow, and the parts of the run


def cosine_by_update(model):
    sgd = sgd_of(model)
    train = train_of(model, lt.schedule_lr(sgd, lt.schedules.cosine(), warmup=5), lt.optimize(sgd))
    return [(train, 1), (val_of(model), 1)], {"max_epochs": 4}, [lt.log(every=3, line=None)]


def multistep_by_epoch(model):
    sgd = sgd_of(model)
    multistep = lt.schedule_lr(sgd, lt.schedules.multistep([1, 3], gamma=0.3), by="epoch", warmup=10)
    return [(train_of(model, multistep, lt.optimize(sgd)), 2), (val_of(model), 1)], {"max_epochs": 5}, []


def accumulating(model):
    sgd = sgd_of(model)
    train = train_of(model, lt.schedule_lr(sgd, lt.schedules.poly(), warmup=2), lt.optimize(sgd, accumulate=4))
    return [(train, 1), (val_of(model), 2)], {"max_epochs": 3}, [lt.log(every=lt.rounds(1), line=None)]


def across_epochs(model):
    sgd = sgd_of(model)
    optimize = lt.optimize(sgd, accumulate=4, across_epochs=True)
    train = train_of(model, lt.schedule_lr(sgd, lt.schedules.linear()), optimize)
    return [(train, 1)], {"max_epochs": 3}, [lt.log(every=lt.epochs(2), line=None)]


def across_epochs_in_mid_pass(model):
    entries, _, parts = across_epochs(model)
    return entries, {"max_iterations": 17}, parts


def list_of_schedules(model):
    groups = [{"params": model.a.parameters()}, {"params": model.b.parameters(), "lr": 0.03}]
    adam = torch.optim.AdamW(groups, lr=0.01)
    each = [lt.schedules.one_cycle(0.2), lt.schedules.step(4, gamma=0.7)]
    momentum = lt.schedule_momentum(adam, lt.schedules.one_cycle_momentum(0.8, 0.9), warmup=3)
    train = train_of(model, lt.schedule_lr(adam, each), momentum, lt.optimize(adam))
    return [(train, 1)], {"max_epochs": 3}, []


def decay_and_its_own_function(model):
    groups = lt.param_groups(model, lr=0.1, weight_decay=0.01)
    adam = torch.optim.AdamW(groups)
    decay = lt.schedule(adam, "weight_decay", lt.schedules.cosine(end=0.1), by="iteration")
    own = lt.schedule_lr(adam, lambda done, total, base: base / (1 + done), warmup=lt.epochs(1))
    return [(train_of(model, own, decay, lt.optimize(adam, accumulate=3)), 1)], {"max_epochs": 2}, []


def several_optimizers(model):
    first, second = torch.optim.SGD(model.a.parameters(), lr=0.1), torch.optim.Adam(model.b.parameters(), lr=0.2)
    train = train_of(
        model,
        lt.schedule_lr(first, lt.schedules.cosine()),
        lt.optimize(first, accumulate=3, name="D"),
        lt.forward(step),
        lt.schedule_lr(second, lt.schedules.exponential(0.9)),
        lt.optimize(second, accumulate=2, name="G"),
    )
    return [(train, 1)], {"max_epochs": 3}, [lt.log(every=5, line=None)]


def together(model):
    both = torch.optim.SGD(model.a.parameters(), lr=0.1), torch.optim.Adam(model.b.parameters(), lr=0.2)
    train = train_of(model, *(lt.schedule_lr(one, lt.schedules.cosine()) for one in both), lt.optimize(both))
    return [(train, 1)], {"max_epochs": 2}, []


def by_batches(model):
    sgd = sgd_of(model)
    train = train_of(model, lt.schedule_lr(sgd, lt.schedules.cosine(), by="iteration"), lt.optimize(sgd, accumulate=2))
    entries = [(train, lt.iterations(5)), (val_of(model), lt.iterations(2))]
    return entries, {"max_rounds": 4}, [lt.log(every=2, line=None)]


def in_mid_pass(model):
    sgd = sgd_of(model)
    train = train_of(model, lt.schedule_lr(sgd, lt.schedules.cosine(), warmup=4), lt.optimize(sgd, accumulate=2))
    return [(train, 1), (val_of(model), 1)], {"max_iterations": 17}, [lt.log(every=4, line=None)]


def two_phases_and_a_function(model):
    sgd = sgd_of(model)
    one = train_of(model, lt.schedule_lr(sgd, lt.schedules.cosine()), lt.optimize(sgd))
    two = train_of(model, lt.schedule_lr(sgd, lt.schedules.poly()), lt.optimize(sgd), batches=4, name="tune")
    entries = [(lambda run: None, 1), (one, 2), (two, 1), (val_of(model), 1)]
    return entries, {"max_rounds": 2}, [lt.log(every=6, line=None)]


def stopped(model):
    entries, bounds, parts = cosine_by_update(model)
    return entries, bounds, [lt.stop_after(17), *parts]


def stopped_in_a_window(model):
    entries, bounds, parts = accumulating(model)
    return entries, bounds, [*parts, lt.stop_after(9)]


def stopped_after_rounds(model):
    entries, bounds, parts = accumulating(model)
    return entries, bounds, [*parts, lt.stop_after(lt.rounds(2)), lt.stop_after(lt.epochs(3))]


def torchs_own(model):
    sgd = sgd_of(model)
    start = torch.optim.lr_scheduler.LinearLR(sgd, 0.1, total_iters=5)
    then = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 16)
    both = torch.optim.lr_scheduler.SequentialLR(sgd, [start, then], [5])
    return [(train_of(model, lt.schedule_lr(sgd, both), lt.optimize(sgd)), 1)], {"max_epochs": 3}, []


def torchs_own_by_epoch(model):
    sgd = sgd_of(model)
    torchs = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.5)
    return [(train_of(model, lt.schedule_lr(sgd, torchs, by="epoch"), lt.optimize(sgd)), 1)], {"max_epochs": 3}, []


def tensor_lr(model):
    sgd = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))
    return [(train_of(model, lt.schedule_lr(sgd, lt.schedules.cosine()), lt.optimize(sgd)), 1)], {"max_epochs": 2}, []


def lbfgs(model):
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    train = train_of(model, lt.schedule_lr(optimizer, lt.schedules.linear()), lt.optimize(optimizer))
    return [(train, 1)], {"max_epochs": 2}, []


PIPES = [
    cosine_by_update,
    multistep_by_epoch,
    accumulating,
    across_epochs,
    across_epochs_in_mid_pass,
    list_of_schedules,
    decay_and_its_own_function,
    several_optimizers,
    together,
    by_batches,
    in_mid_pass,
    two_phases_and_a_function,
    stopped,
    stopped_in_a_window,
    stopped_after_rounds,
    torchs_own,
    torchs_own_by_epoch,
    tensor_lr,
    lbfgs,
]


class Sink:
    """Keeps what a row says of its place."""

    def __init__(self):
        self.rows = []

    def write(self, row, state):
        self.rows.append(tuple(row[key] for key in ("kind", "phase", "epoch", "iteration", "index")))

    def close(self):
        pass


def built(pipe):
    """A run over one of the pipes; a log has a sink."""
    torch.manual_seed(0)
    entries, bounds, parts = pipe(Pair())
    run = lt.workflow(entries, **bounds)
    for part in parts:
        run = run | (lt.log(every=part.every, line=None, to=[Sink()]) if isinstance(part, lt.log) else part)
    return run


def optimizers(run):
    found = run.cursor and run.optimizer
    return found if isinstance(found, dict) else {"optimizer": found}


def value(group, option):
    held = group[option] if option in group else group["betas"][0]
    return float(held)


def live(run, options):
    """Go to the end: the options after each training iteration, those in which each optimizer moved, and the passes."""
    values = {o: {n: [[] for _ in one.param_groups] for n, one in optimizers(run).items()} for o in options}
    updates, passes = {name: [] for name in optimizers(run)}, []
    counts = {name: run.progress.updates.get(one, 0) for name, one in optimizers(run).items()}
    for state in run:
        if state.first or not passes:
            passes.append([state.phase, 0])
        passes[-1][1] += 1
        for name, one in optimizers(run).items() if state.trains else ():
            moved, counts[name] = run.progress.updates.get(one, 0) - counts[name], run.progress.updates.get(one, 0)
            updates[name] += [state.iteration] * moved
            for option in options:
                for column, group in zip(values[option][name], one.param_groups):
                    column.append(value(group, option))
    return values, updates, passes


def rows_of(sim):
    return [(e.text, e.phase, e.epoch, e.iteration, e.index) for e in sim.events if e.kind == "log"]


def sinks(run):
    return [row for slot in run.cursor.run_slots if isinstance(slot.part, lt.log) for row in slot.part.to[0].rows]


def require_same(run, sim, before=0):
    """What was foreseen is what comes, to the bit."""
    values, updates, passes = live(run, list(sim.curves))
    for option, optimizers_ in sim.curves.items():
        assert optimizers_ == {name: values[option][name] for name in optimizers_}
    assert {name: list(at) for name, at in sim.updates.items()} == updates
    assert [[one.phase, one.length] for one in sim.passes if not one.function] == passes
    assert rows_of(sim) == sinks(run)[before:]
    done = run.progress
    assert (sim.epochs, sim.iterations, sim.rounds) == (done.epoch, done.iteration, done.round)
    assert sim.ended == run.ended
    assert all(isinstance(one, float) for _, _, column in sim.columns() for one in column)


@pytest.mark.parametrize("pipe", PIPES, ids=lambda pipe: pipe.__name__)
def test_it_agrees_with_the_run(pipe):
    """Every learning rate of every iteration, every update, row and pass, and how it ends."""
    run = built(pipe)
    sim = run.simulate()

    require_same(run, sim)


@pytest.mark.parametrize("taken", [1, 6, 9, 11])
@pytest.mark.parametrize("pipe", PIPES, ids=lambda pipe: pipe.__name__)
def test_it_agrees_from_where_the_run_stands(pipe, taken):
    """In the middle of a window, a pass, a round or a validation: what is still to come."""
    run = built(pipe)
    list(run.take(taken))
    before = len(sinks(run))
    sim = run.simulate()

    assert sim.begins == run.progress.iteration
    require_same(run, sim, before)


@pytest.mark.parametrize("taken", [0, 5, 8])
@pytest.mark.parametrize("pipe", [cosine_by_update, across_epochs, torchs_own, list_of_schedules, stopped])
def test_it_agrees_with_a_resumed_run(pipe, taken, tmp_path):
    """A new run that stands where another was saved."""
    first = built(pipe)
    list(first.take(taken))
    first.save(tmp_path)
    run = built(pipe)
    run.resume(tmp_path)

    require_same(run, run.simulate())


def test_the_end_that_was_moved():
    """After `extend` schedules stretch, in the simulation as in the run."""
    run = built(cosine_by_update)
    list(run.take(9))
    run.extend(max_epochs=6)
    before = len(sinks(run))

    require_same(run, run.simulate(), before)


@pytest.mark.parametrize("factor", [0.5, 0.0])
def test_a_value_changed_by_hand(factor):
    """It rescales what follows, which is said when it happens, not when it is simulated; of 0 comes 0."""
    run = built(accumulating)
    list(run.take(4))
    run.optimizer.param_groups[0]["lr"] *= factor
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sim = run.simulate()

    with pytest.warns(UserWarning, match="changed by hand"):
        require_same(run, sim)


def test_a_value_changed_by_hand_between_two_runs():
    """A fresh run over an optimizer that another one has scheduled begins from the hand's value."""
    first = built(cosine_by_update)
    list(first.take(5))
    first.optimizer.param_groups[0]["lr"] = 0.5
    sgd = first.optimizer
    train = train_of(first.model, lt.schedule_lr(sgd, lt.schedules.cosine()), lt.optimize(sgd))
    run = lt.workflow([(train, 1)], max_epochs=2)
    sim = run.simulate()

    assert sim.lr["optimizer"][0][0] == 0.5
    require_same(run, sim)


def test_a_part_that_is_muted():
    """A muted schedule writes nothing, a muted log no rows."""
    run = built(cosine_by_update)
    list(run.take(3))
    for slot in run.cursor.slots:
        slot.muted = slot.name in ("train/schedule_lr", "run/log")
    run.cursor.line_up(run.phase)
    sim, before = run.simulate(), len(sinks(run))

    assert set(sim.lr["optimizer"][0]) == {run.optimizer.param_groups[0]["lr"]}
    require_same(run, sim, before)


CHECKPOINTS = [
    {"every": lt.rounds(1)},
    {"every": 5},
    {"every": lt.epochs(2), "at_end": False},
    {"every": lt.epochs(3)},
    {"every": 7, "best": lt.lowest("val/loss")},
    {"every": lt.iterations(100)},
]


@pytest.mark.parametrize("taken", [0, 10])
@pytest.mark.parametrize("options", CHECKPOINTS, ids=str)
@pytest.mark.parametrize("pipe", [in_mid_pass, accumulating, stopped], ids=lambda pipe: pipe.__name__)
def test_it_names_the_files_that_will_be_saved(pipe, options, taken, tmp_path):
    """In order, with the numbers that keep names apart."""
    run = built(pipe) | lt.checkpoint(tmp_path, keep=None, **options)
    list(run.take(taken))
    before = saved(tmp_path)
    sim = run.simulate()
    assert saved(tmp_path) == before

    run.to_end()

    assert before + [e.text for e in sim.events if e.kind == "checkpoint"] == saved(tmp_path)


def saved(folder):
    if not (folder / "checkpoints.json").exists():
        return []
    return [entry["file"] for entry in json.loads((folder / "checkpoints.json").read_text())["checkpoints"]]


def test_a_resumed_run_saves_its_end_only_if_it_trains(tmp_path):
    """What it was resumed from is the newest one, as long as only validation follows."""
    first = built(cosine_by_update) | lt.checkpoint(tmp_path, every=lt.epochs(1), keep=None)
    list(first.take(37))  # all but the last validation
    first.close()
    before = saved(tmp_path)
    run = built(cosine_by_update) | lt.checkpoint(tmp_path, every=lt.epochs(1), keep=None)
    run.resume()
    sim = run.simulate()
    run.to_end()

    assert [e.text for e in sim.events if e.kind == "checkpoint"] == saved(tmp_path)[len(before) :] == []


def test_names_of_files_that_have_gone_are_free_again(model, tmp_path):
    """Rounds without training have the same numbers; with keep=1 two names take turns."""
    run = lt.workflow([(val_of(model), 1)], max_rounds=4) | lt.checkpoint(tmp_path, keep=1)
    names = [e.text for e in run.simulate().events if e.kind == "checkpoint"]
    written = []
    for _ in range(4):
        list(run.take(3))
        written += saved(tmp_path)

    assert names == written
    assert len(set(names)) == 2


@pytest.mark.parametrize("until", [lt.epochs(2), 10, lt.rounds(1), None])
@pytest.mark.parametrize("taken", [0, 4])
def test_it_says_when_a_freeze_thaws(until, taken):
    """The first iteration whose forward trains what was frozen is the one behind the thaw."""
    model = Pair()
    sgd = sgd_of(model)
    train = train_of(model, lt.freeze("a", until=until), lt.optimize(sgd))
    run = lt.workflow([(train, 1), (val_of(model), 1)], max_epochs=4)
    list(run.take(taken))
    marks = {e.kind: e for e in run.simulate().events if e.kind in ("freeze", "thaw")}
    live = [s.iteration for s in run if s.trains and model.a.weight.grad is not None]

    thawed = [mark.iteration + ("before" not in mark.text) for kind, mark in marks.items() if kind == "thaw"]

    assert marks["freeze"].iteration == taken
    assert thawed == live[:1]
    assert bool(live) is (until is not None)


@pytest.mark.parametrize(
    "average",
    [
        lambda averaged: lt.ema(averaged, every=2, start=3),
        lambda averaged: lt.ema(averaged, by="iteration", every=4),
        lambda averaged: lt.swa(averaged, start=lt.epochs(2)),
        lambda averaged: lt.swa(averaged, start=9, every=2),
    ],
)
@pytest.mark.parametrize("taken", [0, 9])
def test_it_counts_averages(average, taken):
    """How often the weights are taken in, from here on."""
    model = Pair()
    sgd, averaged = sgd_of(model), AveragedModel(model)
    train = train_of(model, lt.optimize(sgd, accumulate=3), average(averaged))
    run = lt.workflow([(train, 1)], max_epochs=4)
    list(run.take(taken))
    before = int(averaged.n_averaged)
    (count,) = run.simulate().averages.values()

    run.to_end()

    assert count == int(averaged.n_averaged) - before > 0


def test_nothing_is_changed(tmp_path):
    """No batch, no step, no weight, no file, no random number, no counter, no scheduler."""
    model, drawn = Pair(), []
    sgd = sgd_of(model)
    torchs = torch.optim.lr_scheduler.OneCycleLR(sgd, 0.3, total_steps=20)

    class Never(Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            raise AssertionError("a batch was fetched")

    train = lt.train(model, DataLoader(Never(), shuffle=True), lambda model, batch: drawn.append(batch))
    train = train | lt.schedule_lr(sgd, torchs) | lt.freeze("a", until=lt.epochs(1)) | lt.optimize(sgd)
    run = lt.workflow([(lambda run: drawn.append(run), 1), (train, 1)], max_epochs=2)
    run = run | lt.log(tmp_path, line=drawn.append) | lt.checkpoint(tmp_path)
    run.cursor  # built as by any other first use
    weights, generators = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    held = copy.deepcopy((sgd.state_dict(), torchs.state_dict(), run.progress))

    sim = run.simulate()

    assert len(sim.lr["optimizer"][0]) == 10
    assert (drawn, list(tmp_path.iterdir()), run.begun) == ([], [], False)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generators)
    assert (sgd.state_dict(), torchs.state_dict()) == held[:2]
    assert repr(run.progress) == repr(held[2])
    assert (model.a.weight.requires_grad, run["freeze"].thawed) == (True, False)


def test_what_hangs_on_results_is_unknown_by_name(tmp_path):
    """A plateau's values are nan, never guessed; parts that may stop or skip are said."""
    model = Pair()
    sgd = sgd_of(model)
    drop = lt.schedule_lr(sgd, lt.schedules.plateau(lt.lowest("val/loss")))

    def shout(states):
        for state in states:
            yield state

    train = train_of(model, drop, lt.optimize(sgd, between=lt.nan_guard(skip=2)), shout)
    run = lt.workflow([(train, 1), (val_of(model), 1)], max_epochs=2)
    run = run | lt.early_stop(lt.lowest("val/loss")) | lt.stop_after(lt.target("val/loss", at_most=0))
    run = run | lt.log(every=lt.seconds(60), line=None) | lt.checkpoint(tmp_path, best=lt.lowest("val/loss"))
    sim = run.simulate()

    assert all(map(math.isnan, sim.lr["optimizer"][0]))
    assert len(list(sim.updates["optimizer"])) == 14
    names = [text.partition(":")[0] for text in sim.unknown]
    assert names == [
        "train/schedule_lr",
        "train/nan_guard",
        "train/shout",
        "run/early_stop",
        "run/stop_after",
        "run/log",
        "run/checkpoint",
    ]
    assert "unknown: train/schedule_lr: the lr is unknown: plateau depends on what happens in the run" in str(sim)


def test_a_scheduler_of_ones_own_class_is_unknown():
    """It may look at anything."""

    class Own(torch.optim.lr_scheduler.ExponentialLR):
        pass

    model = Pair()
    sgd = sgd_of(model)
    train = train_of(model, lt.schedule_lr(sgd, Own(sgd, 0.9)), lt.optimize(sgd))
    sim = lt.workflow([(train, 1)], max_epochs=1).simulate()

    assert all(map(math.isnan, sim.lr["optimizer"][0]))
    assert "Own is not one of torch's own schedulers" in sim.unknown[0]


def test_a_source_without_length_is_refused_unless_iterations_bound_the_run():
    """Where passes end, nobody knows; how many iterations there are, max_iterations says."""
    model = Pair()
    sgd = sgd_of(model)
    train = lt.train(model, lambda: iter(BATCHES), step)
    train = train | lt.schedule_lr(sgd, lt.schedules.multistep([3])) | lt.optimize(sgd)

    with pytest.raises(TypeError, match="the source of train has no length"):
        lt.workflow([(train, 1)], max_epochs=2).simulate()
    run = lt.workflow([(train, 1)], max_iterations=10) | lt.log(every=4, line=None)
    sim = run.simulate()
    values, updates, _ = live(run, ["lr"])

    assert (sim.lr, sim.updates) == (values["lr"], {name: range(10) for name in updates})
    assert [e.iteration for e in sim.events if e.kind == "log"] == [3, 7]
    assert (sim.epochs, sim.ended) == (None, "finished: ? epochs, 10 iterations")
    assert "where passes end is unknown" in sim.unknown[0]


def test_windows_across_passes_need_no_ends():
    """The last one closes with max_iterations."""
    model = Pair()
    sgd = sgd_of(model)
    optimize = lt.optimize(sgd, accumulate=2, across_epochs=True)
    train = lt.train(model, lambda: iter(BATCHES), step) | lt.schedule_lr(sgd, lt.schedules.linear()) | optimize
    run = lt.workflow([(train, 1)], max_iterations=9)
    sim = run.simulate()
    values, updates, _ = live(run, ["lr"])

    assert (sim.lr, sim.updates) == (values["lr"], updates) == (values["lr"], {"optimizer": [1, 3, 5, 7, 8]})


def test_windows_of_passes_that_end_nobody_knows_where():
    """Their last ones may be short: so what counts updates is unknown, and what counts iterations is not."""
    model = Pair()
    sgd = sgd_of(model)
    steps = lt.schedules.multistep([3])
    parts = lt.schedule_lr(sgd, steps), lt.schedule_momentum(sgd, steps, by="iteration"), lt.optimize(sgd, accumulate=2)
    train = lt.train(model, lambda: iter(BATCHES), step)
    for part in parts:
        train = train | part
    sim = lt.workflow([(train, 1)], max_iterations=5).simulate()

    assert all(map(math.isnan, sim.lr["optimizer"][0]))
    assert sim.curves["momentum"]["optimizer"] == [[0.9, 0.9, 0.9, 0.9 * 0.1, 0.9 * 0.1]]
    assert sim.updates == {}
    assert "train/backward: which iterations update is unknown" in sim.unknown


def test_a_validation_without_length_is_no_hindrance():
    """Everything else is known all the same."""
    model = Pair()
    sgd = sgd_of(model)
    val = lt.validate(model, lambda: iter(BATCHES[:2]), step)
    run = lt.workflow([(train_of(model, lt.optimize(sgd)), 1), (val, 1)], max_epochs=2)
    sim = run.simulate()
    values, *_ = live(run, ["lr"])

    assert (sim.lr, sim.ended) == (values["lr"], run.ended)
    assert [one.length for one in sim.passes] == [7, None, 7, None]
    assert sim.unknown == ("val: its source has no length",)


def test_an_open_iteration_is_refused():
    """It is neither done nor to come."""
    run = built(cosine_by_update)
    run.after("backward")

    with pytest.raises(RuntimeError, match="simulate: an iteration is open"):
        run.simulate()


def test_a_run_that_is_over_has_nothing_to_come():
    """It says why it has ended."""
    run = built(cosine_by_update)
    run.to_end()
    sim = run.simulate()

    assert (sim.passes, sim.ended, sim.lr["optimizer"]) == ((), run.ended, [[]])
    assert [(event.kind, event.text) for event in sim.events] == [("end", run.ended)]
    assert str(sim).splitlines()[-1] == "end: finished: 4 epochs, 28 iterations"


def test_functions_of_the_workflow_are_listed():
    """Not called, since they may do anything."""

    def refresh(run):
        raise AssertionError

    model = Pair()
    train = train_of(model, lt.optimize(sgd_of(model)))
    sim = lt.workflow([(train, 1), (refresh, 1)], max_epochs=2).simulate()

    assert [(e.kind, e.phase) for e in sim.events if e.kind in ("pass", "call")] == [
        ("pass", "train"),
        ("call", "refresh"),
    ] * 2
    assert sim.unknown == ("workflow: refresh(run) is not called, whatever it does",)


def test_events_say_each_change_of_a_value():
    """Where a value stays for long; one that always moves has its ends once a pass."""
    by_epoch = [(e.iteration, e.text) for e in built(torchs_own_by_epoch).simulate().events if e.kind == "lr"]
    moving = [e.text for e in built(cosine_by_update).simulate().events if e.kind == "lr"]

    assert by_epoch == [(0, "0.1"), (7, "0.05"), (14, "0.025")]
    assert len(moving) == 4 * 7  # seven values a pass are few
    assert changes([1.0, 1.0, 2.0, math.nan, math.nan]) == [2, 3]


def imagenet(tmp_path, schedule):
    class Images(Dataset):
        def __init__(self, n):
            self.n = n

        def __len__(self):
            return self.n

        def __getitem__(self, index):
            raise AssertionError("a batch was fetched")

    model = Pair()
    sgd = sgd_of(model)
    train = lt.train(model, DataLoader(Images(1_281_167), 256, shuffle=True), step)
    train = train | schedule(sgd) | lt.optimize(sgd)
    val = lt.validate(model, DataLoader(Images(50_000), 256), step)
    run = lt.workflow([(train, 1), (val, 1)], max_epochs=90)
    return run | lt.log(tmp_path, every=50, line=None) | lt.checkpoint(tmp_path)


def test_ninety_epochs_of_imagenet_are_a_few_calls_an_update(tmp_path):
    """450,450 iterations without states; `python benchmarks/simulate.py` times it."""
    run = imagenet(tmp_path, lambda sgd: lt.schedule_lr(sgd, lt.schedules.cosine(), warmup=lt.epochs(5)))
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event == "call"

    len(run)  # builds it
    sys.setprofile(count)
    try:
        sim = run.simulate()
    finally:
        sys.setprofile(None)

    assert sim.iterations == len(sim.lr["optimizer"][0]) == len(list(sim.updates["optimizer"])) == 450_450
    assert len(rows_of(sim)) == 450_450 // 50 + 180
    assert len([e for e in sim.events if e.kind == "checkpoint"]) == 90
    assert calls < 2 * 450_450


def test_the_table_of_ninety_epochs_is_short(tmp_path):
    """Rounds that are alike share their lines."""
    steps = lt.schedules.multistep([30, 60])
    sim = imagenet(tmp_path, lambda sgd: lt.schedule_lr(sgd, steps, by="epoch")).simulate()

    assert str(sim).splitlines() == [
        "simulation: 90 epochs, 450450 iterations, 450450 updates",
        "epoch (from 1)  pass   batches  lr     rows  what else",
        "1 to 30         train     5005  0.1    3033",
        "1 to 30         val        196           30  30 saved, the last epoch_0030-iteration_150150.pt",
        "31 to 60        train     5005  0.01   3033",
        "31 to 60        val        196           30  30 saved, the last epoch_0060-iteration_300300.pt",
        "61 to 90        train     5005  0.001  3033",
        "61 to 90        val        196           30  30 saved, the last epoch_0090-iteration_450450.pt",
        "end: finished: 90 epochs, 450450 iterations",
    ]


def test_a_long_table_is_cut():
    """What differs from pass to pass cannot be folded, but a screen is a screen."""
    model = Pair()
    sgd = sgd_of(model)
    odd = lt.schedule_lr(sgd, lambda done, total, base: base * (1 + done // 14 % 3), by="iteration")
    sim = lt.workflow([(train_of(model, odd, lt.optimize(sgd)), 1)], max_epochs=200).simulate()

    assert len(str(sim).splitlines()) <= 46
    assert "more lines: .passes has each pass" in str(sim)


def test_the_head_says_from_where():
    """A run that is half done has the rest before it."""
    run = built(several_optimizers)
    list(run.take(9))

    assert str(run.simulate()).splitlines()[:3] == [
        "simulation: 3 epochs, 21 iterations; from iteration 9 on: 6 updates of optimizer, 7 updates of optimizer#2",
        "epoch (from 1)  pass                 batches  lr optimizer       lr optimizer#2      rows",
        "2               train, from batch 2        5  0.075 to 0.04132   0.1181 to 0.09566      2",
    ]


def test_it_shows_itself_in_a_notebook():
    """The curve and the table, escaped."""
    shown = built(cosine_by_update).simulate()._repr_html_()

    assert [piece in shown for piece in ("<svg", "<pre", "28 updates", "end: finished")] == [True] * 4


def test_plot_draws_each_option(tmp_path):
    """A panel for the learning rate, one for the momentum; groups that are alike once."""
    figure = built(list_of_schedules).simulate().plot(path=tmp_path / "plots" / "future.png")

    assert [axes.get_title(loc="left") for axes in figure.axes] == ["lr", "momentum"]
    assert len(figure.axes[0].get_lines()[:2]) == 2
    assert (tmp_path / "plots" / "future.png").exists()


def test_plot_without_matplotlib_names_the_extra(monkeypatch):
    """As the other figures do."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    monkeypatch.delattr("looptools.figures.Figure", raising=False)

    with pytest.raises(ModuleNotFoundError, match=r"simulate\(\).plot needs matplotlib.*torch-looptools\[plot\]"):
        built(cosine_by_update).simulate().plot()
