"""What each part costs an iteration, beside a plain generator part: all in turn, in one run.

python benchmarks/parts.py [iterations]
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import looptools as lt

ROUNDS = 7


def plain(states: Iterable[lt.State]) -> Iterator[lt.State]:
    """Does nothing: what any part costs at least."""
    for state in states:
        yield state


def time_of(part: Any, iterations: int) -> float:
    """CPU seconds an iteration of a run whose step does next to nothing, with *part*."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = torch.zeros((), requires_grad=True)
    phase = lt.train(model, [torch.zeros(1)] * iterations, lambda model, batch: loss)
    made = part(model, optimizer)
    phase = phase if made is None else phase | made
    phase = phase | moves  # a part of one's own, so that nobody wonders whether it trains
    run = lt.workflow([(phase, 1)], max_epochs=1)
    states = iter(run)
    for _ in range(20):
        next(states)
    began = time.process_time()
    for _ in range(iterations - 21):
        next(states)
    return (time.process_time() - began) / (iterations - 21)


def moves(states: Iterable[lt.State]) -> Iterator[lt.State]:
    """Says that the weights have moved, without the cost of it."""
    for state in states:
        state.updates = True
        yield state


PARTS: dict[str, Callable[[Any, Any], Any]] = {
    "(none)": lambda model, optimizer: None,
    "a plain generator": lambda model, optimizer: plain,
    "schedule_lr(cosine, warmup)": lambda m, o: lt.schedule_lr(o, lt.schedules.cosine(), warmup=10, by="iteration"),
    "schedule(weight_decay, linear)": lambda m, o: lt.schedule(
        o, "weight_decay", lt.schedules.linear(), by="iteration"
    ),
    "freeze(until=epochs)": lambda m, o: lt.freeze("bias", until=lt.epochs(9)),
    "measure(a function)": lambda m, o: lt.measure({"mean": torch.mean}, lambda state: state.batch),
    "nan_guard()": lambda m, o: lt.nan_guard(),
    "nan_guard(every=100)": lambda m, o: lt.nan_guard(every=100),
    "timer()": lambda m, o: lt.timer(),
    "memory()": lambda m, o: lt.memory(),
    "unused_params(model)": lambda m, o: lt.unused_params(m),
    "watch(model, every=100)": lambda m, o: lt.watch(m, every=100),
}


def main() -> None:
    """Time all parts, and print what each adds."""
    warnings.simplefilter("ignore")  # the loss does not come from the model, which unused_params rightly finds odd
    iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(Path(folder)):
        for _ in range(ROUNDS):
            for name, part in PARTS.items():
                best[name] = min(best.get(name, 1.0), time_of(part, iterations))
    nothing = best["(none)"]
    unit = best["a plain generator"] - nothing
    print(f"an iteration without the part: {nothing * 1e6:.2f} µs; best of {ROUNDS} times {iterations} iterations\n")
    print(f"{'part':<32} {'adds µs':>8} {'x plain':>8}")
    for name in list(PARTS)[1:]:
        added = best[name] - nothing
        print(f"{name:<32} {added * 1e6:8.2f} {added / unit:8.1f}")


if __name__ == "__main__":
    main()
