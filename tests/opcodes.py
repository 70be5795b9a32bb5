"""A signal at the n-th opcode of a short training."""

from __future__ import annotations

import collections
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loops import classify, loader, network

import looptools as lt


class Late(BaseException):
    """What the handlers that stand before the run raise."""


def late(number: int, frame: Any) -> None:
    raise Late


def build(folder: Path) -> tuple[lt.Run, torch.nn.Module]:
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train = lt.train(model, list(loader(shuffle=False))[:3], classify) | lt.optimize(optimizer, max_norm=1.0)
    return lt.workflow([(train, 1)], max_epochs=2) | lt.checkpoint(folder), model


def to_end_with(run: lt.Run, n: int, do: Callable[[], None]) -> int:
    """Run to the end, and do something at the n-th opcode of looptools; what writes files is left out: it is most.

    Returns:
        The number of these opcodes.
    """
    home, count, before = Path(lt.__file__).parent, 0, sys.gettrace()

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        file = frame.f_code.co_filename
        if not file.startswith(str(home)) or file.startswith(str(home / "checkpoints")):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            count += 1
            if count == n:
                do()
        return trace

    sys.settrace(trace)
    try:
        run.to_end()
    finally:
        sys.settrace(before)
    return count


def same(model: torch.nn.Module, wanted: dict[str, Any]) -> bool:
    return all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())


def everywhere(folder: Path, cases: int) -> collections.Counter[str]:
    """A SIGTERM at as many places; the handler before must be `late`.

    Returns:
        How the trainings ended.

    Raises:
        AssertionError: If one, gone on with or resumed, ends with other bits.
    """
    run, model = build(folder / "whole")
    total = to_end_with(run, -1, lambda: None)
    wanted, ends = model.state_dict(), collections.Counter[str]()
    for number in range(cases):
        here = folder / str(number)
        run, model = build(here)
        end = "over"
        try:
            to_end_with(run, 1 + number * total // cases, lambda: signal.raise_signal(signal.SIGTERM))
        except (SystemExit, Late) as error:
            end = type(error).__name__
        ends[end] += 1
        assert signal.getsignal(signal.SIGTERM) is late
        if end == "SystemExit":
            shutil.copytree(here, here / "copy")
        run.to_end()
        assert same(model, wanted), f"gone on with, other bits: case {number}"
        if end == "SystemExit":
            run, model = build(here / "copy")
            assert run.resume() is not None
            run.to_end()
            assert same(model, wanted), f"resumed, other bits: case {number}"
    return ends
