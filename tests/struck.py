"""Ctrl-C at the n-th opcode of a short training: raised outright, or by two signals as a terminal sends them."""

from __future__ import annotations

import collections
import itertools
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch
from loops import classify, loader, network

import looptools as lt
from looptools.modes import all_torch_modes

HOME = str(Path(lt.__file__).parent)
ONLY_READ = tuple(str(Path(HOME, name)) for name in ("checkpoints", "generators.py", "archives", "plain.py"))
OTHERS = (
    str(Path(torch.__file__).parent / "optim"),
    str(Path(torch.__file__).parent / "nn"),
    classify.__code__.co_filename,
)


@attrs.frozen
class Struck:
    """What a Ctrl-C did to a training."""

    where: str
    notes: str
    same: bool

    @property
    def told(self) -> bool:
        """Whether the exception says that something will not be as it would have been."""
        return "cannot be undone" in self.notes or "take this batch in twice" in self.notes


def build(snapshots: bool, source: Any = None) -> tuple[lt.Run, torch.nn.Module]:
    """A pipe of five parts behind its forward, with dropout, BatchNorm and a window of two batches."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train = lt.train(model, source or list(loader(shuffle=False))[:4], classify)
    train = train | lt.schedule_lr(optimizer, lt.schedules.cosine(), warmup=2)
    train = train | lt.optimize(optimizer, max_norm=1.0, accumulate=2)
    val = lt.validate(model, list(loader(shuffle=False))[:1], classify)
    options = {"snapshots": lt.snapshots(every=2)} if snapshots else {}
    return lt.workflow([(train, 1), (val, 1)], max_epochs=2, **options), model


def everything(run: lt.Run, model: torch.nn.Module) -> dict[str, Any]:
    """All that must be the same in the end."""
    found: dict[str, Any] = dict(model.state_dict())
    found |= {f"result {name}": torch.tensor(value) for name, value in run.results.items()}
    progress = run.progress
    found["progress"] = torch.tensor([progress.epoch, progress.iteration, progress.round, progress.samples])
    found["updates"] = torch.tensor(list(progress.updates.values()))
    found["generator"] = torch.get_rng_state()
    return found


def within(advance: Callable[[], object], n: int, do: Callable[[], None]) -> tuple[int, str]:
    """Call *advance*, and do something at the n-th opcode of looptools, the step, torch's layers and optimizers.

    What only reads (of a snapshot that is taken, a hundred thousand) is left out.

    Returns:
        The number of these opcodes, and the place of the n-th.
    """
    count, place, before = 0, "", sys.gettrace()

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count, place
        file = frame.f_code.co_filename
        if not file.startswith((HOME, *OTHERS)) or file.startswith(ONLY_READ):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            count += 1
            if count == n:
                place = f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}:{frame.f_lineno}"
                do()
        return trace

    sys.settrace(trace)
    try:
        advance()
    finally:
        sys.settrace(before)
    return count, place


def raise_it() -> None:
    raise KeyboardInterrupt


def press_twice() -> None:
    """What a terminal does. At rest the first press is the one that raises."""
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def strike(n: int, do: Callable[[], None], snapshots: bool, before: int, wanted: dict[str, Any]) -> Struck | None:
    """Strike at opcode *n* of the iteration that has *before* states in front of it, then go on to the end.

    Returns:
        What came of it; None if the iteration has fewer opcodes.
    """
    run, model = build(snapshots)
    list(run.take(before))
    modes, notes, place = all_torch_modes(), "", ""
    holder: dict[str, Any] = {}

    def noted() -> None:
        frame = sys._getframe(2)
        holder["place"] = f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}:{frame.f_lineno}"
        do()

    try:
        count, _ = within(lambda: next(run), n, noted)
        if count < n:
            return None
    except KeyboardInterrupt as error:
        notes = " ".join(getattr(error, "__notes__", []))
    place = holder.get("place", place)
    assert all_torch_modes() == modes, f"a mode is left switched: {place}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run.to_end()
        except Exception as error:
            error.add_note(f"after a Ctrl-C at {place}")
            return Struck(f"{place}: {error!r}", notes, False)
    ended = everything(run, model)
    same = ended.keys() == wanted.keys() and all(torch.equal(ended[key], wanted[key]) for key in wanted)
    return Struck(place, notes, same)


def everywhere(do: Callable[[], None], snapshots: bool, before: int, step: int = 1, first: int = 1) -> list[Struck]:
    """Strike at every *step*-th opcode of one iteration."""
    run, model = build(snapshots)
    run.to_end()
    wanted = everything(run, model)
    found, n = [], first
    while (struck := strike(n, do, snapshots, before, wanted)) is not None:
        found.append(struck)
        n += step
    return found


def main(step: int) -> None:
    """All of it, at every *step*-th opcode: with 1, some 170,000 strikes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for snapshots, do, before in itertools.product((True, False), (raise_it, press_twice), (0, 2, 3, 4)):
        found = everywhere(do, snapshots, before, step)
        other = [one for one in found if not one.same]
        wrong = [one for one in other if snapshots or not one.told]
        which = "with" if snapshots else "without"
        print(f"{which} snapshots, {do.__name__}, after {before} states: {len(found)} strikes, ", end="")
        print(f"{len(other)} with other bits, {len(wrong)} of them not told", flush=True)
        for place, times in collections.Counter(one.where for one in wrong).most_common(12):
            print("   ", place, times)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
