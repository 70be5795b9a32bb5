"""Functions that return a run, for `lt.verify_resume`: a good one, and some with a planted fault."""

from __future__ import annotations

import os
import random
import time

import torch
from loops import BATCH, SAMPLES, classify, loader, network
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

import looptools as lt


def pipe(model=None, source=None, *parts, step=classify, epochs=2):
    """A training with BatchNorm, dropout, AdamW, one-cycle, accumulation and an average."""
    torch.manual_seed(0)
    model = model() if model is not None else network()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train = (
        lt.train(model, source if source is not None else loader(), step)
        | lt.schedule_lr(optimizer, lt.schedules.one_cycle())
        | lt.optimize(optimizer, accumulate=3, max_norm=1.0)
        | lt.ema(averaged)
    )
    for part in parts:
        train = train | part
    val = lt.validate(averaged, loader(shuffle=False), classify)
    return lt.workflow([(train, 1), (val, 1)], max_epochs=epochs)


def good():
    """With a log and checkpoints in a folder that must not be touched."""
    folder = os.environ.get("PIPES_FOLDER", "runs")
    run = pipe() | lt.timer() | lt.log(folder, every=2, tensorboard=False)
    return run | lt.checkpoint(folder, every=2, keep=2, best=lt.lowest("val/loss", top=2))


class Noisy(Dataset):
    """A random transform, drawn from the process's generator."""

    def __init__(self):
        self.images = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(1))
        self.seen = 0

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return self.images[index] + 0.1 * torch.randn(3), index % 2


def noisy():
    return pipe(source=DataLoader(Noisy(), BATCH, shuffle=True))


def noisy_in_workers():
    return pipe(source=DataLoader(Noisy(), BATCH, shuffle=True, num_workers=2))


def seeded_in_workers():
    return pipe(source=lt.seeded(DataLoader(Noisy(), BATCH, shuffle=True, num_workers=2), 5))


class Ramp(Noisy):
    """Its samples depend on how many were asked for."""

    def __getitem__(self, index):
        self.seen += 1
        return self.images[index] * (1 + self.seen / 100), index % 2


def counting_data():
    return pipe(source=DataLoader(Ramp(), BATCH, shuffle=True))


HIDDEN = random.Random()


class Elsewhere:
    """Draws from a generator in a global, which nobody finds."""

    def __len__(self):
        return 4

    def __iter__(self):
        samples = Noisy().images[:4]
        for _ in range(4):
            yield samples * HIDDEN.random(), torch.tensor([0, 1, 0, 1])


def drawing_elsewhere():
    HIDDEN.seed(3)
    return pipe(source=Elsewhere())


class Calls(nn.Module):
    """Counts its calls in a private attribute, or in one of the class."""

    of_all = 0

    def __init__(self):
        super().__init__()
        self.net = network()
        self._calls = 0

    def forward(self, images):
        self._calls += self.training
        return self.net(images) * (1 + self._calls / 100)


def plain_attribute():
    return pipe(Calls)


class CallsOfAll(Calls):
    def forward(self, images):
        type(self).of_all += self.training
        return self.net(images) * (1 + self.of_all / 100)


def class_attribute():
    return pipe(CallsOfAll)


def damped(states):
    """Remembers something in a local variable."""
    running = 0.0
    for state in states:
        running = 0.9 * running + float(state.loss.detach())
        state.metrics["running"] = running
        yield state


def in_locals():
    return pipe(None, None, damped)


def not_the_same_twice():
    torch.seed()
    optimizer = torch.optim.SGD((model := nn.Linear(3, 2)).parameters(), lr=0.1)
    images = torch.randn(4, 3, generator=torch.Generator().manual_seed(random.SystemRandom().randrange(2**31)))
    train = lt.train(model, [(images, torch.tensor([0, 1, 0, 1]))] * 3, classify) | lt.optimize(optimizer)
    return lt.workflow([(train, 1)], max_epochs=2)


class Heavy:
    """Saving it changes it."""

    def __init__(self):
        self.factor = 1.0

    def __call__(self, states):
        for state in states:
            state.metrics["factor"] = self.factor
            yield state

    def state_dict(self):
        self.factor += 1
        return {"factor": self.factor}

    def load_state_dict(self, state):
        self.factor = state["factor"]


def changed_by_saving():
    return pipe(None, None, Heavy())


def speedy():
    """A clock of one's own."""

    def step(model, batch):
        return {**classify(model, batch), "clock": time.perf_counter()}

    return pipe(step=step)


def long():
    """1,000 epochs."""
    return pipe(epochs=1000)


def hangs():
    time.sleep(600)


def fails():
    raise RuntimeError("planted in build")
