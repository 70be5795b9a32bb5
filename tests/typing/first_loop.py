"""A user's script: type-checked, never run."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import looptools as lt


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    images, labels = batch
    return {"loss": F.cross_entropy(model(images), labels)}


def doubled(states: Iterable[lt.State]) -> Iterator[lt.State]:
    for state in states:
        state.metrics["twice"] = 2 * state.metrics["loss"]
        yield state


def main() -> None:
    model = nn.Linear(2, 2)
    batches = [(torch.ones(4, 2), torch.zeros(4, dtype=torch.long))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train: lt.Phase = (
        lt.train(model, batches, classify)
        | lt.schedule_lr(optimizer, lt.schedules.cosine(), warmup=100)
        | lt.optimize(optimizer, max_norm=1.0)
        | doubled
    )
    val = lt.validate(model, lambda: iter(batches), classify, device="model")
    run: lt.Run = (
        lt.workflow([(train, 1), (val, lt.iterations(5))], max_epochs=12)
        | lt.log("runs/digits", every=50)
        | lt.checkpoint("runs/digits", every=lt.rounds(2), keep=3, best=lt.highest("val/accuracy"))
    )
    run.resume()
    state: lt.State = next(run)
    loss: Tensor | None = state.loss
    print(loss, state.last, state.plan)
    for name, state in run.stages():
        print(name, state.iteration)
    states: Iterator[lt.State] = lt.pipe([state], doubled, lt.chain(doubled, doubled))
    print(next(states), run.after("backward"), run.retry(), list(run.take(3)))
    results: dict[str, float] = run.to_end()
    print(results)
