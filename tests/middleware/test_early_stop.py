"""Stopping when there is nothing left to gain."""

from __future__ import annotations

import math

import pytest
import torch
from loops import Case, piped

import looptools as lt


def scores(values, *parts, rounds=None):
    """A run whose validation gives *values*, one a round."""
    left = iter(values)
    val = lt.validate(None, lambda: [next(left)], lambda model, batch: {"score": batch})
    run = lt.workflow([(val, 1)], max_rounds=rounds or len(values))
    for part in parts:
        run = run | part
    return run


def passes_by_hand(values, sign, patience, min_delta):
    """How many passes a loop that anybody would write does."""
    best, waited = -math.inf, 0
    for done, value in enumerate(values, 1):
        if math.isfinite(value) and sign * value > best + min_delta:
            best, waited = sign * value, 0
        else:
            waited += 1
        if waited == patience:
            return done
    return len(values)


@pytest.mark.parametrize("patience", [1, 2, 4])
@pytest.mark.parametrize("min_delta", [0.0, 0.5])
@pytest.mark.parametrize("best", [lt.highest, lt.lowest])
def test_the_same_as_by_hand(best, min_delta, patience):
    """The run ends with the same pass, over many sequences of values; ties and NaN are no improvements."""
    for seed in range(20):
        numbers = torch.randint(0, 5, (12,), generator=torch.Generator().manual_seed(seed))
        values = [math.nan if n == 4 else float(n) / 2 for n in numbers]
        part = lt.early_stop(best("val/score"), patience=patience, min_delta=min_delta)
        run = scores(values, part)
        run.to_end()

        assert len(run.history) == passes_by_hand(values, best.sign, patience, min_delta)


def test_the_reason_can_be_read():
    """What, since when, and how long."""
    run = piped(Case(epochs=9)) | lt.early_stop(lt.highest("train/loss"), patience=2, min_delta=10.0)
    run.to_end()
    assert run.ended.startswith("early_stop: train/loss has not improved on 0.")
    assert run.ended.endswith(" for 2 passes (since epoch 1)")

    run = scores([math.inf, math.nan], lt.early_stop(lt.lowest("val/score"), patience=1))
    run.to_end()
    assert run.ended == "early_stop: val/score has not been finite for 1 pass"


def test_it_stops_at_the_boundary_of_the_pass_that_it_judges():
    """The last state is handed out, and no further batch is fetched."""
    run = scores([1.0, 2.0, 3.0], lt.early_stop(lt.lowest("val/score"), patience=1))

    assert [state.batch for state in run] == [1.0, 2.0]
    assert run.ended == "early_stop: val/score has not improved on 1 for 1 pass (since epoch 0)"


def test_it_looks_only_when_its_phase_has_ended_a_pass():
    """A validation every other round: what stands in the results from before does not count again."""
    left = iter([3.0, 2.0, 2.0, 2.0])
    val = lt.validate(None, lambda: [next(left)], lambda model, batch: {"score": batch})
    train = lt.train(None, [1.0], lambda model, batch: {"x": batch})
    run = lt.workflow([(train, 5), (val, 1)], max_rounds=4) | lt.early_stop(lt.lowest("val/score"), patience=2)
    run.to_end()

    assert len([row for row in run.history if row["phase"] == "val"]) == 4
    assert run.ended == "early_stop: val/score has not improved on 2 for 2 passes (since epoch 10)"


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_resumed_run_stops_at_the_same_pass(tmp_path, cut):
    """The best value and the passes since are saved."""
    values = [3.0, 2.0, 2.5, 2.5, 1.0, 1.0]

    def make(values):
        return scores(values, lt.checkpoint(tmp_path), lt.early_stop(lt.lowest("val/score"), patience=2), rounds=6)

    list(make(values).take(cut))
    run = make(values[cut:])
    run.resume()
    run.to_end()

    assert [row["score"] for row in run.history] == [3.0, 2.0, 2.5, 2.5]
    assert run.ended == "early_stop: val/score has not improved on 2 for 2 passes (since epoch 0)"


def test_a_run_resumed_after_the_stop_stays_stopped_until_it_is_extended(tmp_path):
    """Then it has its patience again, and still compares with the best value."""
    part = lt.early_stop(lt.lowest("val/score"), patience=2)
    scores([1.0, 2.0, 2.0, 9.0], lt.checkpoint(tmp_path), part).to_end()
    run = scores([2.0, 0.5, 2.0, 2.0, 0.1], lt.checkpoint(tmp_path), part)
    run.resume()

    assert next(run, None) is None
    assert run.ended == "early_stop: val/score has not improved on 1 for 2 passes (since epoch 0)"
    run.extend(max_rounds=9)
    run.to_end()
    assert [row["score"] for row in run.history] == [1.0, 2.0, 2.0, 2.0, 0.5, 2.0, 2.0]


def test_extending_a_run_that_still_waits_changes_nothing():
    """Only a patience that was used up is restored."""
    run = scores([1.0, 2.0, 2.0, 2.0], lt.early_stop(lt.lowest("val/score"), patience=2), rounds=3)
    list(run.take(2))
    run.extend(max_rounds=4)
    run.to_end()

    assert len(run.history) == 3


def test_a_misspelt_metric_is_found_after_the_first_round():
    """With the known ones; the part can be replaced, and the run goes on."""
    run = piped(Case(epochs=3)) | lt.early_stop(lt.lowest("val/los"), patience=1)

    with pytest.raises(LookupError, match='early_stop: no part writes "val/los"; known are train/loss, train/accuracy'):
        run.to_end()
    assert run.progress.epoch == 1
    run.replace("early_stop", lt.early_stop(lt.lowest("val/loss"), patience=9))
    run.to_end()
    assert run.progress.epoch == 3


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"best": "val/loss"}, TypeError, r"best must be lt.highest\(\"val/accuracy\"\) or lt.lowest"),
        ({"patience": 0}, ValueError, "patience must be at least 1"),
        ({"min_delta": -1.0}, ValueError, "min_delta must be 0 or more"),
        ({"min_delta": "1"}, TypeError, "min_delta must be a number"),
    ],
)
def test_bad_options(options, error, words):
    """Refused where they are typed."""
    with pytest.raises(error, match=f"^early_stop: {words}"):
        lt.early_stop(**{"best": lt.lowest("val/loss"), **options})


def test_it_belongs_onto_the_run():
    """Within a phase it would come before the results."""
    val = lt.validate(None, [1.0], lambda model, batch: {"x": batch}) | lt.early_stop(lt.lowest("val/x"))
    with pytest.raises(TypeError, match="early_stop: pipe it onto the run, not onto a phase"):
        next(lt.workflow([(val, 1)], max_rounds=1))


def two(values, part, rounds):
    """A run whose validation gives two scores, one a round each."""
    left = iter(values)
    val = lt.validate(None, lambda: [next(left)], lambda model, batch: {"a": batch[0], "b": batch[1]})
    return lt.workflow([(val, 1)], max_rounds=rounds) | part


def test_another_criterion_begins_afresh():
    """The best value of one metric is no bound for another; nor is the lowest for the highest."""
    values = [(5.0, 0.1), (6.0, 1.0), (6.0, 0.5), (6.0, 0.4), (6.0, 0.6), (6.0, 0.7)]
    for first, then in [(lt.lowest("val/a"), lt.highest("val/b")), (lt.highest("val/b"), lt.lowest("val/a"))]:
        run = two(values, lt.early_stop(first, patience=3), 6)
        list(run.take(2))
        run.replace("early_stop", lt.early_stop(then, patience=2))
        next(run)
        assert (run["early_stop"].value, run["early_stop"].waited) == (0.5 if then.sign > 0 else 6.0, 0)

    run = two(values, lt.early_stop(lt.lowest("val/b"), patience=3), 6)
    list(run.take(1))
    run.replace("early_stop", lt.early_stop(lt.highest("val/b"), patience=3))
    next(run)
    run.replace("early_stop", lt.early_stop(lt.lowest("val/b"), patience=3))
    next(run)
    assert run["early_stop"].value == 0.5


@pytest.mark.filterwarnings("ignore:resume. since the checkpoint was saved:UserWarning")
def test_another_criterion_begins_afresh_in_a_resumed_run(tmp_path):
    """The file's best value is that of the old one."""
    values = [(5.0, 0.1), (6.0, 1.0), (6.0, 0.5), (6.0, 0.6)]
    (two(values, lt.early_stop(lt.lowest("val/a"), patience=3), 2) | lt.checkpoint(tmp_path)).to_end()
    run = two(values[2:], lt.early_stop(lt.highest("val/b"), patience=2), 4) | lt.checkpoint(tmp_path)
    run.resume()
    run.to_end()

    assert (run["early_stop"].value, run["early_stop"].waited) == (0.6, 0)


def test_a_patience_that_is_shortened_below_what_was_waited_stops():
    """Only extending a run that was stopped here restores it."""
    run = scores([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0], lt.early_stop(lt.lowest("val/score"), patience=9))
    list(run.take(5))
    run.replace("early_stop", lt.early_stop(lt.lowest("val/score"), patience=2))
    run.to_end()

    assert run.ended == "early_stop: val/score has not improved on 1 for 5 passes (since epoch 0)"


def validated(values, part, *, epochs, on_demand):
    """A training that is judged by a function in its workflow, or by the caller's own loop."""
    left = iter(values)
    val = lt.validate(None, lambda: [next(left)], lambda model, batch: {"score": batch})
    train = lt.train(None, [1.0, 2.0], lambda model, batch: {"x": batch})
    entries = [(train, 1)] if on_demand else [(train, 1), (lambda run: run.validate(val), 1)]
    run = lt.workflow(entries, max_epochs=epochs) | part
    for state in run:
        if on_demand and state.last:
            run.validate(val)
    return run


@pytest.mark.parametrize("on_demand", [False, True])
def test_validations_beside_the_workflow_are_judged(on_demand):
    """Each once, as a pass of its own; the metric need not be there after the first round."""
    values = [3.0, 2.0, 2.0, 2.0, 1.0]
    run = validated(values, lt.early_stop(lt.lowest("val/score"), patience=2), epochs=5, on_demand=on_demand)

    assert run.ended == "early_stop: val/score has not improved on 2 for 2 passes (since epoch 2)"
    assert [row["phase"] for row in run.history] == ["train", "val"] * 4


def test_a_validation_of_another_phase_is_none_of_its_business():
    """Before the first round, when nobody has written the metric yet."""
    test = lt.validate(None, [1.0], lambda model, batch: {"score": batch}, name="test")
    run = scores([1.0, 1.0], lt.early_stop(lt.lowest("val/score"), patience=1))
    run.validate(test)
    next(run)
    run.validate(test)

    assert run["early_stop"].waited == 0
