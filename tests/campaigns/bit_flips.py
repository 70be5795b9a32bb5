"""Every single-bit flip and every truncation of a small checkpoint is found, and none loads silently.

    python tests/campaigns/bit_flips.py            # all of them
    python tests/campaigns/bit_flips.py --short    # some of them

The file is that of a run: a model, AdamW, a schedule, the generators. `damage` is asked, without a manifest; and now
and then `resume`, which must raise and change nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import looptools as lt
from looptools.archives import files


def make() -> lt.Run:
    """A run with a bit of everything."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train = lt.train(model, [torch.ones(4, 2)] * 2, lambda model, batch: model(batch).pow(2).mean())
    train = train | lt.schedule_lr(optimizer, lt.schedules.cosine()) | lt.optimize(optimizer, max_norm=1.0)
    return lt.workflow([(train, 1)], max_epochs=2)


class Campaign:
    """Counts what is tried and what passes for sound."""

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self.data = path.read_bytes()
        self.tried = self.passed = self.resumed = 0

    def look(self, name: str) -> None:
        """The file has been damaged: it must be found."""
        self.tried += 1
        if files.damage(self.path) == "":
            self.passed += 1
            print(f"PASSED: {name}")
        if self.tried % (50 if self.every > 1 else 1000) == 1:
            self.resume(name)

    def resume(self, name: str) -> None:
        self.resumed += 1
        run = make()
        before = {key: value.clone() for key, value in run.model.state_dict().items()}
        try:
            run.resume(self.path)
        except RuntimeError:
            same = all(torch.equal(value, before[key]) for key, value in run.model.state_dict().items())
            if same and run.progress.iteration == 0:
                return
        self.passed += 1
        print(f"RESUMED: {name}")

    def flips(self) -> None:
        with self.path.open("r+b", buffering=0) as file:
            for bit in range(0, 8 * len(self.data), self.every):
                place, old = bit // 8, self.data[bit // 8]
                for value, look in ((old ^ 1 << bit % 8, self.look), (old, None)):
                    file.seek(place)
                    file.write(bytes([value]))
                    if look:
                        look(f"bit {bit % 8} of byte {place}")

    def cuts(self) -> None:
        for length in range(len(self.data) - 1, -1, -self.every):
            with self.path.open("r+b", buffering=0) as file:
                file.truncate(length)
            self.look(f"cut to {length} bytes")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="some of them")
    every = 101 if parser.parse_args().short else 1  # odd: all bits of a byte take their turn
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = make()
        for state in run:
            if state.last:
                break
        path = run.save(folder)
        assert path is not None
        campaign = Campaign(path, every)
        steps: list[tuple[str, Callable[[], None]]] = [("flips", campaign.flips), ("cuts", campaign.cuts)]
        for name, do in steps:
            before = campaign.tried
            do()
            print(f"{campaign.tried - before} {name} of a file of {len(campaign.data)} bytes.")
            path.write_bytes(campaign.data)
        assert files.damage(path) == ""
        make().resume(path)
    print(f"{campaign.tried} damaged files, {campaign.resumed} given to resume: {campaign.passed} passed for sound.")
    return min(campaign.passed, 1)


if __name__ == "__main__":
    sys.exit(main())
