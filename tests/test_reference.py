"""Number by number what mmcv 1.x's Runner did, for what the core has."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from policies import schedule
from torch import nn

import looptools as lt

FOLDER = Path(__file__).parent / "reference"
TRAINING = json.loads((FOLDER / "training.json").read_text())
BUFFERS = json.loads((FOLDER / "log_buffer.json").read_text())


class Linear(nn.Module):
    """The regression of the figures."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(TRAINING["initial"]["w"], dtype=dtype))
        self.b = nn.Parameter(torch.tensor(TRAINING["initial"]["b"], dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w.T + self.b


def covered(case: dict[str, Any]) -> bool:
    """All but the averaged weights, which are in test_ema.py, and the resumed ones, where mmcv loses a gradient."""
    return case["family"] != "ema" and "resume_after_epoch" not in case


@pytest.mark.parametrize("case", [case for case in TRAINING["cases"] if covered(case)], ids=lambda case: case["id"])
def test_weights_after_every_iteration(case):
    """Weights, loss, grad_norm and learning rate are mmcv's after each iteration: 1e-12 relative, 1e-6 in float32."""
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
        train = train | schedule(optimizer, case["lr_config"])
    train = train | lt.optimize(
        optimizer,
        max_norm=clip.get("max_norm"),
        norm_type=clip.get("norm_type", 2),
        accumulate=config.get("cumulative_iters", 1),
        across_epochs=True,
    )
    run = lt.workflow([(train, 1)], max_epochs=epochs)
    norms = 0

    rows = [row for row in case["rows"] if row["at"] == "after_train_iter"]
    close = {"rel": 1e-12, "abs": 1e-15} if case["dtype"] == "float64" else {"rel": 1e-6, "abs": 1e-6}
    for row, state in zip(rows, run, strict=True):
        assert model.w.detach().tolist() == [pytest.approx(values, **close) for values in row["w"]]
        assert model.b.detach().tolist() == pytest.approx(row["b"], **close)
        assert state.loss.item() == pytest.approx(row["loss"], **close)
        assert [group["lr"] for group in optimizer.param_groups][: len(row["lr"])] == pytest.approx(row["lr"], **close)
        norms += state.grad_norm is not None
        assert norms == row["grad_norms_so_far"]
        if state.grad_norm is not None:
            assert state.grad_norm.item() == pytest.approx(row["grad_norm"], **close)
    assert len(rows) == epochs * len(batches)


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
