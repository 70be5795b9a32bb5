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
