"""What a pipe costs beside the same loop by hand: both in turn, as ratios within one run.

python benchmarks/overhead.py [iterations]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import looptools as lt

Batch = tuple[Tensor, Tensor]


def classify(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The step of both loops."""
    images, labels = batch
    return {"loss": F.cross_entropy(model(images), labels)}


def make(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network of three layers, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def by_hand(width: int, batches: list[Batch]) -> Iterator[None]:
    """The plain loop, one iteration a step."""
    model, optimizer = make(width)
    parameters = list(model.parameters())
    model.train()
    for batch in batches:
        loss = classify(model, batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        yield


def piped(width: int, batches: list[Batch]) -> lt.Run:
    """The same as a run."""
    model, optimizer = make(width)
    phase = lt.train(model, batches, classify) | lt.optimize(optimizer, max_norm=1.0)
    return lt.workflow([(phase, 1)], max_epochs=1)


def microseconds(advance: Callable[[], object], n: int) -> float:
    """Time of one call, on average over *n*."""
    began = time.perf_counter()
    for _ in range(n):
        advance()
    return (time.perf_counter() - began) / n * 1e6


def main(iterations: int = 200, rounds: int = 21) -> None:
    """Print the medians of both and of their ratio, round by round in turn."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {rounds} rounds of {iterations} iterations, medians")
    for width in (16, 128, 512):
        images, labels = torch.randn(32, 64), torch.randint(0, 10, (32,))
        batches = [(images, labels)] * (iterations * (rounds + 1))
        hand, run = by_hand(width, batches), piped(width, batches)
        for advance in (lambda hand=hand: next(hand), lambda run=run: next(run)):
            microseconds(advance, iterations)  # warm up
        pairs = []
        for turn in range(rounds):  # each goes first every other time
            both = [lambda hand=hand: next(hand), lambda run=run: next(run)]
            times = [microseconds(advance, iterations) for advance in (both if turn % 2 else both[::-1])]
            pairs.append(tuple(times if turn % 2 else times[::-1]))
        plain, pipe = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        print(f"width {width:4}: by hand {plain:7.1f} µs, piped {pipe:7.1f} µs, ratio {ratio:.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
