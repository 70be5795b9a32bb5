"""Drops where a result does not get better."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import looptools as lt

WEIGHTS = [torch.nn.Parameter(torch.ones(())) for _ in range(2)]


def make(losses: list[float], drop: Any, option: str = "lr", **options: Any) -> tuple[lt.Run, torch.optim.Optimizer]:
    """A run whose validations have these losses; its two param groups begin at 0.1 and 0.02."""
    model = torch.nn.ParameterList(WEIGHTS)
    groups = [{"params": [weight], "lr": lr} for weight, lr in zip(model, (0.1, 0.02), strict=True)]
    optimizer, rest = torch.optim.SGD(groups, weight_decay=0.8), iter(losses)
    part = lt.schedule(optimizer, option, drop, **options)
    train = lt.train(model, [1, 2], lambda model, batch: model[0] * 0) | part
    val = lt.validate(model, [1], lambda model, batch: {"loss": torch.tensor(next(rest), dtype=torch.float64)})
    return lt.workflow([(train | lt.optimize(optimizer), 1), (val, 1)], max_epochs=len(losses)), optimizer


def rates(run: lt.Run, optimizer: torch.optim.Optimizer) -> list[list[float]]:
    return [[group["lr"] for group in optimizer.param_groups] for state in run if state.trains]


@settings(max_examples=30, deadline=None)
@given(
    losses=st.lists(st.sampled_from([0.5, 0.999, 0.99995, 1.0, 2.0, float("nan")]), min_size=1, max_size=12),
    highest=st.booleans(),
    patience=st.integers(0, 2),
    cooldown=st.integers(0, 2),
    mode=st.sampled_from(["rel", "abs"]),
    floor=st.sampled_from([0.0, 0.004]),
)
def test_it_is_torchs_own_to_the_bit(losses, highest, patience, cooldown, mode, floor):
    """ReduceLROnPlateau, stepped by hand after each validation, for each group from its own base."""
    options: dict[str, Any] = {"factor": 0.3, "patience": patience, "cooldown": cooldown, "threshold_mode": mode}
    best = (lt.highest if highest else lt.lowest)("val/loss")
    run, optimizer = make(losses, lt.schedules.plateau(best, floor=floor, **options))

    groups = [{"params": [weight], "lr": lr} for weight, lr in zip(WEIGHTS, (0.1, 0.02), strict=True)]
    by_hand = torch.optim.SGD(groups)
    mode = "max" if highest else "min"
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(by_hand, mode=mode, min_lr=floor, **options)
    expected = []
    for loss in losses:
        expected += [[group["lr"] for group in by_hand.param_groups]] * 2
        scheduler.step(loss)

    assert rates(run, optimizer) == expected


def test_a_metric_that_nobody_writes_is_an_error_after_the_first_round():
    """It lists what there is."""
    run, _ = make([1.0, 1.0], lt.schedules.plateau(lt.lowest("val/los")))

    with pytest.raises(LookupError, match='plateau: no part writes "val/los"; known are train/loss, val/loss'):
        run.to_end()
    assert run.progress.iteration == 2


@pytest.mark.parametrize("look", [False, True])
def test_a_look_on_demand_moves_nothing(look):
    """`run.validate` judges beside the workflow, which goes on as if nothing had been."""
    run, optimizer = make([1.0] * 20, lt.schedules.plateau(lt.lowest("val/loss"), factor=0.5, patience=1))
    phases = {phase.name: phase for phase in run._agenda.phases}
    run.extend(max_epochs=5)
    seen = []
    for state in run:
        if state.trains:
            seen.append(optimizer.param_groups[0]["lr"])
            if look:
                run.validate(phases["val"])

    assert seen == pytest.approx([0.1] * 6 + [0.05] * 4)


def test_results_on_demand_count_where_there_are_no_others():
    """The loop's body validates, and the workflow does not."""
    model = torch.nn.ParameterList(WEIGHTS)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    drop = lt.schedules.plateau(lt.lowest("val/loss"), factor=0.5, patience=0)
    train = lt.train(model, [1], lambda model, batch: model[0] * 0) | lt.schedule_lr(sgd, drop) | lt.optimize(sgd)
    val = lt.validate(model, [1], lambda model, batch: {"loss": torch.tensor(1.0)})
    run, seen = lt.workflow([(train, 1)], max_epochs=4), []
    for state in run:
        seen.append(state.lr)
        run.validate(val)

    assert seen == [0.1, 0.1, 0.05, 0.025]


def test_it_is_called_in_a_run_only():
    """By itself it has no results to look at."""
    with pytest.raises(RuntimeError, match=r"plateau: it depends on a run's results. Give it to schedule_lr"):
        lt.schedules.plateau(lt.lowest("val/loss"))(0, None, 0.1)


def test_it_reads_a_history_that_was_put_in_place_of_another():
    """As resuming and undoing do: what it had read before is forgotten."""
    drop = lt.schedules.plateau(lt.lowest("val/loss"), factor=0.5, patience=0)
    run, optimizer = make([1.0] * 5, drop)
    for state in run:
        if state.round_last and state.epoch == 2:
            break
    schedule = run["train/schedule_lr"]._schedules[0]
    whole = copy.deepcopy(run.history)

    assert schedule(0, None, 0.1) == 0.025
    run.history = whole[:4]
    assert schedule(0, None, 0.1) == 0.05
    run.history = whole
    assert schedule(0, None, 0.1) == 0.025
    run.history = []
    run.progress.round = 0
    assert schedule(0, None, 0.1) == 0.1


def test_it_goes_with_a_warm_up_and_another_option():
    """A weight decay that drops, under a warm-up of two updates."""
    drop = lt.schedules.plateau(lt.lowest("val/loss"), factor=0.5, patience=0)
    run, optimizer = make([1.0] * 3, drop, "weight_decay", warmup=lt.schedules.warmup(2, ratio=0.5))

    decays = [optimizer.param_groups[0]["weight_decay"] for state in run if state.trains]

    assert decays == pytest.approx([0.4, 0.6, 0.8, 0.8, 0.4, 0.4])
