"""What a checkpoint costs, beside torch.save, safetensors and torch.distributed.checkpoint: all in turn, in one run.

python benchmarks/checkpoint.py [--millions 100] [--rounds 5] [--folder FOLDER]

A model of so many million parameters with AdamW's state: three numbers of four bytes for each. All write the same
tensors into new files and then delete those of the round before. `checkpoint` also checks, syncs, reads back and lists
what it has written. "Stands still" is the time until training can go on; "in all" until the file is complete.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

import looptools as lt

Times = tuple[float, float]  # seconds that training stands still, and until all is done
BASE = "torch.save"


def make(millions: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Square layers, and an AdamW that has moved them once."""
    torch.manual_seed(0)
    layers = max(1, round(millions))
    width = round((millions * 1e6 / layers) ** 0.5)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def moves(states: Iterable[lt.State]) -> Iterator[lt.State]:
    """Says that the weights have moved, without the cost of it."""
    for state in states:
        state.updates = True
        yield state


def run_with(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, background: bool) -> lt.Run:
    """A run that does nothing but save, each iteration."""
    loss = torch.zeros((), requires_grad=True)
    phase = lt.train(model, [torch.zeros(1)] * 1000, lambda model, batch: loss)
    phase = phase | lt.schedule_lr(optimizer, lt.schedules.cosine(), by="iteration") | moves
    return lt.workflow([(phase, 1)], max_epochs=1) | lt.checkpoint(folder, every=1, keep=1, background=background)


class Ours:
    """`checkpoint`, waiting or in the background."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, background: bool) -> None:
        self.run = run_with(model, optimizer, folder, background)

    def __call__(self, number: int) -> Times:
        began = time.perf_counter()
        next(self.run)
        stood = time.perf_counter() - began
        with self.run:  # leaving it waits
            pass
        return stood, time.perf_counter() - began


class Other:
    """A function that writes a path; the one before is deleted."""

    def __init__(self, folder: Path, write: Callable[[Path], Any]) -> None:
        self.folder, self.write = folder, write
        self.before: Path | None = None

    def __call__(self, number: int) -> Times:
        path = self.folder / f"{number}"
        began = time.perf_counter()
        under_way = self.write(path)
        stood = time.perf_counter() - began
        if hasattr(under_way, "result"):
            under_way.result()
        if self.before is not None:
            shutil.rmtree(self.before) if self.before.is_dir() else self.before.unlink()
        self.before = path
        done = time.perf_counter() - began
        return (stood if hasattr(under_way, "result") else done), done


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a state by their paths, as safetensors takes them."""
    found: dict[str, Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            found[f"{prefix}{key}"] = value
    return found


def ways(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, Callable[[int], Times]]:
    """All that are compared, by name."""

    def tree() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def synced(path: Path) -> None:
        with path.open("wb") as file:
            torch.save(tree(), file)
            file.flush()
            os.fsync(file.fileno())

    stager = DefaultStager(StagingOptions(False, False, False, False))  # on the CPU; it keeps its copy, as we do
    others: dict[str, Callable[[Path], Any]] = {
        BASE: lambda path: torch.save(tree(), path),
        "torch.save, then fsync": synced,
        "safetensors": lambda path: save_file(flat(tree()), path),
        "distributed.checkpoint.save": lambda path: dcp.save(tree(), checkpoint_id=path, no_dist=True),
        "distributed.checkpoint.async_save": lambda path: dcp.async_save(
            tree(), checkpoint_id=path, no_dist=True, async_stager=stager
        ),
    }
    places = {name: folder / str(number) for number, name in enumerate(others)}
    for place in places.values():
        place.mkdir()
    return {
        **{name: Other(places[name], write) for name, write in others.items()},
        "lt.checkpoint": Ours(model, optimizer, folder / "ours", background=False),
        "lt.checkpoint(background=True)": Ours(model, optimizer, folder / "background", background=True),
    }


def compare(millions: float, rounds: int, folder: Path) -> None:
    """Time all ways, each round in another order, and print minimum and median with their ratios to torch.save."""
    model, optimizer = make(millions)
    timed = ways(model, optimizer, folder)
    times: dict[str, list[Times]] = {name: [] for name in timed}
    for turn in range(rounds + 1):
        names = list(timed)[turn % len(timed) :] + list(timed)[: turn % len(timed)]
        for name in names:
            if hasattr(os, "sync"):
                os.sync()  # nobody pays for what another one has left to be written
            measured = timed[name](turn)
            if turn:  # the first makes buffers, and the system its pages
                times[name].append(measured)
    print(f"{'seconds: minimum, median (x torch.save)':<40} {'stands still':>27} {'in all':>27}")
    for name, measured in times.items():
        cells = []
        for kind in (0, 1):
            mine, base = [t[kind] for t in measured], [t[kind] for t in times[BASE]]
            least, usual = min(mine), statistics.median(mine)
            ratios = f"({least / min(base):.2f}, {usual / statistics.median(base):.2f})"
            cells.append(f"{least:6.3f} {usual:6.3f} {ratios:>13}")
        print(f"{name:<40} {cells[0]:>27} {cells[1]:>27}")


def beside(millions: float, rounds: int, folder: Path) -> None:
    """How much slower a loop of small iterations is while a checkpoint is written in the background."""
    run = run_with(*make(millions), folder / "beside", background=True)
    small = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    optimizer, batch = torch.optim.SGD(small.parameters(), lr=1e-3), torch.randn(64, 256)

    def iterate() -> float:
        began = time.perf_counter()
        optimizer.zero_grad()
        small(batch).square().mean().backward()
        optimizer.step()
        return time.perf_counter() - began

    next(run)
    with run:
        pass
    alone, during = [], []
    for _ in range(rounds):
        alone += [iterate() for _ in range(300)]
        next(run)
        writer = run["checkpoint"]._saver.writer
        while writer.running:
            during.append(iterate())
        with run:
            pass
    usual, slowed = statistics.median(alone), statistics.fmean(during)
    lost = (slowed - statistics.fmean(alone)) * len(during) / rounds
    print(
        f"a small iteration takes {usual * 1e3:.2f} ms alone, {slowed * 1e3:.2f} while one is written "
        f"(x {slowed / usual:.2f}; longest {max(during) * 1e3:.0f} ms); {lost:.3f} s lost a checkpoint"
    )


def main() -> None:
    """Read the options, and print what the machine is and how all compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--millions", type=float, default=100, help="parameters of the model, in millions")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary one by default")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    size = options.millions * 12e6
    print(f"torch {torch.__version__}, {system}; {size / 1e9:.3g} GB each, {options.rounds} rounds after a first one\n")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        compare(options.millions, options.rounds, Path(folder))
        print()
        beside(options.millions, options.rounds, Path(folder))


if __name__ == "__main__":
    main()
