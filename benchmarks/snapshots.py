"""What snapshots cost an iteration, and going back: all in turn, in one run, as ratios to a run without.

python benchmarks/snapshots.py [iterations]
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import looptools as lt

ROUNDS = 5
CASES: dict[str, Any] = {
    "without": None,
    "every=50, rollback=False": lt.snapshots(every=50, rollback=False),
    "every=50": lt.snapshots(every=50),
    "every=1": lt.snapshots(every=1),
}


def build(width: int, snapshots: Any) -> lt.Run:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1)]
    model = nn.Sequential(*layers, *(nn.Linear(width, width) for _ in range(4)), nn.Linear(width, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = [(torch.randn(64, width), torch.randint(0, 10, (64,))) for _ in range(8)] * 1000

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    train = lt.train(model, batches, step) | lt.optimize(optimizer, max_norm=1.0)
    return lt.workflow([(train, 1)], max_epochs=1, snapshots=snapshots)


def seconds(run: lt.Run, iterations: int) -> float:
    began = time.perf_counter()
    for _ in range(iterations):
        next(run)
    return (time.perf_counter() - began) / iterations


def main() -> None:
    """Time widths and cases in turn, and print the minima."""
    iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    for width in (64, 512, 1024):
        runs = {name: build(width, snapshots) for name, snapshots in CASES.items()}
        for run in runs.values():
            seconds(run, 10)
        best = dict.fromkeys(runs, float("inf"))
        for _ in range(ROUNDS):
            for name, run in runs.items():
                best[name] = min(best[name], seconds(run, iterations))
        for name, run in runs.items():
            took = f"{1e3 * best[name]:8.3f} ms an iteration, ratio {best[name] / best['without']:.2f}"
            print(f"width {width:>4}  {name:<26} {took}  {run.snapshots or ''}")
        run = runs["every=50"]
        n = min(30, run.snapshots.reach)
        began = time.perf_counter()
        run.back(n)
        took = f"{(time.perf_counter() - began) / best['without']:.1f} iterations"
        print(f"width {width:>4}  back({n}) takes as long as {took}, of which at most 50 are computed again")


if __name__ == "__main__":
    main()
