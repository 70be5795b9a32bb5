"""Small trainings with everything that a resumption could lose, for the campaigns."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

import looptools as lt

SAMPLES, BATCH, EPOCHS = 38, 4, 3  # 10 batches a pass, the last of 2; 30 training iterations and 9 of validation


@attrs.frozen
class Training:
    """One way to save a training.

    Args:
        every: Iterations between two checkpoints.
        background: Whether they are written in a thread.
        top: How many of the best are kept.
        workers: Of the training's loader; with some, it is `lt.seeded`.
        keep: How many of the newest checkpoints stay.
    """

    every: int = 3
    background: bool = False
    top: int = 1
    workers: int = 0
    keep: int = 2

    @property
    def name(self) -> str:
        return "-".join(f"{field.name}={getattr(self, field.name)}" for field in attrs.fields(type(self)))


class Noisy(Dataset[Any]):
    """Samples that are another each time: torch's, Python's and NumPy's generators are drawn from."""

    def __init__(self, samples: int) -> None:
        import numpy

        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(samples, 3, generator=generator)
        self.labels = torch.randint(0, 2, (samples,), generator=generator)
        self.random = numpy.random

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index] + 0.1 * torch.randn(3)
        image = image.flip(0) if random.random() < 0.5 else image
        return image * float(self.random.uniform(0.9, 1.1)), self.labels[index]


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    images, labels = batch
    logits = model(images)
    return {"loss": F.cross_entropy(logits, labels), "accuracy": (logits.argmax(1) == labels).float().mean()}


def build(training: Training, folder: Path) -> lt.Run:
    """BatchNorm, dropout, AdamW, one-cycle, clipping, accumulation, an average that is judged, random transforms."""
    lt.seed_everything(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    loader = DataLoader(Noisy(SAMPLES), BATCH, shuffle=True, num_workers=training.workers)
    judged = DataLoader(Noisy(10), BATCH)
    train = (
        lt.train(model, lt.seeded(loader, 5) if training.workers else loader, classify)
        | lt.schedule_lr(optimizer, lt.schedules.one_cycle())
        | lt.optimize(optimizer, accumulate=3, across_epochs=True, max_norm=1.0)
        | lt.ema(averaged)
    )
    val = lt.validate(averaged, judged, classify)
    best = lt.lowest("val/loss", top=training.top)
    options = {"every": training.every, "keep": training.keep, "best": best, "background": training.background}
    return (
        lt.workflow([(train, 1), (val, 1)], max_epochs=EPOCHS)
        | lt.log(folder, every=2, line=None, tensorboard=False)
        | lt.checkpoint(folder, **options)
    )


def result(run: lt.Run, folder: Path) -> dict[str, Any]:
    """What must be the same bits, however often a training was killed."""
    cursor = run.cursor
    models = {id(phase.model): phase.model for phase in cursor.passes.agenda.phases}
    tensors = [value for model in models.values() for value in model.state_dict().values()]
    for state in run.optimizer.state.values():
        tensors += [value for value in state.values() if torch.is_tensor(value)]
    words = hashlib.sha256()
    for tensor in tensors:
        words.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    words.update(torch.get_rng_state().numpy().tobytes() + repr(random.getstate()).encode())
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "bits": words.hexdigest(),
        "log": _without_time(rows),
        "history": _without_time(run.history),
        "best": run.best,
        "iterations": run.progress.iteration,
        "updates": list(run.progress.updates.values()),
    }


def _without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
