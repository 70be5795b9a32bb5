"""The plain PyTorch loop that a pipe must equal, and the small network both train."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import looptools as lt

SAMPLES, BATCH = 26, 4  # 7 batches, the last of 2


def network() -> nn.Module:
    """Dropout draws numbers, BatchNorm keeps buffers."""
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))


def loader(workers: int = 0, shuffle: bool = True) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(SAMPLES, 3, generator=generator)
    labels = torch.randint(0, 2, (SAMPLES,), generator=generator)
    return DataLoader(TensorDataset(images, labels), BATCH, shuffle=shuffle, num_workers=workers)


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    images, labels = batch
    logits = model(images)
    return {"loss": F.cross_entropy(logits, labels), "accuracy": (logits.argmax(1) == labels).float().mean()}


@attrs.frozen
class Case:
    """What both loops do."""

    optimizer: str = "SGD"
    max_norm: float | None = None
    accumulate: int = 1
    cosine: bool = False
    workers: int = 0
    epochs: int = 2
    length_known: bool = True

    def make(self) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any], DataLoader[Any]]:
        torch.manual_seed(0)
        model = network()
        options = {"SGD": {"lr": 0.05, "momentum": 0.9}, "AdamW": {"lr": 0.01, "weight_decay": 0.1}}[self.optimizer]
        optimizer = getattr(torch.optim, self.optimizer)(model.parameters(), **options)
        return model, optimizer, loader(self.workers), loader(shuffle=False)


def by_hand(case: Case) -> dict[str, Tensor]:
    """Train with a loop that anybody would write; returns weights and buffers."""
    model, optimizer, train, val = case.make()
    base, n = optimizer.param_groups[0]["lr"], case.accumulate
    updates, total = 0, case.epochs * math.ceil(len(train) / n)
    for _ in range(case.epochs):
        model.train()
        for index, batch in enumerate(train):
            if case.cosine:
                lr = (1 + math.cos(math.pi * updates / total)) / 2 * base
                optimizer.param_groups[0]["lr"] = min(1, 0.1 + 0.9 * updates / 3) * lr
            if index % n == 0:
                optimizer.zero_grad()
            window = min(n, len(train) - index // n * n)
            loss = classify(model, batch)["loss"]
            (loss / window if window > 1 else loss).backward()
            if (index + 1) % n == 0 or index + 1 == len(train):
                if case.max_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), case.max_norm)
                optimizer.step()
                updates += 1
        model.eval()
        with torch.no_grad():
            for batch in val:
                classify(model, batch)
    return model.state_dict()


def piped(case: Case, step: Callable[..., Any] = classify) -> lt.Run:
    """The same as a run."""
    model, optimizer, train_loader, val_loader = case.make()
    source: Any = train_loader if case.length_known else lambda: iter(train_loader)
    train = lt.train(model, source, step)
    if case.cosine:
        train = train | lt.schedule_lr(optimizer, lt.schedules.cosine(), warmup=3)
    train = train | lt.optimize(optimizer, max_norm=case.max_norm, accumulate=case.accumulate)
    return lt.workflow([(train, 1), (lt.validate(model, val_loader, step), 1)], max_epochs=case.epochs)


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], *, but: Iterable[str] = ()) -> None:
    """Equal to the bit, *but* keys with one of these endings."""
    assert left.keys() == right.keys()
    for key in left:
        if not key.endswith(tuple(but)):
            assert torch.equal(left[key], right[key]), key


class Planted(Exception):
    """Raised on purpose."""


class Trips:
    """A part that raises `Planted` at the entry of the wrapped one, once at each of the given states."""

    def __init__(self, part: Any, at: Callable[[lt.State], bool]) -> None:
        self.part, self.at = part, at
        self.tripped: set[tuple[str, int, int]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)

    def __call__(self, states: Iterable[lt.State]) -> Iterator[lt.State]:
        return self.part(self._guard(states))  # type: ignore[no-any-return]

    def _guard(self, states: Iterable[lt.State]) -> Iterator[lt.State]:
        for state in states:
            key = (state.phase, state.iteration, state.index)
            if self.at(state) and key not in self.tripped:
                self.tripped.add(key)
                raise Planted(f"at {key}")
            yield state


READS = ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__", "__index__", "__format__", "__repr__")


@contextlib.contextmanager
def device_reads() -> Iterator[list[str]]:
    """Collects the names of the methods by which tensors become numbers; on a GPU each waits for the device."""
    reads: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def method(self: Tensor, *args: Any, **options: Any) -> Any:
            reads.append(name)
            return original(self, *args, **options)

        return method

    with contextlib.ExitStack() as stack:
        for name in READS:
            stack.enter_context(mock.patch.object(Tensor, name, counted(name)))
        yield reads
