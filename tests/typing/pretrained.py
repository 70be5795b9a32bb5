"""Weights from elsewhere and for others: type-checked, never run."""

from pathlib import Path

import torch
from torch import Tensor, nn

import looptools as lt


def without_head(key: str) -> str | None:
    return None if key.startswith("head.") else key


def main() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    saved: dict[str, Tensor] = model.state_dict()
    report = lt.load_weights(model, "runs/digits/best.pt", rename={r"^backbone\.": "", r"^head\.": None})
    missing: tuple[str, ...] = report.missing
    source: Path | None = report.source
    lt.load_weights(model, Path("runs"), rename=[("^a", "b"), ("^c", None)], of="averaged")
    lt.load_weights(model, saved, rename=without_head, strict=False, assign=True)
    lt.load_weights(model[0], torch.load("mmcv.pth", weights_only=True), prefix="backbone")
    run: lt.Run = lt.workflow([(lt.validate(model, [torch.ones(2)], lambda model, batch: model(batch)), 1)])
    file: Path = lt.save_weights(model, "digits.safetensors")
    files = [lt.save_weights(run, file), lt.save_weights(saved, "a.pt"), lt.save_weights("runs", "b.pt", of="averaged")]
    print(missing, source, files)
