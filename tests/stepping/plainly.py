"""A pipe in which anything can go wrong, and the plain loop that does what was really done, once each.

The loop is told what that was by a list: of every batch what was done with it, in order, and by whose hand something
was changed. It knows nothing of runs, parts and snapshots.
"""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
import numpy
import torch
import torch.nn.functional as F
from loops import Planted, network
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

import looptools as lt

Op = tuple[Any, ...]  # the name of a method of `Plainly`, and its arguments

TRAIN, VAL, EPOCHS = 3, 2, 4  # batches of a pass, and passes
NORM = 0.3


@attrs.frozen
class Case:
    """What both loops do."""

    snapshots: tuple[int, int, bool] | None = (3, 4, True)
    optimizer: str = "SGD"
    accumulate: int = 1
    scaler: bool = False
    length_known: bool = True
    validates: bool = True
    draws: bool = False  # samples are augmented at random
    own_generator: bool = False  # the order comes from one that hangs on the loader
    drops: str = ""  # "early" or "late": where a part drops states
    schedule: bool = True

    @property
    def round(self) -> int:
        """Batches of a walk through the workflow."""
        return TRAIN + VAL * self.validates

    def drops_it(self, iteration: int) -> bool:
        return bool(self.drops) and iteration % 4 == 2


class Trips:
    """Something happens at a place, once: an exception, or Ctrl-C pressed once or twice."""

    def __init__(self) -> None:
        self.where, self.what, self.left = "", "", 0
        self.hit = ""

    def arm(self, where: str = "", what: str = "", after: int = 0, hit: str = "") -> None:
        self.where, self.what, self.left, self.hit = where, what, after, hit

    def due(self, where: str) -> bool:
        return where == self.where and not self.left

    def __call__(self, where: str) -> None:
        if where != self.where:
            return
        if self.left:
            self.left -= 1
            return
        self.hit, self.where = where, ""
        if self.what == "raise":
            raise Planted(where)
        signal.raise_signal(signal.SIGINT)
        if self.what == "press twice":
            signal.raise_signal(signal.SIGINT)


class Samples(Dataset[Any]):
    """Ten samples, six to judge by."""

    def __init__(self, trips: Trips, count: int, draws: bool) -> None:
        generator = torch.Generator().manual_seed(count)
        self.images = torch.randn(count, 3, generator=generator)
        self.labels = torch.randint(0, 2, (count,), generator=generator)
        self.trips, self.draws = trips, draws

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        if self.draws:
            image = image + 0.1 * torch.randn(3) + random.random() / 10 + float(numpy.random.rand()) / 10
            self.trips("loader")
        return image, self.labels[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        if not self.draws:
            self.trips("loader")
        return [self[index] for index in indices]


def step_of(version: int, trips: Trips) -> Callable[..., Any]:
    """The step; the last version calls the model twice."""

    def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, labels = batch
        logits = model(images)
        loss = F.cross_entropy(logits, labels) * (1.0, 0.5, 2.0)[version]
        if version == 2:
            loss = loss + F.cross_entropy(model(images), labels)
        trips("loss")
        return {"loss": loss, "accuracy": (logits.argmax(1) == labels).float().mean()}

    return classify


def judge(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {"loss": F.cross_entropy(model(batch[0]), batch[1])}


def decayed(done: int, base: float) -> float:
    return base * 0.9 ** (done % 4)


def optimizer_of(kind: str, trips: Trips, model: nn.Module) -> torch.optim.Optimizer:
    """One that may stop half way; its weights are in two groups."""
    parent: Any = getattr(torch.optim, kind)

    class Halting(parent):  # type: ignore[misc]
        def step(self, closure: Any = None) -> None:
            if not trips.due("optimizer"):
                super().step()
                trips("moved")
                return
            held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            halves = held[:2], held[2:]
            for now, later in (halves, halves[::-1]):
                kept = [p.grad for p in later]
                for p in later:
                    p.grad = None
                super().step()
                for p, grad in zip(later, kept, strict=True):
                    p.grad = grad
                trips("optimizer")

    weights = list(model.parameters())
    options = {"SGD": {"lr": 0.05, "momentum": 0.9}, "AdamW": {"lr": 0.01, "weight_decay": 0.1}}[kind]
    made: torch.optim.Optimizer = Halting([{"params": weights[:2]}, {"params": weights[2:], "lr": 0.02}], **options)
    return made


class Bench:
    """What both loops train, and with what."""

    def __init__(self, case: Case, trips: Trips) -> None:
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        self.case, self.trips = case, trips
        self.model: Any = network()
        self.averaged = AveragedModel(self.model, avg_fn=self._average)
        self.optimizer = optimizer_of(case.optimizer, trips, self.model)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2) if case.scaler else None
        self.judged: Any = None  # the phase that validates
        generator = torch.Generator().manual_seed(5) if case.own_generator else None
        self.train = DataLoader(Samples(trips, 10, case.draws), 4, shuffle=True, generator=generator)
        self.val = DataLoader(Samples(Trips(), 6, False), 3)

    def _average(self, average: Tensor, weight: Tensor, count: Any) -> Tensor:
        self.trips("ema")
        return average + (weight - average) * 0.25


def scaled(seen: int) -> float:
    return 1 + seen % 3 / 4


@attrs.define(eq=False)
class own:
    """A part of the user's own, which changes gradients by what it remembers."""

    params: list[Tensor]
    trips: Trips
    seen: int = attrs.field(default=0, init=False)

    def __call__(self, states: Iterable[lt.State]) -> Iterator[lt.State]:
        for state in states:
            self.seen += 1
            for number, parameter in enumerate(self.params):
                if number == 2:
                    self.trips("own")
                assert parameter.grad is not None
                parameter.grad.mul_(scaled(self.seen))
            yield state


@attrs.define(eq=False)
class asks:
    """Piped onto the run: has something done at each boundary."""

    trips: Trips
    done: int = attrs.field(default=0, init=False)

    def __call__(self, states: Iterable[lt.State]) -> Iterator[lt.State]:
        for state in states:
            assert state.run is not None
            state.run.at_boundary(self.count)
            yield state

    def count(self, run: lt.Run) -> None:
        self.trips("boundary")
        self.done += 1


class Sink:
    def __init__(self, trips: Trips) -> None:
        self.trips = trips

    def write(self, row: Any, state: Any) -> None:
        self.trips("sink")

    def close(self) -> None:
        """Nothing is open."""


def built(case: Case, trips: Trips, version: int = 0, max_norm: float = NORM) -> tuple[lt.Run, Bench]:
    """The run."""
    bench = Bench(case, trips)
    model, optimizer, scaler = bench.model, bench.optimizer, bench.scaler
    weights = list(model.parameters())

    def drops(states: Iterable[lt.State]) -> Iterator[lt.State]:
        for state in states:
            if not case.drops_it(state.iteration):
                yield state

    def decays(done: int, total: int | None, base: float) -> float:
        trips("schedule")
        return decayed(done, base)

    source: Any = bench.train if case.length_known else lambda: iter(bench.train)
    train = lt.train(model, source, step_of(version, trips))
    train = train | drops if case.drops == "early" else train
    train = train | lt.schedule_lr(optimizer, decays) if case.schedule else train
    train = train | lt.backward(optimizer, accumulate=case.accumulate, scaler=scaler) | own(weights, trips)
    train = train | lt.clip_grad_norm(weights, max_norm) | lt.update(optimizer, scaler=scaler) | lt.ema(bench.averaged)
    train = train | drops if case.drops == "late" else train
    bench.judged = lt.validate(model, bench.val, judge)
    entries = [(train, 1)] + ([(bench.judged, 1)] if case.validates else [])
    snapshots = None
    if case.snapshots is not None:
        every, keep, rollback = case.snapshots
        snapshots = lt.snapshots(every=every, keep=keep, rollback=rollback)
    run = lt.workflow(entries, max_epochs=EPOCHS, snapshots=snapshots)
    model[2].register_forward_hook(lambda *_: trips("model"))  # behind BatchNorm
    model[0].weight.register_hook(lambda _: trips("gradient"))  # the others are filled by then
    return run | lt.log(every=1, line=None, to=[Sink(trips)]) | asks(trips), bench


def line(case: Case, trains: bool) -> list[str]:
    """Short names of the parts of a pass."""
    ends = ["average", "log", "asks"]
    if not trains:
        return ["forward", *ends]
    early = ["drops"] * (case.drops == "early") + ["schedule_lr"] * case.schedule
    late = ["drops"] * (case.drops == "late")
    return ["forward", *early, "backward", "own", "clip_grad_norm", "update", "ema", *late, *ends]


# By hand


def by_hand(bench: Bench, kind: str, value: float) -> None:
    """Change something, as a user does at the prompt."""
    if kind == "weight":
        with torch.no_grad():
            bench.model[0].weight.mul_(value)
    elif kind == "buffer":
        bench.model[1].running_mean.add_(value)
    elif kind == "lr":
        bench.optimizer.param_groups[0]["lr"] *= value
    elif kind == "decay":
        bench.optimizer.param_groups[1]["weight_decay"] += value / 100
    elif kind == "gradient":
        for parameter in bench.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(value)
    else:
        torch.rand(3)
        random.random()
        numpy.random.rand()


# The loop


def generators() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), numpy.random.get_state()


def set_generators(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    numpy.random.set_state(states[2])


class Plainly:
    """The loop by hand: each method is a few lines of it."""

    def __init__(self, case: Case) -> None:
        before = generators()
        self.case, self.bench = case, Bench(case, Trips())
        self.generators = generators()
        set_generators(before)
        self.played: list[Op] = []
        self.phase, self.index, self.last = "", 0, False
        self.iterator: Any = None
        self.ahead: Any = None
        self.batch: Any = None
        self.loss: Any = None
        self.drawn: Any = None
        self.metrics: dict[str, Any] = {}
        self.gathered: list[tuple[dict[str, Any], int]] = []
        self.bases: dict[int, float] = {}
        self.written: dict[int, float] = {}
        self.factors: dict[int, float] = {}
        self.filled, self.share, self.updates, self.unscaled = 0, 1, False, False
        self.seen = self.asked = self.moves = self.epoch = self.iteration = self.rounds = self.samples = 0
        self.results: dict[str, float] = {}
        self.history: list[tuple[Any, ...]] = []

    def play(self, script: list[Op]) -> None:
        """Do what was not done yet."""
        before = generators()
        set_generators(self.generators)
        try:
            for name, *arguments in script[len(self.played) :]:
                getattr(self, name)(*arguments)
        finally:
            self.generators = generators()
            set_generators(before)
        self.played = list(script)

    # Batches

    def fetch(self) -> None:
        """The next batch, of the next pass if this one is over."""
        self.begin_pass()
        self.batch = next(self.iterator) if self.ahead is None else self.ahead
        self._fetched()

    def pass_over(self, after: int) -> None:
        """It could not be fetched, and was skipped."""
        self.begin_pass()
        self.bench.trips.arm("loader", "raise", after)
        with contextlib.suppress(Planted):
            next(self.iterator)
            raise AssertionError
        self.batch = None
        self._fetched()

    def begin_pass(self) -> None:
        """Begin the next pass, if this one is over."""
        if self.iterator is None:
            self.phase = "val" if self.phase == "train" and self.case.validates else "train"
            self.iterator = iter(self.bench.train if self.phase == "train" else self.bench.val)
            self.index, self.gathered, self.filled = 0, [], 0
        self.bench.model.train(self.phase == "train")

    def _fetched(self) -> None:
        self.index += 1
        self.last = self.index == (TRAIN if self.phase == "train" else VAL)
        self.ahead = self.drawn = None
        self.updates = False

    def look_ahead(self) -> None:
        """Whether it is the last: without a length, the next batch is fetched to see."""
        if self.phase == "train" and not self.case.length_known and self.ahead is None and not self.last:
            self.ahead = next(self.iterator)

    # What is done with a batch

    def forward(self, version: int) -> None:
        if self.drawn is None:
            self.drawn = torch.get_rng_state()
        torch.set_rng_state(self.drawn)  # done once more, dropout draws the same
        with torch.set_grad_enabled(self.phase == "train"):
            step = step_of(version, Trips()) if self.phase == "train" else judge
            outputs = step(self.bench.model, self.batch)
        self.loss = outputs["loss"]
        self.metrics = {name: value.detach() for name, value in outputs.items()}

    def schedule_lr(self) -> None:
        for number, group in enumerate(self.bench.optimizer.param_groups):
            base = self.bases.setdefault(number, group["lr"])
            if group["lr"] != self.written.get(number, group["lr"]):
                factor = self.factors.get(number, 1.0)
                self.factors[number] = factor * group["lr"] / self.written[number]
            group["lr"] = self.written[number] = decayed(self.moves, base) * self.factors.get(number, 1.0)

    def backward(self) -> None:
        optimizer, scaler, accumulate = self.bench.optimizer, self.bench.scaler, self.case.accumulate
        if self.filled + 1 < accumulate:
            self.look_ahead()
        if not self.filled:
            optimizer.zero_grad()
            self.share = min(accumulate, TRAIN + 1 - self.index) if self.case.length_known else accumulate
        loss = self.loss / self.share if self.share > 1 else self.loss
        (loss if scaler is None else scaler.scale(loss)).backward()
        self.filled += 1
        self.updates = self.filled == accumulate or self.last
        if self.updates:
            if scaler is not None:
                scaler.unscale_(optimizer)
                self.unscaled = True
            if self.filled != self.share:
                for parameter in self.bench.model.parameters():
                    parameter.grad.mul_(self.share / self.filled)
            self.filled = 0

    def own(self) -> None:
        self.seen += 1
        for parameter in self.bench.model.parameters():
            parameter.grad.mul_(scaled(self.seen))

    def clip_grad_norm(self, max_norm: float) -> None:
        if self.updates:
            nn.utils.clip_grad_norm_(list(self.bench.model.parameters()), max_norm)

    def update(self) -> None:
        if not self.updates:
            return
        if self.bench.scaler is None:
            self.bench.optimizer.step()
        else:
            self.bench.scaler.step(self.bench.optimizer)
            self.bench.scaler.update()
            self.unscaled = False
        self.moves += 1

    def ema(self) -> None:
        if self.updates:
            self.bench.averaged.update_parameters(self.bench.model)

    def average(self, *, counts: bool = True) -> None:
        self.look_ahead()
        if counts:
            self.gathered.append((self.metrics, len(self.batch[1])))
        if not self.last:
            return
        self.results = {k: v for k, v in self.results.items() if not k.startswith(self.phase)}
        self._record(self.phase, self.gathered)

    def _record(self, phase: str, gathered: list[tuple[dict[str, Any], int]]) -> None:
        counts = torch.tensor([float(count) for _, count in gathered], dtype=torch.float64)
        means = {}
        for name in gathered[0][0] if gathered else ():
            values = torch.stack([metrics[name].double() for metrics, _ in gathered])
            means[name] = float((values * counts).sum() / sum(count for _, count in gathered))
        self.results |= {f"{phase}/{name}": mean for name, mean in means.items()}
        self.history.append((phase, *means.values()))

    def unaveraged(self) -> None:
        """The batch does not count in the means."""
        self.average(counts=False)

    def log(self) -> None:
        """Nothing that anybody would miss."""

    def asks(self) -> None:
        """Nothing yet: at the boundary."""

    def boundary(self) -> None:
        self.asked += 1

    def drop_window(self) -> None:
        self.filled = 0
        if self.unscaled:
            self.bench.scaler.update()
            self.unscaled = False

    def over(self, counts: bool) -> None:
        """The iteration is over; its samples count."""
        if self.phase == "train":
            self.iteration += 1
            self.samples += len(self.batch[1]) if counts else 0
        if self.last:
            self.iterator = self.ahead = None
            self.epoch += self.phase == "train"
            self.rounds += self.phase == "val" or not self.case.validates

    # In between

    def hand(self, kind: str, value: float) -> None:
        by_hand(self.bench, kind, value)

    def validate(self) -> None:
        """On demand, between two iterations."""
        model, gathered = self.bench.model, []
        training = model.training
        model.eval()
        with torch.no_grad():
            for batch in self.bench.val:
                gathered.append((judge(model, batch), len(batch[1])))
        model.train(training)
        self.results = {k: v for k, v in self.results.items() if not k.startswith("val")}
        self._record("val", gathered)

    # What has come of it

    def facts(self) -> dict[str, Any]:
        counts = {"epoch": self.epoch, "iteration": self.iteration, "round": self.rounds, "samples": self.samples}
        counts |= {"updates": self.moves, "seen": self.seen, "asked": self.asked}
        return {**facts(self.bench), **counts, "results": self.results, "history": self.history, **drawn(self)}


def facts(bench: Bench) -> dict[str, Any]:
    """Weights, buffers, optimizer, average, scaler."""
    found: dict[str, Any] = {f"model {name}": value for name, value in bench.model.state_dict().items()}
    found |= {f"ema {name}": value for name, value in bench.averaged.state_dict().items()}
    for number, state in bench.optimizer.state_dict()["state"].items():
        found |= {f"optimizer {number} {name}": value for name, value in state.items()}
    for number, group in enumerate(bench.optimizer.param_groups):
        found[f"group {number}"] = [group["lr"], group["weight_decay"]]
    if bench.scaler is not None:
        found["scale"] = [bench.scaler.get_scale(), bench.scaler._get_growth_tracker()]
    generator = bench.train.generator
    found["order"] = None if generator is None else generator.get_state()
    return found


def drawn(loop: Plainly | None) -> dict[str, Any]:
    """Where the random generators stand."""
    state = generators() if loop is None else loop.generators
    return {"torch": state[0], "python": state[1], "numpy": (state[2][1].tolist(), state[2][2])}


def facts_of(run: lt.Run, bench: Bench) -> dict[str, Any]:
    progress = run.progress
    counts = {"epoch": progress.epoch, "iteration": progress.iteration, "round": progress.round}
    counts |= {"samples": progress.samples, "updates": progress.updates.get(bench.optimizer, 0)}
    counts |= {"seen": run["train/own"].seen, "asked": run["run/asks"].done}
    rows = [(row["phase"], *(row[name] for name in ("loss", "accuracy") if name in row)) for row in run.history]
    return {**facts(bench), **counts, "results": dict(run.results), "history": rows, **drawn(None)}


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Names of what is not the same, to the bit."""
    found = sorted(left.keys() ^ right.keys())
    for name in left.keys() & right.keys():
        one, other = left[name], right[name]
        same = torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other
        if not same:
            found.append(name)
    return found
