"""Validating beside the workflow, and within epochs."""

from __future__ import annotations

import json
import signal

import attrs
import pytest
import torch
from loops import SAMPLES, Case, assert_same, classify, loader, network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import looptools as lt


def make():
    torch.manual_seed(0)
    model = network()
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def judge(model, data):
    """What anybody writes, means weighted by samples; leaves the model in eval mode."""
    model.eval()
    sums = {"loss": 0.0, "accuracy": 0.0}
    with torch.no_grad():
        for batch in data:
            for key, value in classify(model, batch).items():
                sums[key] += float(value.double()) * len(batch[1])
    return {key: value / SAMPLES for key, value in sums.items()}


def learn(model, optimizer, batch):
    model.train()
    loss = classify(model, batch)["loss"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def by_hand(iterations, validate_at):
    """Train, and judge when so many iterations are done, within an epoch or not; returns weights, values, a draw."""
    model, optimizer = make()
    train, val = loader(), loader(shuffle=True)
    values, done = [], 0
    if 0 in validate_at:
        values.append(judge(model, val))
    while done < iterations:
        for batch in train:
            learn(model, optimizer, batch)
            done += 1
            if done in validate_at:
                values.append(judge(model, val))
            if done == iterations:
                break
    return model.state_dict(), values, torch.rand(1)


def phases():
    model, optimizer = make()
    return lt.train(model, loader(), classify) | lt.optimize(optimizer), lt.validate(model, loader(), classify)


def of(rows, phase):
    return [{key: row[key] for key in ("loss", "accuracy")} for row in rows if row["phase"] == phase]


@pytest.mark.parametrize("before", [False, True], ids=["", "validated-before"])
def test_validating_every_16_iterations_goes_on_within_the_epoch(before):
    """160 iterations of a loader of 7 batches, shuffled, with dropout and BatchNorm: the bits of the loop by hand."""
    train, val = phases()
    run = lt.workflow([(train, lt.iterations(16)), (val, 1)], max_iterations=160)
    if before:
        run.validate(val)
    run.to_end()

    draw = torch.rand(1)
    weights, values, expected = by_hand(160, set(range(0 if before else 16, 161, 16)))
    assert_same(run.model.state_dict(), weights)
    assert torch.equal(draw, expected)
    assert len(values) == 10 + before
    assert of(run.history, "val") == [pytest.approx(value, rel=1e-12) for value in values]


@pytest.mark.parametrize("at", [{0}, {3}, {7}, {5, 7, 8, 21}], ids=str)
def test_a_validation_at_any_time_leaves_the_bits_of_the_loop_by_hand(at):
    """Before training, within an epoch, between two, and at the end: the same random numbers are drawn."""
    train, val = phases()
    run = lt.workflow([(train, 1)], max_epochs=3)
    values = []
    for done in range(22):
        if done in at:
            values.append(run.validate(val))
        next(run, None)

    draw = torch.rand(1)
    weights, expected, drawn = by_hand(21, at)
    assert_same(run.model.state_dict(), weights)
    assert values == [pytest.approx(value, rel=1e-12) for value in expected]
    assert torch.equal(draw, drawn)


def test_counters_and_other_results_stay(model, sgd, batches):
    """Only the phase's own results, and one row more."""
    step = lambda model, batch: model(batch)  # noqa: E731
    train = lt.train(model, batches, step) | lt.optimize(sgd)
    val = lt.validate(model, batches, step)
    run = lt.workflow([(train, 1), (val, 1)], max_epochs=2)
    list(run.take(3 + 3 + 1))
    place, before = attrs.astuple(run.cursor.passes.place), attrs.astuple(run.progress)
    results, rows, state = dict(run.results), list(run.history), run.state

    means = run.validate(lt.validate(model, batches[:2], step, name="test"))

    assert means == {"loss": -4.0 * 1.5}  # 3 - 1 - 2 - 3, then - 1
    assert run.results == results | {"test/loss": -6.0}
    assert run.history[:-1] == rows
    row = run.history[-1]
    facts = {"phase": "test", "epoch": 1, "iteration": 3, "round": 1, "iterations": 2, "trained": 4, "loss": -6.0}
    assert {key: row[key] for key in facts} == facts
    assert attrs.astuple(run.cursor.passes.place) == place
    assert attrs.astuple(run.progress)[:4] == before[:4]
    assert run.state is state
    assert run.progress.seconds > before[4]


def test_states_bear_the_numbers_of_the_last_training_state(model, sgd, batches):
    """(0, 0) before any; within a pass its epoch, behind it too."""
    seen = []

    def watch(states):
        for state in states:
            seen.append((state.phase, state.epoch, state.iteration, state.plan.epochs, state.plan.iterations))
            yield state

    step = lambda model, batch: model(batch)  # noqa: E731
    val = lt.validate(model, batches[:1], step) | watch
    run = lt.workflow([(lt.train(model, batches, step) | lt.optimize(sgd), 1)], max_epochs=2)
    for n in (0, 1, 2, 2):
        list(run.take(n))
        run.validate(val)

    assert seen == [("val", 0, 0, 2, 6), ("val", 0, 0, 2, 6), ("val", 0, 2, 2, 6), ("val", 1, 4, 2, 6)]


def test_it_can_be_asked_for_after_the_end_and_by_the_workflow(model, sgd, batches):
    """A function in the workflow is called between two passes; an ended run stays ended."""
    step = lambda model, batch: model(batch)  # noqa: E731
    test = lt.validate(model, batches[:1], step, name="test")
    train = lt.train(model, batches, step) | lt.optimize(sgd)
    run = lt.workflow([(train, 1), (lambda run: run.validate(test), 1)], max_epochs=2)
    run.to_end()
    assert [(row["phase"], row["trained"]) for row in run.history] == [
        ("train", 3), ("test", 3), ("train", 6), ("test", 6),
    ]  # fmt: skip
    ended = run.ended

    assert run.validate(test) == {"loss": 3.0 - 12}
    assert run.ended == ended


def test_the_model_stays_in_its_mode(batches):
    """What was frozen too."""
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout())
    model[0].eval()
    run = lt.workflow([(lt.train(model, batches, lambda model, batch: model(batch).mean()), 1)], max_epochs=1)

    run.validate(lt.validate(model, batches, lambda model, batch: {"training": float(model.training)}))

    assert run.results["val/training"] == 0.0
    assert (model.training, model[0].training, model[1].training) == (True, False, True)


def test_another_phase_of_a_name_that_is_taken_gets_a_number(model, batches):
    """Results on other data do not pass for those of the workflow's own phase."""
    val = lt.validate(model, batches, lambda model, batch: model(batch))
    run = lt.workflow([(val, 1)], max_rounds=1)
    run.to_end()

    run.validate(val.limit(1))
    run.validate(val)

    assert run.results == {"val/loss": 6.0, "val#2/loss": 3.0}


def test_the_log_gets_a_row_and_other_parts_see_nothing(tmp_path, model, sgd, batches):
    """Parts of the run with `on_results` get the last state, with the run's results."""
    step = lambda model, batch: model(batch)  # noqa: E731
    seen = []

    @attrs.define(eq=False)
    class listens:
        def on_results(self, state):
            seen.append((state.phase, state.last, state.run.results["val/loss"]))

        def __call__(self, states):
            for state in states:
                seen.append(state.phase)
                yield state

    val = lt.validate(model, batches, step)
    run = lt.workflow([(lt.train(model, batches, step) | lt.optimize(sgd), 1)], max_epochs=1)
    run = run | lt.log(tmp_path, line=None, tensorboard=False) | listens()
    run.validate(val)
    run.to_end()
    run.validate(val)

    assert seen == [("val", True, 6.0), "train", "train", "train", ("val", True, -6.0)]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["loss"]) for row in rows if row["kind"] == "pass"] == [
        ("val", 6.0), ("train", pytest.approx((3 + 4 + 0) / 3)), ("val", -6.0),
    ]  # fmt: skip


def test_a_validation_that_fails_leaves_the_run_alone(model, sgd, batches):
    """The exception says so; no results are written, and the run goes on."""

    def fails(model, batch):
        raise ValueError("planted")

    step = lambda model, batch: model(batch)  # noqa: E731
    run = lt.workflow([(lt.train(model, batches, step) | lt.optimize(sgd), 1)], max_epochs=1)
    next(run)

    with pytest.raises(ValueError, match="planted") as caught:
        run.validate(lt.validate(model, batches, fails))
    assert caught.value.__notes__[-1] == "looptools: run.validate is given up; the run itself stands where it stood."
    assert (dict(run.results), run.failed, model.training) == ({}, None, True)
    assert len(list(run)) == 2


def test_a_part_of_the_validation_may_stop_the_run(model, sgd, batches):
    """Then the pass is not over, and writes nothing."""

    def stops(states):
        for state in states:
            state.stop("seen enough")
            yield state

    step = lambda model, batch: model(batch)  # noqa: E731
    run = lt.workflow([(lt.train(model, batches, step) | lt.optimize(sgd), 1)], max_epochs=1)
    next(run)

    assert run.validate(lt.validate(model, batches, step) | stops) == {}
    assert next(run, None) is None
    assert run.ended == "seen enough"


def test_moments_and_things_that_are_refused(model, sgd, batches):
    """An open iteration, a training phase, no phase, a source that the workflow would miss."""
    step = lambda model, batch: model(batch)  # noqa: E731
    train = lt.train(model, batches, step) | lt.optimize(sgd)
    once = lt.validate(model, iter(batches), step)
    run = lt.workflow([(train, 1), (once, 1)], max_epochs=1)

    with pytest.raises(TypeError, match=r"validate: train is a training phase. Run it by itself: train.to_end\(\)"):
        run.validate(train)
    with pytest.raises(TypeError, match="validate: give a phase"):
        run.validate(batches)
    with pytest.raises(RuntimeError, match="validate: the source of val can be walked through only once"):
        run.validate(once)
    run.after("backward")
    with pytest.raises(RuntimeError, match=r"validate: an iteration is open. Finish it first: next\(run\)"):
        run.validate(lt.validate(model, batches, step))


def test_a_folder_of_another_run_is_refused_before_anything_is_written(tmp_path):
    """A validation begins the run, so resuming comes before it."""
    model, optimizer, train, val = Case().make()
    phase = lt.validate(model, val, classify)

    def make_run():
        entries = [(lt.train(model, train, classify) | lt.optimize(optimizer), 1), (phase, 1)]
        return lt.workflow(entries, max_epochs=1) | lt.checkpoint(tmp_path)

    make_run().to_end()
    with pytest.raises(FileExistsError, match="holds the checkpoints of another run"):
        make_run().validate(phase)
    run = make_run()
    run.resume()
    run.validate(phase)
    with pytest.raises(RuntimeError, match="the run has begun already"):
        run.resume()


def test_a_loader_whose_workers_stay_serves_both_walks(model):
    """The workflow's pass goes on where it stood."""
    data = DataLoader(TensorDataset(torch.arange(4.0)), 1, num_workers=1, persistent_workers=True)
    val = lt.validate(model, data, lambda model, batch: {"x": batch[0].mean()})
    run = lt.workflow([(val, 1)], max_rounds=1)
    next(run)

    assert run.validate(val) == {"x": 1.5}
    assert [float(state.metrics["x"]) for state in run] == [1.0, 2.0, 3.0]
    assert run.results == {"val/x": 1.5}


def test_its_row_says_that_it_was_on_demand():
    """So that what counts the workflow's passes can leave it out; the other rows say nothing."""
    train, val = phases()
    run = lt.workflow([(train, 1), (val, 1)], max_epochs=1)
    run.validate(val)
    run.to_end()

    assert [(row["phase"], row.get("on_demand", False)) for row in run.history] == [
        ("val", True),
        ("train", False),
        ("val", False),
    ]


def test_ctrl_c_ends_the_validation_at_its_boundary(model, sgd, batches):
    """The iteration finishes, the validation is given up, and the run goes on."""
    seen = []

    def interrupted(states):
        for state in states:
            signal.raise_signal(signal.SIGINT)
            seen.append(state.index)
            yield state

    step = lambda model, batch: model(batch)  # noqa: E731
    run = lt.workflow([(lt.train(model, batches, step) | lt.optimize(sgd), 1)], max_epochs=1)

    with pytest.raises(KeyboardInterrupt):
        run.validate(lt.validate(model, batches, step) | interrupted)
    assert seen == [0]
    assert len(list(run)) == 3
    assert "val/loss" not in run.results


def test_a_mended_step_and_a_replaced_part_judge_on_demand_too(model, sgd, batches):
    """What was swapped in a cell holds for the validation beside the workflow."""

    def judge(model, batch):
        return {"loss": model(batch), "old": 1.0}

    def note(states):
        for state in states:
            state.metrics["seen"] = 1.0
            yield state

    val = lt.validate(model, batches[:1], judge) | note
    run = lt.workflow([(lt.train(model, batches, judge) | lt.optimize(sgd), 1), (val, 1)], max_epochs=1)
    next(run)

    run.replace("val/forward", lambda model, batch: {"new": 1.0})

    def doubled(states):
        for state in states:
            state.metrics["seen"] = 2.0
            yield state

    run.replace("val/note", doubled)
    assert run.validate(val) == {"new": 1.0, "seen": 2.0}


def test_a_failed_validation_says_one_thing_only(model, sgd, batches):
    """Nothing of its own run's verbs, which would redo another run's iteration."""

    def fails(model, batch):
        raise ValueError("planted")

    val = lt.validate(model, batches, fails)
    run = lt.workflow(
        [(lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd), 1)], max_epochs=1
    )
    with pytest.raises(ValueError, match="planted") as caught:
        run.validate(val)
    assert not any("run.retry()" in note or "next(run)" in note for note in caught.value.__notes__)

    run = lt.workflow([(lambda run: run.validate(val), 1), (val.on(batches), 1)], max_rounds=1)
    with pytest.raises(ValueError, match="planted") as caught:
        next(run)
    assert [note for note in caught.value.__notes__ if "next(run)" in note] == [
        "next(run) calls it again, run.skip() goes on behind it."
    ]
