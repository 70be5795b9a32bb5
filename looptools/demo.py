"""A small network learns to read handwritten digits: model, data, step, pipe, run, plot. Copy what you need.

``python -m looptools demo`` runs it, in half a minute on two cores.
"""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import looptools as lt


def network() -> nn.Sequential:
    """Make the model: images of shape ``(batch, 1, 8, 8)`` to logits of shape ``(batch, 10)``.

    Example:
        >>> network()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 4 * 4, 10),
    )


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Read scikit-learn's 1,797 scans of digits, 8 by 8 pixels each: 1,437 to train on, 360 to validate with."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16  # from 0..16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, val = order[:1437], order[1437:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[val], labels[val])


def classify(model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Tensor]:
    """The step: the loss, and what else is worth logging."""
    images, labels = batch
    logits = model(images)
    return {"loss": F.cross_entropy(logits, labels), "accuracy": (logits.argmax(1) == labels).float().mean()}


def training(out: str | Path, epochs: int) -> lt.Run:
    """Put the run together: nothing is computed or written before it is used."""
    torch.manual_seed(0)
    train_set, val_set = digits()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    train = (
        lt.train(model, DataLoader(train_set, batch_size=32, shuffle=True), classify)
        | lt.schedule_lr(optimizer, lt.schedules.cosine(), warmup=50)
        | lt.optimize(optimizer, max_norm=1.0)
    )
    val = lt.validate(model, DataLoader(val_set, batch_size=120), classify)

    return (
        lt.workflow([(train, 1), (val, 1)], max_epochs=epochs)
        | lt.log(out, every=15, bar=True)
        | lt.checkpoint(out, keep=2, best=lt.highest("val/accuracy"))
    )


def demo(out: str | Path = "runs/digits", epochs: int = 12) -> lt.Run:
    """Train for *epochs* epochs, or go on from where *out* stands; then plot, and say what came of it.

    Args:
        out: Folder for logs, checkpoints and the plot.
        epochs: Epochs in all, those done earlier included.

    Returns:
        The finished run.
    """
    out = Path(out)
    run = training(out, epochs)
    with warnings.catch_warnings():  # of another number of epochs, which is what --epochs is for
        warnings.filterwarnings("ignore", "resume: since the checkpoint was saved", UserWarning)
        resumed = run.resume()
    if resumed:
        done = run.progress.epoch
        print(f"Going on from {resumed}." if done < epochs else f"Done already: {done} epochs, in {out}.")

    with run:  # files are closed whatever happens, Ctrl-C included
        run.to_end()

    lt.plot(run, path=out / "curves.png")
    best = run.best["val/accuracy"]
    print(f"""
Best accuracy: {best["value"]:.4f} on 360 held-back scans, after epoch {best["epoch"]} of {run.progress.epoch}.

  curves        {out / "curves.png"}
  all numbers   {out / "log.jsonl"}
  TensorBoard   {shlex.join(["tensorboard", "--logdir", str(out / "tensorboard")])}
  the model     import torch, looptools.demo
                model = looptools.demo.network()
                model.load_state_dict(torch.load({str(out / "best.pt")!r}, weights_only=True)["weights"])
  train longer  {command(out, 2 * run.progress.epoch)}""")
    return run


def command(out: str | Path, epochs: int) -> str:
    """What to type in this place to run the demo."""
    return shlex.join([sys.orig_argv[0], "-m", "looptools", "demo", "--out", str(out), "--epochs", str(epochs)])
