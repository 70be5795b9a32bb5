"""Putting parts in, taking them out and muting them, between any two parts of any iteration."""

from __future__ import annotations

import json
import types
from collections.abc import Callable

import attrs
import pytest
import torch
from loops import Planted, assert_same, classify, loader, network

import looptools as lt
from looptools.archives.files import write
from looptools.checkpoints.changes import kept_changes

# As by hand: one change, made between any two parts of an iteration


def halve(states):
    for state in states:
        for parameter in state.model.parameters():
            parameter.grad.mul_(0.5)
        yield state


def smoothed(model, batch):
    images, labels = batch
    return torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=0.2)


STAGES = ["batches", "forward", "backward", "clip_grad_norm", "update", "average", "seen"]
CHANGES: dict[str, tuple[Callable, dict]] = {
    "clip": (lambda run, params: run.replace("clip_grad_norm", lt.clip_grad_norm(params, 0.05)), {"max_norm": 0.05}),
    "step": (lambda run, params: run.replace("classify", smoothed), {"step": smoothed}),
    "remove": (lambda run, params: run.remove("clip_grad_norm"), {"max_norm": None}),
    "insert": (lambda run, params: run.insert(halve, before="update"), {"halve": True}),
    "insert behind": (lambda run, params: run.insert(halve, after="clip_grad_norm"), {"halve": True}),
    "mute": (lambda run, params: run.mute("clip_grad_norm"), {"max_norm": None}),
    "freeze": (lambda run, params: run.mute("update"), {"moves": False}),
    "none": (lambda run, params: (run.mute("update"), run.mute("update", False)), {}),
}


def make():
    torch.manual_seed(0)
    model = network()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), list(loader(shuffle=False))


def hand_loop(changes, behind, at=3):
    model, sgd, batches = make()
    now = types.SimpleNamespace(step=lambda m, b: classify(m, b)["loss"], max_norm=0.5, halve=False, moves=True)
    model.train()
    for index, batch in enumerate(batches):
        for stage in STAGES:
            if stage == "forward":
                loss = now.step(model, batch)
            elif stage == "backward":
                sgd.zero_grad()
                loss.backward()
            elif stage == "clip_grad_norm" and now.max_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), now.max_norm)
            elif stage == "update":
                if now.halve:
                    for parameter in model.parameters():
                        parameter.grad.mul_(0.5)
                if now.moves:
                    sgd.step()
            if index == at and stage == behind:
                vars(now).update(changes)
    return model.state_dict()


def stepped(change, behind, at=3):
    def seen(states):
        for state in states:
            yield state

    model, sgd, batches = make()
    train = lt.train(model, batches, classify) | lt.optimize(sgd, max_norm=0.5)
    run = lt.workflow([(train, 1)], max_epochs=1) | seen
    list(run.take(at))
    for name, _ in run.stages():
        if name.endswith(f"/{behind}"):
            change(run, list(model.parameters()))
            break
    run.to_end()
    return model.state_dict()


@pytest.mark.parametrize("behind", STAGES)
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_between_any_two_parts_is_that_of_the_loop_by_hand(what, behind):
    """What the state has come past acts from the next iteration on, all else in this one."""
    change, settings = CHANGES[what]

    assert_same(stepped(change, behind), hand_loop(settings, behind))


# Inserting


def adding(amount, seen=None):
    def add(states):
        for state in states:
            state.metrics["sum"] = state.metrics.get("sum", 0) + amount
            if seen is not None:
                seen.append((state.phase, state.iteration))
            yield state

    return add


@pytest.fixture
def run(model, sgd, batches):
    """Weights 3, 2, 0, -3 over an epoch of three batches, then a validation on one."""
    step = lambda model, batch: model(batch)  # noqa: E731
    train = lt.train(model, batches, step) | lt.optimize(sgd)
    return lt.workflow([(train, 1), (lt.validate(model, batches[:1], step), 1)], max_epochs=2)


def names(run, scope="train"):
    return [slot.name for slot in run.cursor.slots if slot.name.startswith(f"{scope}/")]


def test_insert_puts_a_part_where_it_is_told(run):
    """Before or behind the named one, of a phase or of the run."""
    run.insert(adding(1), before="update")
    run.insert(lt.nan_guard(), after="train/forward")
    run.insert(lt.timer(), before="val/average")

    assert names(run) == [f"train/{n}" for n in ("forward", "nan_guard", "backward", "add", "update", "average")]
    assert names(run, "val") == ["val/forward", "val/timer", "val/average"]


def test_insert_takes_a_chain_apart(model, sgd, batches):
    """Its parts come one after the other, with the chain's name before theirs."""
    train = lt.train(model, batches, lambda model, batch: model(batch)) | adding(1)
    run = lt.workflow([(train, 1)], max_epochs=1)

    run.insert(lt.optimize(sgd, max_norm=9.0, name="D"), after="add")
    run.to_end()

    assert names(run)[2:5] == ["train/D.backward", "train/D.clip_grad_norm", "train/D.update"]
    assert model.w.item() == -3
    assert run.optimizer is sgd


def test_names_that_are_there_stay(run):
    """The second of a name is #2, wherever it stands; one that was removed is free again."""
    run.insert(adding(1), before="update")
    run.insert(adding(2), before="backward")
    run.insert(adding(3), after="backward")
    assert names(run)[1:5] == ["train/add#2", "train/backward", "train/add#3", "train/add"]

    run.remove("train/add")
    run.insert(adding(4), before="update")
    assert names(run)[1:5] == ["train/add#2", "train/backward", "train/add#3", "train/add"]


def test_insert_before_the_forward(run):
    """There it sees what the source gave, and may drop it."""

    def drop_the_second(states):
        for state in states:
            if state.index != 1 or not state.trains:
                yield state

    run.insert(drop_the_second, before="train/forward")

    assert [s.index for s in run if s.trains] == [0, 2, 0, 2]


def test_an_inserted_part_is_an_instance_of_its_own(run):
    """What is given is options, as when it is piped on."""
    given = lt.timer()

    run.insert(given, before="train/average")

    assert run["train/timer"] is not given


def test_an_inserted_part_is_told_what_is_over(run):
    """on_build, on_start if the run has begun, on_pass if the pass under way goes through it."""
    told = []

    class Told:
        def on_build(self, run):
            told.append("build")

        def on_start(self, run):
            told.append("start")

        def on_pass(self, run):
            told.append("pass")

        def __call__(self, states):
            yield from states

    run.insert(Told(), before="val/average")
    assert told == ["build"]
    run.remove("Told")
    told.clear()
    next(run)
    run.insert(Told(), before="val/average")
    assert told == ["build", "start"]
    run.remove("Told")
    told.clear()

    run.insert(Told(), before="train/average")

    assert told == ["build", "start", "pass"]


def test_what_is_inserted_behind_a_stop_runs_in_this_iteration(run):
    """Also directly where it stopped; what it has come past comes with the next one."""
    state = run.after("backward")

    run.insert(adding(1), before="backward")
    run.insert(adding(10), after="backward")
    next(run)

    assert state.metrics["sum"] == 10
    assert next(run).metrics["sum"] == 11


def test_a_part_of_the_run_is_inserted_beside_one(run):
    """It has one generator for the whole run, and sees all phases from then on."""
    seen = []
    run = run | lt.timer()
    list(run.take(2))

    run.insert(adding(1, seen), before="timer")
    list(run.take(3))

    assert names(run, "run") == ["run/add", "run/timer"]
    assert seen == [("train", 2), ("val", 2), ("train", 3)]


def test_a_part_that_failed_stays_the_one_that_comes_next(run):
    """What was put before it comes with run.retry(), or the next iteration."""
    run.insert(raising_once(1), before="update")
    with pytest.raises(Planted):
        run.to_end()

    run.insert(adding(1), before="fragile")
    assert run.failed.part == "train/fragile"
    state = next(run)

    assert "sum" not in state.metrics
    assert next(run).metrics["sum"] == 1


def raising_once(*iterations):
    left = list(iterations)

    def fragile(states):
        for state in states:
            if state.iteration in left:
                left.remove(state.iteration)
                raise Planted
            yield state

    return fragile


def test_a_failed_backward_is_still_redone_from_its_forward(model, sgd, batches):
    """Whatever is put in between meanwhile sees the state on that way."""
    left = [1]

    def step(model, batch):
        loss = model(batch)
        if left and batch.mean() == 2:
            left.clear()
            loss.register_hook(fail)
        return loss

    def fail(grad):
        raise Planted

    run = iter(lt.train(model, batches, step) | lt.optimize(sgd))
    with pytest.raises(Planted):
        run.to_end()
    assert run.failed.part == "train/backward"

    run.insert(adding(1), before="backward")
    assert next(run).metrics["sum"] == 1
    run.to_end()

    assert model.w.item() == -3


def refused(run, error, match, verb, *args, **options):
    """The error says so, and nothing has changed: neither the pipe, nor where it stands, nor what is noted."""
    before = (list(run.cursor.slots), [slot.part for slot in run.cursor.slots], run.cursor.at, list(run.cursor.line))
    with pytest.raises(error, match=match) as caught:
        getattr(run, verb)(*args, **options)
    assert before[:2] == (run.cursor.slots, [slot.part for slot in run.cursor.slots])
    assert before[2:] == (run.cursor.at, run.cursor.line)
    assert run.changes == []
    return caught.value


def test_insert_refuses_what_a_new_run_would_refuse(run, sgd, model):
    """With the same words."""
    run.after("backward")
    clip = lt.clip_grad_norm(model.parameters(), 1.0)

    error = refused(run, ValueError, "stands behind train/update, which has moved", "insert", clip, after="update")
    refused(run, ValueError, "move the weights of one optimizer twice", "insert", lt.update(sgd), before="update")
    refused(run, ValueError, "which has no gradients", "insert", lt.optimize(sgd), before="val/average")
    refused(run, TypeError, "pipe it onto the run", "insert", lt.log(), before="train/average")
    refused(run, TypeError, "log is a class. Give it its options", "insert", lt.log, before="train/average")
    refused(run, ValueError, "that no model of the run holds", "insert", strange(), before="train/average")
    assert error.__notes__ == ["looptools: insert has changed nothing."]
    run.to_end()
    assert run.progress.iteration == 6


def strange():
    return lt.backward(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))]))


def test_insert_needs_one_place(run):
    """Before, or after; a part's name."""
    refused(run, TypeError, "insert: give one of before= and after=", "insert", lt.timer())
    refused(
        run,
        TypeError,
        "insert: give one of before= and after=",
        "insert",
        lt.timer(),
        before="update",
        after="backward",
    )
    refused(run, LookupError, "insert: there is no part 'updat'", "insert", lt.timer(), before="updat")
    refused(run, LookupError, "matches train/forward, val/forward", "insert", lt.timer(), after="forward")
    refused(
        run, LookupError, "insert: batches is no part, but the phase's source", "insert", lt.timer(), after="batches"
    )


def test_nothing_comes_behind_the_average(run):
    """A script could not pipe it there either; before it, or onto the run."""
    refused(
        run,
        ValueError,
        "train/average comes last, .* before='train/average'",
        "insert",
        lt.timer(),
        after="train/average",
    )


def test_a_part_that_cannot_begin_is_taken_out_again(run):
    """The run goes on without it, and it is closed."""
    closed = []

    class Late:
        def on_pass(self, run):
            raise Planted("not now")

        def close(self):
            closed.append(True)

        def __call__(self, states):
            yield from states

    next(run)

    refused(run, Planted, "not now", "insert", Late(), before="update")

    assert closed == [True]
    assert len(list(run)) == 7


def test_a_log_is_inserted_as_one_that_was_piped_on(run, tmp_path):
    """It makes its folder, and writes from there on."""
    run = run | lt.timer()
    list(run.take(2))

    run.insert(lt.log(tmp_path / "logs", line=None, every=1, tensorboard=False), after="timer")
    list(run.take(2))
    run.close()

    rows = [json.loads(line) for line in (tmp_path / "logs" / "log.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["phase"]) for row in rows] == [
        ("iterations", "train"),
        ("pass", "train"),
        ("pass", "val"),
    ]


def test_a_folder_of_another_run_is_refused(run, tmp_path):
    """As before the first iteration of a run."""
    run.save(tmp_path)
    run.reset()
    run = run | lt.timer()
    next(run)

    with pytest.raises(FileExistsError, match="holds the checkpoints of another run"):
        run.insert(lt.checkpoint(tmp_path), after="timer")

    assert names(run, "run") == ["run/timer"]


def test_schedules_stretch_when_windows_change(model, sgd, batches):
    """How many updates there will be is found out anew."""
    train = lt.train(model, batches, lambda model, batch: model(batch))
    train = train | lt.schedule_lr(sgd, lt.schedules.linear(end=0.0)) | lt.optimize(sgd)
    run = lt.workflow([(train, 1)], max_epochs=2)
    assert [next(run).lr for _ in range(3)] == pytest.approx([1, 5 / 6, 4 / 6])

    run.replace("backward", lt.backward(sgd, accumulate=3))

    assert next(run).lr == pytest.approx(0.0)  # three updates are done of two


def test_leak_guard_watches_from_where_it_is_inserted(run):
    """Also generators that have begun; once it is out it does not."""

    def leaky(states):
        for state in states:
            torch.set_grad_enabled(state.iteration == 0)
            yield state

    run = run | leaky
    next(run)

    run.insert(lt.leak_guard(), after="leaky")
    with pytest.raises(RuntimeError, match="leak_guard: run/leaky left gradients"):
        next(run)
    run.remove("leak_guard")

    assert run.cursor.run_slots[0].guard is None
    torch.set_grad_enabled(True)


# Removing


def test_remove_closes_its_generator_and_the_part(run):
    """Once; what stands behind its loop runs."""
    closed = []

    class Held:
        def __call__(self, states):
            yield from states
            closed.append("loop")

        def close(self):
            closed.append("part")

    run = run | Held()
    next(run)

    run.remove("Held")
    run.to_end()

    assert closed == ["loop", "part"]


def test_the_part_behind_a_removed_one_comes_next(run):
    """Also where the open iteration stands at it."""
    run.insert(adding(1), before="update")
    state = run.before("add")

    run.remove("add")
    assert run.cursor.line[run.cursor.at].name == "train/update"
    next(run)

    assert "sum" not in state.metrics


def test_removing_a_part_that_failed_is_a_way_to_go_on(run, model):
    """The same state goes on behind it; nothing is lost or done twice."""
    run.insert(raising_once(1), before="update")
    with pytest.raises(Planted):
        run.to_end()

    run.remove("fragile")
    assert run.failed is None
    assert [state.iteration for state in run.take(2)] == [1, 2]

    assert model.w.item() == -3


def test_what_a_removed_part_wanted_at_the_boundary_is_not_done(run, tmp_path):
    """A checkpoint that cannot be saved does not keep the run from going on."""
    run = run | lt.checkpoint(tmp_path, every=1, best=lt.lowest("val/los"))
    with pytest.raises(LookupError):
        run.to_end()
    assert run.failed.part == "run/checkpoint"

    run.remove("checkpoint")
    run.to_end()

    assert run.progress.epoch == 2


def test_remove_refuses_what_a_phase_needs(run, sgd):
    """With the reason."""
    refused(run, ValueError, "train/forward calls the step", "remove", "train/forward")
    refused(run, ValueError, "val/average writes run.results", "remove", "val/average")
    refused(run, LookupError, "train/batches is no part, but the phase's source", "remove", "train/batches")
    refused(run, LookupError, "remove: there is no part 'log'", "remove", "log")
    refused(run, ValueError, "nobody would fill the gradients that train/update moves by", "remove", "backward")
    run.remove("update")
    run.remove("backward")

    assert names(run) == ["train/forward", "train/average"]


def test_removing_the_updates_of_a_schedule_is_refused(model, sgd, batches):
    """It would stand still."""
    train = lt.train(model, batches, lambda model, batch: model(batch))
    run = iter(train | lt.schedule_lr(sgd, lt.schedules.poly(1.0)) | lt.optimize(sgd))

    refused(run, ValueError, "schedule_lr: .* counts updates", "remove", "update")


def test_gradients_that_go_with_a_backward_are_said(model, sgd, batches):
    """Those of an open window."""
    train = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd, accumulate=3)
    run = iter(train)
    list(run.take(2))
    run.remove("update")

    with pytest.warns(UserWarning, match="remove: the gradients of 2 batches are in the open window of train/backward"):
        run.remove("backward")


def test_the_pipe_is_not_changed_from_within_a_part(run):
    """Its generator could not be closed; a function of the workflow may change it."""

    def meddles(states):
        for state in states:
            state.run.remove("meddles")
            yield state

    run.insert(meddles, before="update")

    with pytest.raises(RuntimeError, match="remove: a part is at work. Change the pipe between two iterations"):
        next(run)


def test_a_function_of_the_workflow_changes_the_pipe(model, sgd, batches):
    """Between two passes nobody is at work."""
    train = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)
    run = lt.workflow([(train, 1), (lambda run: run.mute("update"), 1)], max_epochs=2)

    run.to_end()

    assert model.w.item() == -3


# Muting


def test_a_muted_part_is_passed_by(run, model):
    """Weights stay as they are while update is muted."""
    next(run)
    run.mute("update")
    list(run.take(1))
    run.mute("update", False)
    next(run)

    assert model.w.item() == 3 - 1 - 3
    assert list(run.progress.updates.values()) == [2]


def test_a_muted_part_keeps_what_it_remembers(run):
    """Also the local variables of a plain generator, within a pass or on the run."""
    seen = []

    def count(states):
        n = []
        for state in states:
            n.append(state)
            seen.append(len(n))
            yield state

    run = run | count
    next(run)
    run.mute("count")
    next(run)
    run.mute("count", False)
    next(run)

    assert seen == [1, 2]


def test_a_part_that_had_its_turn_does_not_get_it_again(run, model):
    """Muted and heard again within one iteration."""
    run.after("update")
    run.mute("update")
    run.mute("update", False)
    next(run)

    assert model.w.item() == 2


def test_a_pass_that_began_without_a_part_begins_for_it_when_it_hears_again(run):
    """`on_pass` is called then; but not for a pass whose beginning it saw."""
    told = []

    @attrs.define(eq=False)
    class told_of_passes:
        def on_pass(self, run):
            told.append(run.phase.name)

        def __call__(self, states):
            yield from states

    run.insert(told_of_passes(), before="train/average")
    next(run)
    run.mute("told_of_passes")
    next(run)
    run.mute("told_of_passes", False)
    assert told == ["train"]
    run.mute("told_of_passes")
    list(run.take(3))  # the end of the pass, a validation, the next pass
    assert told == ["train"]

    run.mute("told_of_passes", False)

    assert told == ["train", "train"]
    list(run.take(1))


def test_a_muted_parts_generator_is_not_taken_into_the_next_pass(run):
    """Piped onto a phase it is a new one each pass, also for who hears again in the middle of one."""
    begun = []

    def begins(states):
        begun.append(True)
        yield from states

    run.insert(begins, before="train/average")
    next(run)
    run.mute("begins")
    list(run.take(4))

    run.mute("begins", False)
    next(run)

    assert len(begun) == 2


def test_what_is_muted_at_the_end_of_a_pass_does_nothing_there(model, batches):
    """A measure has no result then."""
    val = lt.validate(model, batches, lambda model, batch: {"x": batch.mean()})
    run = iter(val | lt.measure({"most": torch.max}, lambda state: state.batch))
    next(run)
    run.mute("measure")

    assert run.to_end() == {"val/x": 2.0}


def test_mute_refuses_what_a_phase_needs(run):
    """With the reason."""
    refused(run, ValueError, "val/forward calls the step", "mute", "val/forward")
    refused(run, ValueError, "train/average writes run.results", "mute", "train/average")
    refused(run, LookupError, "mute: there is no part 'log'", "mute", "log")


def test_an_update_with_a_scaler_is_muted_by_its_backward(model, sgd, batches):
    """The scaler would wait for it for good."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    run = iter(lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd, scaler=scaler))
    next(run)
    with pytest.raises(ValueError, match="mute: train/update has a GradScaler, .* mute train/backward"):
        run.mute("update")

    run.mute("backward")
    next(run)
    run.mute("backward", False)
    next(run)

    assert model.w.item() == 3 - 1 - 3


def test_muting_what_is_muted_changes_nothing(run):
    """And is not noted."""
    run.mute("update")
    run.mute("update")
    run.mute("backward", False)

    assert [change["verb"] for change in run.changes] == ["mute"]


def test_a_part_does_not_hear_again_where_it_cannot_be(run, sgd):
    """What was put in its place meanwhile goes first."""
    run.mute("update")
    run.insert(lt.update(sgd), after="update")

    with pytest.raises(ValueError, match="move the weights of one optimizer twice"):
        run.mute("train/update", False)
    run.remove("update#2")
    run.mute("update", False)

    assert not any(slot.muted for slot in run.cursor.slots)


def test_muting_a_part_that_failed_is_a_way_to_go_on(run, model):
    """As removing it is."""
    run.insert(raising_once(1, 1), before="update")
    with pytest.raises(Planted):
        run.to_end()

    run.mute("fragile")
    run.to_end()

    assert run.progress.iteration == 6


def test_a_rehearsal_and_a_validation_leave_muted_parts_out(run, batches):
    """They are of the pipe as it stands: also what was put in before the forward is in it."""
    seen, ahead = [], []
    run.insert(adding(1, seen), before="val/average")
    run.insert(adding(5, ahead), before="val/forward")
    val = run.cursor.passes.agenda.phases[1]

    assert run.validate(val)["sum"] == 6
    run.mute("val/add")
    assert run.validate(val)["sum"] == 5
    run.rehearse(1)

    assert (len(seen), len(ahead)) == (1, 3)


# What is noted


def test_changes_are_noted_in_order(run, model):
    """When, which part, and its options before and after."""
    run.insert(lt.clip_grad_norm(model.parameters(), 1.0), before="update")
    list(run.take(2))
    run.replace("clip_grad_norm", lt.clip_grad_norm(model.parameters(), 0.5))
    list(run.take(2))
    run.mute("clip_grad_norm")
    run.mute("clip_grad_norm", False)
    run.remove("clip_grad_norm")

    first, second, *others = run.changes
    clip = "clip_grad_norm(params=<1 tensors>, max_norm={})"
    assert first["what"] == f"{clip.format(1.0)}, before train/update"
    assert second == {
        "iteration": 2,
        "epoch": 0,
        "phase": "train",
        "verb": "replace",
        "part": "train/clip_grad_norm",
        "what": f"{clip.format(1.0)} -> {clip.format(0.5)}",
    }
    assert [(c["verb"], c["iteration"], c["epoch"], c["phase"]) for c in others] == [
        (verb, 3, 1, "") for verb in ("mute", "unmute", "remove")
    ]


def test_changes_show_a_line_each(run, capsys):
    """The one that explain has; to all else they are a list of dicts, and plain in checkpoints."""
    next(run)
    run.insert(lt.timer(), before="update")
    run.mute("timer")
    run.explain()
    explained = capsys.readouterr().out

    assert repr(run.changes).splitlines() == [
        "iteration 1 (train, epoch 0): insert train/timer: timer(), before train/update",
        "iteration 1 (train, epoch 0): mute train/timer: timer()",
    ]
    assert explained.endswith("".join(f"\n  - {line}" for line in repr(run.changes).splitlines()) + "\n")
    assert run.changes == list(run.changes)
    assert type(kept_changes(run.cursor)["made"]) is list


def test_a_run_that_is_reset_has_no_changes(run):
    """It has the pipe that was piped on, too."""
    run.insert(lt.timer(), before="update")
    run.mute("timer")

    run.reset()

    assert run.changes == []
    assert "train/timer" not in names(run)


# Checkpoints


def training(max_norm=1.0, step=classify, extra=()):
    model, sgd, batches = make()
    train = lt.train(model, batches, step) | lt.optimize(sgd, max_norm=max_norm)
    for part in extra:
        train = train | part
    return lt.workflow([(train, 1)], max_epochs=2)


def changed(folder, change, iterations=3):
    """A run that was changed and saved within a pass, and goes on to its end."""
    run = training()
    list(run.take(iterations))
    change(run)
    file = run.save(folder)
    made = run.changes
    run.to_end()
    return file, made, run.model.state_dict()


@pytest.mark.parametrize("before", [1, 3, 7])
def test_a_muted_part_is_muted_again_when_the_run_is_resumed(tmp_path, before):
    """It is said, the changes are back, and the run ends with the same bits."""
    file, made, weights = changed(tmp_path, lambda run: run.mute("clip_grad_norm"), before)

    run = training()
    with pytest.warns(UserWarning, match=r"muted, as they were when it was saved: train/clip_grad_norm. run.mute\("):
        run.resume(file)
    run.to_end()

    assert run.changes == made
    assert_same(run.model.state_dict(), weights)
    assert run["clip_grad_norm"].max_norm == 1.0


@attrs.define(eq=False)
class counts:
    n: int = attrs.field(default=0, init=False)

    def on_pass(self, run):
        self.n = 0

    def __call__(self, states):
        for state in states:
            self.n += 1
            yield state


@pytest.mark.parametrize("within", [True, False])
def test_who_was_muted_within_a_pass_goes_on_in_it_after_a_resume(tmp_path, within):
    """It has its memory, and the pass does not begin for it once more; unless it was muted when that began."""
    run = training(extra=[counts()])
    list(run.take(7 + 2))
    run.mute("counts")
    list(run.take(1 if within else 6))
    run.extend(max_epochs=4)
    file = run.save(tmp_path)

    resumed = training(extra=[counts()])
    resumed.extend(max_epochs=4)
    with pytest.warns(UserWarning, match="muted, as they were"):
        resumed.resume(file)
    for one in (run, resumed):
        one.mute("counts", False)
        next(one)

    assert run["counts"].n == resumed["counts"].n == (3 if within else 1)


def test_resuming_says_which_changes_the_script_lacks(tmp_path):
    """A part that was put in or taken out is named, and accepted with "pipe"."""
    file, _, _ = changed(tmp_path, lambda run: run.insert(halve, before="update"))

    with pytest.raises(RuntimeError, match="in the file only train/halve .inserted by hand at iteration 3") as caught:
        training().resume(file)
    assert '(accept="pipe")' in str(caught.value)
    run = training()
    with pytest.warns(UserWarning, match="train/halve .inserted by hand at iteration 3.: not here"):
        run.resume(file, accept="pipe")
    assert run.progress.iteration == 3

    file, _, _ = changed(tmp_path / "removed", lambda run: run.remove("clip_grad_norm"))
    with pytest.raises(RuntimeError, match="here only train/clip_grad_norm .removed by hand at iteration 3"):
        training().resume(file)


def test_a_script_that_makes_the_change_again_goes_on(tmp_path):
    """By the same verbs, before it resumes; changes are listed once."""
    change = lambda run: run.insert(halve, before="update")  # noqa: E731
    file, made, weights = changed(tmp_path, change)

    run = training()
    change(run)
    run.resume(file)
    run.to_end()

    assert run.changes == made
    assert_same(run.model.state_dict(), weights)


def test_a_part_that_only_looks_is_said_to_be_missing(tmp_path):
    """It keeps nobody from going on."""
    file, _, _ = changed(tmp_path, lambda run: run.insert(lt.timer(), before="update"))

    with pytest.warns(UserWarning, match="train/timer .inserted by hand at iteration 3.: not here"):
        training().resume(file)


def test_an_option_that_was_replaced_is_said(tmp_path):
    """As any option that differs."""
    file, _, _ = changed(tmp_path, lambda run: run.replace("clip_grad_norm", lt.clip_grad_norm(halves(run), 0.5)))

    with pytest.warns(UserWarning, match="max_norm=0.5. saved, .*max_norm=1.0. here"):
        training().resume(file)


def halves(run):
    return list(run.model.parameters())


def versions_of_a_step():
    """Two functions of one name, as a cell makes them."""
    made = []
    for scale in ("2.0", "3.0"):
        space = {"classify": classify}
        exec(f"def step(model, batch): return classify(model, batch)['loss'] * {scale}", space)
        made.append(space["step"])
    return made


def test_a_step_that_was_mended_by_hand_is_asked_for_in_the_script(tmp_path):
    """If the script has the old one still, that is said; with the new one, or another, there is nothing to say."""
    old, new = versions_of_a_step()
    run = training(step=old)
    list(run.take(3))
    run.replace(new)
    file = run.save(tmp_path)

    with pytest.warns(UserWarning, match="train/forward .replaced by hand at iteration 3: .* here is the old function"):
        training(step=old).resume(file)
    training(step=new).resume(file)


def test_an_older_file_has_no_changes(tmp_path):
    """It is gone on from as ever."""
    file, _, _ = changed(tmp_path, lambda run: None)
    tree = torch.load(file, weights_only=True)
    old = {key: value for key, value in tree.items() if key not in ("changes", "muted")}
    write(tmp_path / "old.pt", old)

    run = training()
    run.resume(tmp_path / "old.pt")

    assert run.changes == []
    assert run.progress.iteration == 3


def test_changes_that_are_none_are_refused(tmp_path):
    """A file may hold anything."""
    file, _, _ = changed(tmp_path, lambda run: None)
    tree = torch.load(file, weights_only=True)
    for wrong in ({"made": [3]}, {"made": [{"verb": "insert"}]}, [1]):
        write(tmp_path / "wrong.pt", {**tree, "changes": wrong})
        with pytest.raises(RuntimeError, match="does not hold what this version saves"):
            training().resume(tmp_path / "wrong.pt")


def test_inspect_shows_changes_and_what_is_muted(tmp_path):
    """Of a file, without running anything."""
    from looptools.archives.contents import read_contents
    from looptools.checkpoints.described import rows

    def change(run):
        run.mute("clip_grad_norm")
        run.insert(lt.timer(), before="update")

    file, _, _ = changed(tmp_path, change)
    told = rows(read_contents(file))
    at = [name for name, _ in told].index("changed by hand")

    assert told[at][1].startswith("iteration 3: mute train/clip_grad_norm: clip_grad_norm(")
    assert told[at + 1] == ("", "iteration 3: insert train/timer: timer(), before train/update")
    assert ("muted", "train/clip_grad_norm") in told
