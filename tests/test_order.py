"""Orders that cannot be right, each with the same parts in an order that can."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import looptools as lt
from looptools import order


def own(states):
    """A part of the user's own may do anything."""
    yield from states


def square(model, batch):
    return model(batch).pow(2)


def cosine(p):
    return lt.schedule_lr(p.sgd, lt.schedules.cosine())


def clip(p, max_norm=1.0):
    return lt.clip_grad_norm(p.model.parameters(), max_norm)


def scaler():
    return torch.amp.GradScaler("cpu")


def copied(p):
    """Another optimizer of the same weights."""
    return torch.optim.SGD(p.model.parameters(), lr=1.0)


def guarded(p):
    return lt.chain(lt.backward(p.sgd), lt.nan_guard(), lt.update(p.sgd))


@pytest.fixture
def p(model, sgd, batches):
    """p.model, p.sgd, p.train, p.more, p.val."""
    train, val = lt.train(model, batches, square), lt.validate(model, batches, square)
    more = lt.train(model, batches, square, name="more")
    return SimpleNamespace(model=model, sgd=sgd, train=train, more=more, val=val, optimize=lt.optimize(sgd))


def build(pipe):
    """Build the run, and do nothing."""
    run = lt.workflow([(pipe, 1)], max_rounds=1) if isinstance(pipe, lt.Phase) else pipe
    assert run.cursor is not None


REFUSED = {
    "clip behind update": (
        lambda p: p.train | p.optimize | clip(p),
        r"clip_grad_norm: train/clip_grad_norm stands behind train/update.* lt.optimize\(optimizer, max_norm=...\)",
    ),
    "clip by value behind update": (
        lambda p: p.train | p.optimize | lt.clip_grad_value(p.model.parameters(), 1.0),
        r"clip_grad_value: train/clip_grad_value stands behind train/update.* lt.optimize\(optimizer, max_value=...\)",
    ),
    "noise behind update": (
        lambda p: p.train | p.optimize | lt.grad_noise(p.model.parameters()),
        "grad_noise: train/grad_noise stands behind train/update",
    ),
    "clip on the run": (
        lambda p: lt.workflow([(p.train | p.optimize, 1)], max_epochs=1) | clip(p),
        "clip_grad_norm: run/clip_grad_norm stands behind train/update",
    ),
    "clip before backward": (
        lambda p: p.train | clip(p) | p.optimize,
        "clip_grad_norm: train/clip_grad_norm stands before train/backward, which only then fills the gradients",
    ),
    "clip before a closure": (
        lambda p: p.train | clip(p) | lt.update_by_closure(p.sgd),
        "clip_grad_norm: train/clip_grad_norm stands before train/update_by_closure",
    ),
    "schedule behind update": (
        lambda p: p.train | p.optimize | cosine(p),
        "schedule_lr: train/schedule_lr stands behind train/update, whose first update it would miss. Put it before",
    ),
    "schedule on the run": (
        lambda p: lt.workflow([(p.train | p.optimize, 1), (p.val, 1)], max_epochs=1) | cosine(p),
        "schedule_lr: run/schedule_lr stands behind train/update",
    ),
    "update before backward": (
        lambda p: p.train | lt.update(p.sgd) | lt.backward(p.sgd),
        r"update: train/update stands before train/backward.* lt.optimize\(optimizer\) on",
    ),
    "ema before update": (
        lambda p: p.train | lt.ema(AveragedModel(p.model)) | p.optimize,
        "ema: train/ema stands before train/update.* Put it behind",
    ),
    "backward twice": (
        lambda p: p.train | lt.backward(p.sgd) | p.optimize,
        r"backward: train/backward and train/backward#2 .* from one loss.* or put lt.forward\(step\) between",
    ),
    "backward and closure": (
        lambda p: p.train | p.optimize | lt.update_by_closure(p.sgd),
        "update_by_closure: train/backward and train/update_by_closure fill the gradients of one optimizer",
    ),
    "update twice": (
        lambda p: p.train | p.optimize | lt.update(p.sgd),
        "update: train/update and train/update#2 move the weights of one optimizer twice by the same gradients",
    ),
    "schedule twice": (
        lambda p: p.train | cosine(p) | cosine(p) | p.optimize,
        "schedule_lr: train/schedule_lr and train/schedule_lr#2 set 'lr' of the same optimizer",
    ),
    "the same part twice": (
        lambda p: p.train | lt.backward(p.sgd) | clip(p) | clip(p) | lt.update(p.sgd),
        "clip_grad_norm: train/clip_grad_norm and train/clip_grad_norm#2 are the same part twice",
    ),
    "two averages": (
        lambda p: p.train | p.optimize | lt.average() | lt.average(window=2),
        "average: train/average and train/average#2 are the same part twice",
    ),
    "logs into one folder": (
        lambda p: lt.workflow([(p.val, 1)], max_rounds=1) | lt.log(p.folder) | lt.log(p.folder, every=2),
        "log: run/log and run/log#2 write into the same folder",
    ),
    "checkpoints into one folder": (
        lambda p: lt.workflow([(p.val, 1)], max_rounds=1) | lt.checkpoint(p.folder) | lt.checkpoint(p.folder, keep=1),
        "checkpoint: run/checkpoint and run/checkpoint#2 write into the same folder, .* a folder of its own",
    ),
    "watch before backward": (
        lambda p: p.train | lt.watch(p.model) | p.optimize,
        r"watch: it stands before backward, where gradients are those of the .* \| lt.watch\(model\) \| lt.update",
    ),
    "watch before a closure": (
        lambda p: p.train | lt.watch(p.model) | lt.update_by_closure(p.sgd),
        "watch: it stands before update_by_closure",
    ),
    "unused_params before backward": (
        lambda p: p.train | lt.unused_params(p.model) | p.optimize,
        r"unused_params: it stands before backward, .* \| lt.unused_params\(model\) \| lt.update",
    ),
    "guard behind update": (
        lambda p: p.train | p.optimize | lt.nan_guard(),
        "nan_guard: it stands behind update, where the weights have moved already",
    ),
    "a scaler on backward only": (
        lambda p: p.train | lt.backward(p.sgd, scaler=scaler()) | lt.update(p.sgd),
        r"update: train/backward and train/update share an optimizer, but only train/backward has a scaler. Give both "
        r"the same: lt.optimize\(optimizer, scaler=scaler\)",
    ),
    "a scaler on update only": (
        lambda p: p.train | lt.backward(p.sgd) | clip(p) | lt.update(p.sgd, scaler=scaler()),
        "update: train/backward and train/update share an optimizer, but only train/update has a scaler",
    ),
    "two scalers": (
        lambda p: p.train | lt.backward(p.sgd, scaler=scaler()) | lt.update(p.sgd, scaler=scaler()),
        "update: train/backward and train/update have two scalers",
    ),
    "schedule without updates": (
        lambda p: p.train | cosine(p),
        r'schedule_lr: train/schedule_lr counts updates \(by="update"\), but no part .* by hand, give by="iteration"',
    ),
    "warm-up by epoch without updates": (
        lambda p: p.train | lt.schedule_lr(p.sgd, lt.schedules.cosine(), warmup=2, by="epoch"),
        r'schedule_lr: train/schedule_lr counts updates \(by="epoch"\)',
    ),
    "torch's scheduler without updates": (
        lambda p: p.train | lt.schedule_lr(p.sgd, torch.optim.lr_scheduler.StepLR(p.sgd, 1)),
        "schedule_lr: train/schedule_lr counts updates",
    ),
    "schedule of an optimizer that nobody moves": (
        lambda p: p.train | lt.schedule_lr(copied(p), lt.schedules.cosine()) | p.optimize,
        "schedule_lr: train/schedule_lr counts updates",
    ),
    "ema without updates": (
        lambda p: p.train | lt.ema(AveragedModel(p.model)),
        r'ema: train/ema counts updates \(by="update"\), but no part of the pipe makes any',
    ),
    "ema on a run without updates": (
        lambda p: lt.workflow([(p.train, 1), (p.val, 1)], max_epochs=1) | lt.ema(AveragedModel(p.model)),
        "ema: run/ema counts updates",
    ),
    "optimize in a validation": (
        lambda p: p.val | p.optimize,
        r"backward: val is a validation phase, which has no gradients.* lt.train\(...\) \| lt.optimize\(optimizer\)",
    ),
    "optimize behind all phases": (
        lambda p: lt.workflow([(p.train, 1), (p.val, 1)], max_rounds=1) | p.optimize,
        "backward: piped onto the run, it comes behind val too",
    ),
}

SOUND = {
    "the usual": lambda p: p.train | cosine(p) | lt.optimize(p.sgd, max_norm=1.0, max_value=1.0),
    "part by part": lambda p: p.train | lt.backward(p.sgd) | clip(p) | cosine(p) | lt.update(p.sgd),
    "a norm measured behind": lambda p: p.train | p.optimize | clip(p, float("inf")),
    "measured, then clipped": lambda p: (
        p.train | lt.backward(p.sgd) | clip(p, float("inf")) | clip(p) | lt.update(p.sgd)
    ),
    "own part behind clip": lambda p: p.train | p.optimize | clip(p) | own,
    "own part before clip": lambda p: p.train | own | clip(p) | p.optimize,
    "own part between backwards": lambda p: p.train | lt.backward(p.sgd) | own | p.optimize,
    "own part before update": lambda p: p.train | own | lt.update(p.sgd) | lt.backward(p.sgd),
    "own part in a validation": lambda p: p.val | own | p.optimize,
    "own part twice": lambda p: p.train | own | own | p.optimize,
    "own part before watch": lambda p: (
        p.train | own | lt.watch(p.model) | lt.unused_params(p.model) | lt.forward(square) | p.optimize
    ),
    "watch that sees weights only": lambda p: p.train | lt.watch(p.model, gradients=False) | p.optimize,
    "own part before guard": lambda p: p.train | p.optimize | own | lt.nan_guard() | p.optimize,
    "guard behind another backward": lambda p: p.train | p.optimize | lt.forward(square) | guarded(p),
    "own part before ema": lambda p: p.train | own | lt.ema(AveragedModel(p.model)) | p.optimize,
    "own part between scalers": lambda p: p.train | lt.backward(p.sgd, scaler=scaler()) | own | lt.update(p.sgd),
    "clip between two updates": lambda p: (
        p.train | p.optimize | lt.forward(square) | lt.backward(p.sgd) | clip(p) | lt.update(p.sgd)
    ),
    "timer on the phase and on the run": lambda p: (
        lt.workflow([(p.train | p.optimize | lt.timer(), 1)], max_epochs=1) | lt.timer()
    ),
    "a scaler on both": lambda p: p.train | lt.optimize(p.sgd, max_norm=1.0, scaler=scaler()),
    "counted by iteration": lambda p: (
        p.train
        | lt.schedule_lr(p.sgd, lt.schedules.cosine(), warmup=2, by="iteration")
        | lt.ema(AveragedModel(p.model), by="iteration")
    ),
    "counted by epoch": lambda p: p.train | lt.schedule_lr(p.sgd, lt.schedules.cosine(), by="epoch"),
    "plateau without updates": lambda p: lt.workflow(
        [(p.train | lt.schedule_lr(p.sgd, lt.schedules.plateau(lt.lowest("val/loss"))), 1), (p.val, 1)],
        max_epochs=1,
    ),
    "update in another phase": lambda p: lt.workflow(
        [(p.train | cosine(p), 1), (p.more | p.optimize, 1)], max_epochs=1
    ),
    "ema on a run with an update in one phase": lambda p: (
        lt.workflow([(p.train, 1), (p.more | p.optimize, 1)], max_epochs=1) | lt.ema(AveragedModel(p.model))
    ),
    "torch's scheduler behind": lambda p: (
        p.train | p.optimize | lt.schedule_lr(p.sgd, torch.optim.lr_scheduler.StepLR(p.sgd, 1))
    ),
    "two options": lambda p: (
        p.train | cosine(p) | lt.schedule(p.sgd, "weight_decay", lt.schedules.linear(end=0.1)) | p.optimize
    ),
    "scheduled before each update": lambda p: (
        p.train | cosine(p) | p.optimize | lt.forward(square) | cosine(p) | p.optimize
    ),
    "a second forward": lambda p: p.train | p.optimize | lt.forward(square) | p.optimize,
    "closure": lambda p: p.train | cosine(p) | lt.update_by_closure(p.sgd) | lt.ema(AveragedModel(p.model)),
    "ema behind": lambda p: p.train | p.optimize | lt.ema(AveragedModel(p.model)),
    "ema on the run": lambda p: (
        lt.workflow([(p.train | p.optimize, 1), (p.val, 1)], max_epochs=1) | lt.ema(AveragedModel(p.model))
    ),
    "optimize on a run that only trains": lambda p: lt.workflow([(p.train, 1)], max_epochs=1) | p.optimize,
    "logs into two folders": lambda p: (
        lt.workflow([(p.val, 1)], max_rounds=1)
        | lt.log(p.folder / "a")
        | lt.log(p.folder / "b")
        | lt.checkpoint(p.folder)
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused_when_the_run_is_built(p, tmp_path, case):
    """The error names the two parts, and the cure."""
    p.folder = tmp_path
    typed, message = REFUSED[case]

    with pytest.raises(ValueError, match=message):
        build(typed(p))


@pytest.mark.parametrize("case", SOUND)
def test_what_may_be_right_is_not_refused(p, tmp_path, case):
    """Parts of the user's own may do anything; several forwards and options are fine."""
    p.folder = tmp_path

    build(SOUND[case](p))


def gan(batches):
    """Two optimizers with a forward each, as a reader would write it."""
    model = nn.ModuleDict({"g": nn.Linear(1, 1), "d": nn.Linear(1, 1)})
    g, d = (torch.optim.SGD(model[name].parameters(), lr=0.1) for name in ("g", "d"))
    d_step = lambda model, batch: model["d"](model["g"](batch).detach()).mean()  # noqa: E731
    g_step = lambda model, batch: -model["d"](model["g"](batch)).mean()  # noqa: E731
    pipe = lt.train(model, batches, d_step)
    for optimizer, name in ((d, "D"), (g, "G")):
        pipe = pipe if name == "D" else pipe | lt.forward(g_step)
        pipe = pipe | lt.schedule_lr(optimizer, lt.schedules.cosine()) | lt.optimize(optimizer, max_norm=1.0, name=name)
    return pipe, model


def test_a_gan_is_fine_and_rules_tell_its_optimizers_apart(batches):
    """Behind G's update, D's gradients are no longer of use; G's are."""
    pipe, model = gan(batches)
    build(pipe)

    with pytest.raises(ValueError, match="train/clip_grad_norm stands behind train/D.update"):
        build(pipe | lt.clip_grad_norm(model["d"].parameters(), 2.0))


def test_one_backward_for_two_optimizers_is_warned_of(batches):
    """Only its own optimizer's gradients are zeroed; a part of the user's own may see to the others."""
    _, model = gan(batches)
    first, second = (torch.optim.SGD(model[name].parameters(), lr=0.1) for name in ("g", "d"))
    train = lt.train(model, batches, lambda model, batch: model["d"](model["g"](batch)).mean())
    pipe = train | lt.backward(first) | lt.update(first)

    with pytest.warns(
        UserWarning,
        match=r"nobody zeroes the gradients that train/update#2 moves by.* lt.optimize\(\[first, second\]\)",
    ):
        build(pipe | lt.update(second))
    build(train | own | lt.backward(first) | lt.update(first) | lt.update(second))
    build(train | lt.optimize([first, second]))


def test_an_optimizer_that_shares_a_backward_and_never_moves(batches):
    """Its gradients are filled for nothing, unless the user's own part or loop moves it."""
    _, model = gan(batches)
    first, second = (torch.optim.SGD(model[name].parameters(), lr=0.1) for name in ("g", "d"))
    train = lt.train(model, batches, lambda model, batch: model["d"](model["g"](batch)).mean())
    pipe = train | lt.backward([first, second])

    with pytest.warns(UserWarning, match="backward: train/backward fills the gradients of SGD too, but nobody moves"):
        build(pipe | lt.update(first))
    build(pipe | lt.update(first) | own)
    build(pipe)  # the loop's body moves both


def test_rules_know_each_of_several_optimizers_over_one_loss(batches):
    """One that fills twice, a clip that is too late or too early, an update before its backward."""
    _, model = gan(batches)
    first, second = (torch.optim.SGD(model[name].parameters(), lr=0.1) for name in ("g", "d"))
    train = lt.train(model, batches, lambda model, batch: model["d"](model["g"](batch)).mean())
    both = lt.optimize([first, second])
    clip = lt.clip_grad_norm(model["d"].parameters(), 1.0)

    with pytest.raises(ValueError, match="train/backward and train/backward#2 fill the gradients of one optimizer"):
        build(train | both | lt.backward(second))
    with pytest.raises(ValueError, match="train/update#2 and train/update#3 move the weights of one optimizer twice"):
        build(train | both | lt.update(second))
    with pytest.raises(ValueError, match="train/clip_grad_norm stands behind train/update#2"):
        build(train | both | clip)
    with pytest.raises(ValueError, match="train/clip_grad_norm stands before train/backward"):
        build(train | clip | both)
    with pytest.raises(ValueError, match="train/update stands before train/backward"):
        build(train | lt.update(second) | lt.backward([first, second]) | lt.update(first))
    build(train | lt.backward([first, second]) | lt.update(first) | clip | lt.update(second))


def test_every_rule_is_tried_here(p, tmp_path):
    """Each of the rules has a pipe that it alone refuses first."""
    p.folder = tmp_path
    seen = set()
    for typed, _ in REFUSED.values():
        pipe = typed(p)
        run = lt.workflow([(pipe, 1)], max_rounds=1) if isinstance(pipe, lt.Phase) else pipe
        lines = order.lines(lt.run.Cursor(run, run._agenda, run._middlewares, run.progress))
        seen |= {rule for line in lines for rule in order.RULES if list(rule(line))}

    assert seen == set(order.RULES)


@pytest.mark.parametrize("part", ["schedule_lr", "ema"])
def test_a_part_of_ones_own_may_count_updates(p, part):
    """It is said as a doubt then, once, also of a part of the run."""
    parts = {"schedule_lr": cosine(p), "ema": lt.ema(AveragedModel(p.model))}

    for pipe in (
        p.train | own | parts[part],
        lt.workflow([(p.train | own, 1), (p.more, 1)], max_epochs=1) | parts[part],
    ):
        with pytest.warns(UserWarning, match=f"{part}: .* counts updates") as told:
            build(pipe)
        assert len(told) == 1


def test_an_optimizer_of_another_phases_model_is_doubted(p, batches):
    """A copy of the model that is trained, perhaps; where its own is trained as well, that is meant."""
    other = type(p.model)()
    sgd = torch.optim.SGD(other.parameters(), lr=1.0)
    val = lt.validate(other, batches, square)

    with pytest.warns(
        UserWarning, match="update: the optimizer of train/update holds no parameter of train's model, but"
    ):
        build(lt.workflow([(p.train | lt.optimize(sgd), 1), (val, 1)], max_epochs=1))
    build(lt.workflow([(p.train | p.optimize | lt.forward(square) | lt.optimize(sgd), 1), (val, 1)], max_epochs=1))


def test_folders_are_the_same_however_they_are_spelt(p, tmp_path, monkeypatch):
    """Also as a relative path."""
    monkeypatch.chdir(tmp_path)
    run = lt.workflow([(p.val, 1)], max_rounds=1) | lt.log("here", line=None)

    with pytest.raises(ValueError, match="log: run/log and run/log#2 write into the same folder, here"):
        build(run | lt.log(tmp_path / "there" / ".." / "here", line=None))


def test_a_cell_that_ran_twice_is_suspected_of_phases_only(p):
    """Parts of the run were piped on together with it."""
    again = "If a cell with `phase = phase | ...` ran twice"
    with pytest.raises(ValueError, match="update twice|same gradients") as of_phase:
        build(p.train | p.optimize | lt.update(p.sgd))
    with pytest.raises(ValueError, match="same gradients") as of_run:
        build(lt.workflow([(p.train | p.optimize, 1)], max_epochs=1) | lt.update(p.sgd))

    assert again in str(of_phase.value)
    assert again not in str(of_run.value)


def test_a_refused_run_is_not_built(p):
    """After the error the run can still be piped onto, and mended."""
    run = lt.workflow([(p.train | p.optimize, 1)], max_epochs=1) | clip(p)
    with pytest.raises(ValueError, match="stands behind"):
        next(run)

    assert "not begun" in repr(run)
    run | own


def test_a_timer_behind_the_log_is_doubted(model, sgd, batches):
    """Its numbers would be in no row."""
    phase = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)
    run = lt.workflow([(phase, 1)], max_epochs=1) | lt.log(line=None)

    with pytest.warns(UserWarning, match="timer: run/timer stands behind run/log, whose rows do not show it"):
        next(run | lt.timer())
    next(lt.workflow([(phase, 1)], max_epochs=1) | lt.timer() | lt.log(line=None))


def test_the_same_doubt_is_said_of_each_run(model, sgd, batches):
    """Python shows a warning once a line; a second run of the process has made the same mistake anew."""
    phase = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            next(lt.workflow([(phase, 1)], max_epochs=1) | lt.log(line=None) | lt.timer())

    assert [warning.filename for warning in caught] == [__file__] * 2


def test_what_is_refused_can_be_asked_for_at_any_time(p):
    """Of the pipe as it is by then; parts that are muted do not count."""
    run = lt.workflow([(p.train | p.optimize | lt.ema(AveragedModel(p.model)), 1)], max_epochs=1)
    assert (order.refusals(run.cursor), order.doubts(run.cursor)) == ([], [])

    (line,) = run.cursor.lines.values()
    line.insert(1, line.pop(3))  # ema, before backward
    (refused,) = order.refusals(run.cursor)
    assert refused.startswith("ema: train/ema stands before train/update, so it would lag an update behind.")

    line[1].muted = True
    assert order.refusals(run.cursor) == []
