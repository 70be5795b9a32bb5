"""Number by number what mmcv 1.x's schedules of learning rate and momentum did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from policies import schedule
from torch import nn

import looptools as lt

FOLDER = Path(__file__).parent / "reference"
FIGURES = json.loads((FOLDER / "lr_policies.json").read_text())
RECIPES = json.loads((FOLDER / "lr_recipes.json").read_text())["cases"]
OLD_INTERFACE = ("iterrunner-by-epoch-true", "iterrunner-warmup-by-epoch", "resume")


def make(case: dict[str, Any]) -> tuple[lt.Run, torch.optim.Optimizer]:
    """The run of a case, and its optimizer with two param groups."""
    weights = [nn.Parameter(torch.ones(())) for _ in FIGURES["base_lr"]]
    bases = list(zip(weights, FIGURES["base_lr"], FIGURES["base_momentum"], strict=True))
    if case["optimizer"] == "Adam":
        optimizer: Any = torch.optim.Adam([{"params": [w], "lr": lr, "betas": (m, 0.999)} for w, lr, m in bases])
    else:
        optimizer = torch.optim.SGD([{"params": [w], "lr": lr, "momentum": m} for w, lr, m in bases])
    per_epoch, epochs, model = case["iters_per_epoch"], case["max_epochs"], nn.ParameterList(weights)
    train = lt.train(model, [1] * per_epoch, lambda model, batch: model[0] + model[1])
    for option in ("lr", "momentum"):
        if case[f"{option}_config"] is not None:
            train = train | schedule(optimizer, case[f"{option}_config"], option)
    phases = {"train": train | lt.optimize(optimizer), "val": lt.validate(model, [1], lambda model, batch: model[0])}
    entries: list[Any] = [(phases[mode], n) for mode, n in case["workflow"]]
    if case["runner"] == "IterBasedRunner":
        entries = [(phase, lt.iterations(n)) for phase, n in entries]
        return lt.workflow(entries, max_iterations=per_epoch * epochs), optimizer
    return lt.workflow(entries, max_epochs=epochs), optimizer


def covered() -> list[dict[str, Any]]:
    return [case for case in FIGURES["cases"] if not case["id"].startswith(OLD_INTERFACE)]


@pytest.mark.parametrize("case", [c for c in covered() if "error" not in c["result"]], ids=lambda case: case["id"])
def test_every_policy_at_every_step(case):
    """Each param group's learning rate and momentum in force at each update are mmcv's to 1e-12."""
    run, optimizer = make(case)

    seen: dict[str, list[list[float]]] = {"lr": [], "momentum": []}
    for state in run:
        if state.trains:
            groups = optimizer.param_groups
            seen["lr"].append([group["lr"] for group in groups])
            seen["momentum"].append([group["betas"][0] if "betas" in group else group["momentum"] for group in groups])

    for option, got in seen.items():
        assert len(got) == len(case["result"][option]) > 0
        for row, expected in zip(got, case["result"][option], strict=True):
            assert row == pytest.approx(expected, rel=1e-12, abs=0)


def test_restarts_that_end_before_the_run_are_refused_when_it_is_built():
    """`cosrestart-too-short`: mmcv failed at iteration 20, in the middle of the training."""
    cases = [case for case in covered() if "error" in case["result"]]
    run, _ = make(cases[0])

    assert [case["id"] for case in cases] == ["cosrestart-too-short"]
    with pytest.raises(ValueError, match=r"periods \[10, 10\] are 20 steps, but the run has 35"):
        next(run)


@pytest.mark.parametrize("case", RECIPES, ids=lambda case: case["example"])
def test_every_published_recipe(case):
    """The learning rate at sampled iterations of whole trainings, by the part itself on states with those counters."""
    weight = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=case["base_lr"])
    train = lt.train(nn.ParameterList([weight]), range(case["iters_per_epoch"]), lambda model, batch: model[0])
    by_epoch = case["runner"] == "epoch"  # unless the recipe says otherwise
    train = train | schedule(optimizer, {"by_epoch": by_epoch, **case["lr_config"]}) | lt.optimize(optimizer)
    run = lt.workflow([(train, 1)], **{"max_epochs" if by_epoch else "max_iterations": case["max"]})

    def states():
        for epoch, iteration, _ in case["points"]:
            run.progress.updates[optimizer] = iteration
            yield lt.State(phase="train", epoch=epoch, iteration=iteration, run=run)

    lrs = [state.lr for state in run["train/schedule_lr"](states())]

    assert lrs == pytest.approx([lr for _, _, lr in case["points"]], rel=1e-12, abs=0)


def test_the_figures_are_all_there():
    """No case is lost on the way."""
    assert len(covered()) == 45
    assert len(RECIPES) == 146
