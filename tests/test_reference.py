"""Number by number what mmcv 1.x's Runner did, for what the core has."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import looptools as lt

FOLDER = Path(__file__).parent / "reference"
TRAINING = json.loads((FOLDER / "training.json").read_text())
POLICIES = json.loads((FOLDER / "lr_policies.json").read_text())
BUFFERS = json.loads((FOLDER / "log_buffer.json").read_text())

KINDS = {"linear": "linear", "exp": "exponential", "constant": "constant"}
POLICY_NAMES = ("fixed", "step", "poly", "CosineAnnealing")


def schedule(optimizer: torch.optim.Optimizer, config: dict[str, Any], per_epoch: int, epochs: int) -> lt.schedule_lr:
    """What an lr_config of mmcv is here."""
    by_epoch = config.get("by_epoch", True)
    steps = config.get("step", 1)
    steps = list(range(steps, epochs * per_epoch, steps)) if isinstance(steps, int) else steps
    one = {
        "fixed": lambda: lt.schedules.constant(),
        "step": lambda: lt.schedules.multistep(steps, gamma=config.get("gamma", 0.1)),
        "poly": lambda: lt.schedules.poly(power=config.get("power", 1.0), end=config.get("min_lr", 0.0)),
        "CosineAnnealing": lambda: lt.schedules.cosine(config.get("min_lr", 0.0), end_ratio=config.get("min_lr_ratio")),
    }[config["policy"]]()
    warmup: Any = 0
    if config.get("warmup"):
        count = config["warmup_iters"] * (per_epoch if config.get("warmup_by_epoch") else 1)
        warmup = lt.schedules.warmup(count, ratio=config["warmup_ratio"], kind=KINDS[config["warmup"]])
    return lt.schedule_lr(optimizer, one, warmup=warmup, by="epoch" if by_epoch else "update")


class Linear(nn.Module):
    """The regression of the figures."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(TRAINING["initial"]["w"], dtype=dtype))
        self.b = nn.Parameter(torch.tensor(TRAINING["initial"]["b"], dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w.T + self.b


def covered(case: dict[str, Any]) -> bool:
    return case["family"] != "ema" and "resume_after_epoch" not in case


@pytest.mark.parametrize("case", [case for case in TRAINING["cases"] if covered(case)], ids=lambda case: case["id"])
def test_weights_after_every_iteration(case):
    """Weights, loss, grad_norm and learning rate are mmcv's after each iteration: 1e-12 relative, 1e-6 in float32.

    An accumulation window of mmcv crosses epochs, so the epochs are one pass here: lt.iterations(all of them).
    """
    dtype = getattr(torch, case["dtype"])
    data, size, epochs = TRAINING["data"], TRAINING["batch_size"], case["max_epochs"]
    x, y = torch.tensor(data["x"], dtype=dtype), torch.tensor(data["y"], dtype=dtype)
    batches = [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]
    model = Linear(dtype)
    options = dict(case["optimizer"])
    groups = [{"params": [model.w]}, {"params": [model.b], **({"lr": case["b_lr"]} if "b_lr" in case else {})}]
    optimizer = getattr(torch.optim, options.pop("type"))(groups, **options)
    config = case["optimizer_config"]
    clip = config.get("grad_clip") or {}

    def step(model, batch):
        return case["loss_scale"] * (model(batch[0]) - batch[1]).pow(2).mean()

    train = lt.train(model, batches, step)
    if "lr_config" in case:
        train = train | schedule(optimizer, case["lr_config"], len(batches), epochs)
    train = train | lt.optimize(
        optimizer,
        max_norm=clip.get("max_norm"),
        norm_type=clip.get("norm_type", 2),
        accumulate=config.get("cumulative_iters", 1),
    )
    count = lt.iterations(epochs * len(batches)) if "cumulative_iters" in config else 1
    run = lt.workflow([(train, count)], max_iterations=epochs * len(batches))

    rows = [row for row in case["rows"] if row["at"] == "after_train_iter"]
    close = {"rel": 1e-12, "abs": 1e-15} if case["dtype"] == "float64" else {"rel": 1e-6, "abs": 1e-6}
    for row, state in zip(rows, run, strict=True):
        assert model.w.detach().tolist() == [pytest.approx(values, **close) for values in row["w"]]
        assert model.b.detach().tolist() == pytest.approx(row["b"], **close)
        assert state.loss.item() == pytest.approx(row["loss"], **close)
        assert [group["lr"] for group in optimizer.param_groups][: len(row["lr"])] == pytest.approx(row["lr"], **close)
        if state.updates and clip:
            assert state.grad_norm.item() == pytest.approx(row["grad_norm"], **close)
    assert len(rows) == epochs * len(batches)


def policies() -> list[dict[str, Any]]:
    """Those whose policy the core has, and that do not belong to the old interface."""
    return [
        case
        for case in POLICIES["cases"]
        if case["lr_config"] is not None
        and case["lr_config"]["policy"] in POLICY_NAMES
        and not (case["lr_config"]["policy"] == "step" and "min_lr" in case["lr_config"])  # a floor: not in the core
        and not case["id"].startswith(("resume", "iterrunner-by-epoch", "iterrunner-warmup"))
        and case["optimizer"] != "dict"
    ]


@pytest.mark.parametrize("case", policies(), ids=lambda case: case["id"])
def test_learning_rate_at_every_step(case):
    """Each param group's learning rate in force at each update is mmcv's to 1e-12."""
    weights = [nn.Parameter(torch.ones(())) for _ in POLICIES["base_lr"]]
    groups = [{"params": [weight], "lr": lr} for weight, lr in zip(weights, POLICIES["base_lr"], strict=True)]
    optimizer = torch.optim.SGD(groups)
    per_epoch, epochs = case["iters_per_epoch"], case["max_epochs"]
    model = nn.ParameterList(weights)
    train = lt.train(model, [1] * per_epoch, lambda model, batch: model[0] + model[1])
    train = train | schedule(optimizer, case["lr_config"], per_epoch, epochs) | lt.optimize(optimizer)
    val = lt.validate(model, [1], lambda model, batch: model[0])
    entries = [({"train": train, "val": val}[mode], n) for mode, n in case["workflow"]]
    if case["runner"] == "IterBasedRunner":
        entries = [(phase, lt.iterations(n)) for phase, n in entries]
        run = lt.workflow(entries, max_iterations=per_epoch * epochs)
    else:
        run = lt.workflow(entries, max_epochs=epochs)

    lrs = [[group["lr"] for group in optimizer.param_groups] for state in run if state.trains]

    expected = case["result"]["lr"]
    assert len(lrs) == len(expected) > 0
    for got, want in zip(lrs, expected, strict=True):
        assert got == [pytest.approx(value, rel=1e-12) for value in want]


@pytest.mark.parametrize(
    "case", [case for case in BUFFERS["cases"] if case["kind"] == "buffer"], ids=lambda case: case["id"]
)
def test_means_over_a_window_or_all(case):
    """Weighted means of the last n entries, or of all, are mmcv's, where each key comes each time."""
    from looptools.means import Means

    compared = 0
    entries: list[tuple[dict[str, float], int]] = []
    for row in case["trace"]:
        name, *arguments = row["op"]
        if name == "update":
            entries.append((arguments[0], arguments[1] if len(arguments) > 1 else 1))
        elif name == "clear":
            entries.clear()
        elif name == "average" and len({tuple(values) for values, _ in entries}) == 1:
            means = Means(arguments[0] if arguments and arguments[0] else None)
            for values, weight in entries:
                means.add({key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}, weight)
            got = {key: value for key, value in means.read().items() if not math.isnan(value)}
            want = {key: value for key, value in row["output"].items() if key in got}
            assert got == pytest.approx(want, rel=1e-12)
            compared += 1
    assert compared
