"""How long it takes to simulate 90 epochs of ImageNet, beside as many calls of a cosine.

python benchmarks/simulate.py
"""

from __future__ import annotations

import math
import time

import torch
from torch.utils.data import DataLoader, Dataset

import looptools as lt

IMAGES, EPOCHS, ROUNDS = 1_281_167, 90, 5


class Images(Dataset[None]):
    """A data set of which only the length is asked."""

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> None:
        raise AssertionError


def main() -> None:
    """Print the minimum of some rounds."""
    model = torch.nn.Linear(1, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    train = lt.train(model, DataLoader(Images(), 256, shuffle=True), lambda model, batch: model(batch))
    train = train | lt.schedule_lr(sgd, lt.schedules.cosine(), warmup=lt.epochs(5)) | lt.optimize(sgd)
    run = lt.workflow([(train, 1)], max_epochs=EPOCHS) | lt.log(every=50, line=None)
    n, took, plain = len(run), float("inf"), float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        simulation = run.simulate()
        took = min(took, time.perf_counter() - began)
        began = time.perf_counter()
        curve = [(1 + math.cos(math.pi * done / n)) / 2 for done in range(n)]
        plain = min(plain, time.perf_counter() - began)
    cosines = f"{len(curve)} cosines in a list: {plain:.2f} s"
    print(f"{simulation.iterations} iterations: {took:.2f} s; {cosines}; ratio {took / plain:.1f}")


if __name__ == "__main__":
    main()
