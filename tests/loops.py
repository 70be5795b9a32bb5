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
    norm_type: float = 2.0
    max_value: float | None = None
    across_epochs: bool = False
    autocast: torch.dtype | None = None

    def make(self) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any], DataLoader[Any]]:
        torch.manual_seed(0)
        model = network()
        options = {
            "SGD": {"lr": 0.05, "momentum": 0.9},
            "AdamW": {"lr": 0.01, "weight_decay": 0.1},
            "Adam": {"lr": 0.01},
        }[self.optimizer]
        optimizer = getattr(torch.optim, self.optimizer)(model.parameters(), **options)
        return model, optimizer, loader(self.workers), loader(shuffle=False)


def by_hand(case: Case) -> dict[str, Tensor]:
    """Train with a loop that anybody would write; returns weights and buffers."""
    model, optimizer, train, val = case.make()
    base, n = optimizer.param_groups[0]["lr"], case.accumulate
    updates, total = 0, case.epochs * math.ceil(len(train) / n)
    end = len(train)  # of a row of windows
    if case.across_epochs:
        end = case.epochs * len(train)
        total = math.ceil(end / n)
    for epoch in range(case.epochs):
        before = epoch * len(train) if case.across_epochs else 0
        model.train()
        for index, batch in enumerate(train, before):
            if case.cosine:
                lr = (1 + math.cos(math.pi * updates / total)) / 2 * base
                optimizer.param_groups[0]["lr"] = min(1, 0.1 + 0.9 * updates / 3) * lr
            if index % n == 0:
                optimizer.zero_grad()
            window = min(n, end - index // n * n)
            with torch.autocast("cpu", case.autocast) if case.autocast else contextlib.nullcontext():
                loss = classify(model, batch)["loss"]
            (loss / window if window > 1 else loss).backward()
            if (index + 1) % n == 0 or index + 1 == end:
                if case.max_value is not None:
                    nn.utils.clip_grad_value_(model.parameters(), case.max_value)
                if case.max_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), case.max_norm, case.norm_type)
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
    train = lt.train(model, source, step, autocast=case.autocast)
    if case.cosine:
        train = train | lt.schedule_lr(optimizer, lt.schedules.cosine(), warmup=3)
    train = train | lt.optimize(
        optimizer,
        max_norm=case.max_norm,
        norm_type=case.norm_type,
        max_value=case.max_value,
        accumulate=case.accumulate,
        across_epochs=case.across_epochs,
    )
    return lt.workflow([(train, 1), (lt.validate(model, val_loader, step), 1)], max_epochs=case.epochs)


@attrs.frozen
class Together:
    """Two optimizers over one loss: one for the matrices, AdamW for the rest. What both loops do."""

    matrices: str = "SGD"
    max_norm: float | None = None
    accumulate: int = 1
    across_epochs: bool = False
    cosine: bool = False
    planted: dict[int, str] | None = None  # iterations with infinite gradients: whose; None: no scaler
    epochs: int = 2

    def make(self) -> tuple[nn.Module, list[torch.optim.Optimizer], DataLoader[Any], torch.amp.GradScaler | None]:
        torch.manual_seed(0)
        model = network()
        matrices, rest = ([p for p in model.parameters() if (p.ndim == 2) is two] for two in (True, False))
        options = {"SGD": {"lr": 0.05, "momentum": 0.9}, "Muon": {"lr": 0.02, "weight_decay": 0.1}}[self.matrices]
        first = getattr(torch.optim, self.matrices)(matrices, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3) if self.planted is not None else None
        return model, [first, torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1)], loader(), scaler

    def step(self, model: nn.Module, batch: Any, n: int) -> Tensor:
        """The loss of iteration *n*, whose gradients are infinite for the one, the other or both optimizers."""
        loss = classify(model, batch)["loss"]
        whose = (self.planted or {}).get(n, "")
        for name, parameter in (("matrices", model[0].weight), ("rest", model[4].bias)):  # type: ignore[index]
            if whose in (name, "both"):
                loss = loss + parameter.sum() * math.inf
        return loss


def together_by_hand(case: Together) -> tuple[dict[str, Tensor], list[tuple[bool, ...]], list[float]]:
    """Torch's recipe with two optimizers and one scaler: the weights, who moved in each update, and the scales."""
    model, optimizers, train, scaler = case.make()
    params = [p for optimizer in optimizers for p in optimizer.param_groups[0]["params"]]
    bases = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    n, end = case.accumulate, len(train) * (case.epochs if case.across_epochs else 1)
    total, updates, moved, scales = math.ceil(end / n) * (1 if case.across_epochs else case.epochs), [0, 0], [], []
    model.train()
    for epoch in range(case.epochs):
        for index, batch in enumerate(train, epoch * len(train) if case.across_epochs else 0):
            if case.cosine:
                for optimizer, base, done in zip(optimizers, bases, updates, strict=True):
                    optimizer.param_groups[0]["lr"] = (1 + math.cos(math.pi * done / total)) / 2 * base
            if index % n == 0:
                for optimizer in optimizers:
                    optimizer.zero_grad()
            window = min(n, end - index // n * n)
            loss = case.step(model, batch, index if case.across_epochs else epoch * len(train) + index)
            loss = loss / window if window > 1 else loss
            (scaler.scale(loss) if scaler else loss).backward()
            if (index + 1) % n == 0 or index + 1 == end:
                for optimizer in optimizers:
                    if scaler:
                        scaler.unscale_(optimizer)
                finite = tuple(
                    all(bool(p.grad.isfinite().all()) for p in optimizer.param_groups[0]["params"])
                    for optimizer in optimizers
                )
                if case.max_norm is not None:
                    nn.utils.clip_grad_norm_(params, case.max_norm)
                for optimizer in optimizers:
                    if scaler:
                        scaler.step(optimizer)
                    else:
                        optimizer.step()
                if scaler:
                    scaler.update()
                    scales.append(scaler.get_scale())
                updates = [done + moves for done, moves in zip(updates, finite, strict=True)]
                moved.append(finite)
    return model.state_dict(), moved, scales


def together_piped(case: Together) -> lt.Run:
    """The same as a run."""
    model, optimizers, source, scaler = case.make()
    train = lt.train(model, source, lambda model, batch, state: case.step(model, batch, state.iteration))
    if case.cosine:
        for optimizer in optimizers:
            train = train | lt.schedule_lr(optimizer, lt.schedules.cosine())
    train = train | lt.optimize(
        optimizers,
        max_norm=case.max_norm,
        accumulate=case.accumulate,
        across_epochs=case.across_epochs,
        scaler=scaler,
    )
    return lt.workflow([(train, 1)], max_epochs=case.epochs)


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


def tripping(part: Any, at: Callable[[lt.State], bool]) -> Any:
    """The same part, which raises as `Trips` does; to the run it is still a part of its own class."""
    trips = Trips(part, at)
    kind: Any = type(part)

    def call(self: Any, states: Iterable[lt.State]) -> Iterator[lt.State]:
        return kind.__call__(self, trips._guard(states))  # type: ignore[no-any-return]

    new = object.__new__(type(kind.__name__, (kind,), {"__call__": call}))
    for field in attrs.fields(kind):
        object.__setattr__(new, field.name, getattr(part, field.name))
    return new


READS = ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__", "__index__", "__format__", "__repr__")


@contextlib.contextmanager
def device_reads(device: str = "") -> Iterator[list[str]]:
    """Collects the names of the methods by which tensors (on one kind of *device*) become numbers; each waits."""
    reads: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def method(self: Tensor, *args: Any, **options: Any) -> Any:
            if not device or self.device.type == device:
                reads.append(name)
            return original(self, *args, **options)

        return method

    with contextlib.ExitStack() as stack:
        for name in READS:
            stack.enter_context(mock.patch.object(Tensor, name, counted(name)))
        yield reads
