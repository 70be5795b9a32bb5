"""What the file of a flight recorder holds: a checkpoint of the iteration's beginning, and what was wrong."""

from __future__ import annotations

import copy
import os
import platform
import re
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.tree import capture
from ..cursor import Cursor
from ..data.sources import _NOTHING, Source
from ..failures import contents
from ..plain import device_of, require_plain
from ..state import State
from ..tracebacks import FULL, _is_own, _is_slip

NAMES = re.compile(r"crash_(\d+)-epoch_\d+-iteration_\d+(-rank_\d+)?\.pt")
LIBRARY = __name__.partition(".")[0]
MOST = 100_000  # characters of a traceback


class Batch:
    """A batch as it was fetched: its containers, with the very tensors in them.

    Args:
        batch: What the source gave.
    """

    def __init__(self, batch: Any) -> None:
        self._tensors: list[Tensor] = []
        self.content = self._of(batch)
        self._versions = self._look()

    def _of(self, value: Any) -> Any:
        kind: Any = type(value)
        if isinstance(value, Tensor):
            self._tensors.append(value)
        elif kind is dict:
            return {key: self._of(item) for key, item in value.items()}
        elif kind is list or kind is tuple:
            return kind(map(self._of, value))
        return value

    def _look(self) -> list[int]:
        return [0 if tensor.is_inference() else tensor._version for tensor in self._tensors]

    @property
    def why_not(self) -> str:
        """Why it cannot be saved as it was; empty if it can."""
        if self._look() != self._versions:
            return "it was changed in place since it was fetched"
        try:
            require_plain(self.content, "the batch")
        except TypeError as error:
            return str(error).partition(", which could")[0].partition(". Keep")[0]
        return ""

    def saved(self) -> Any:
        """A copy on the CPU, each tensor with no more than its own values."""
        copies: dict[int, Tensor] = {}
        for tensor in self._tensors:
            own = tensor.detach().resolve_conj().resolve_neg().to("cpu", copy=True).clone()
            copies.setdefault(id(tensor), own.requires_grad_(tensor.requires_grad))
        return _with(self.content, copies)


def _with(value: Any, copies: dict[int, Tensor]) -> Any:
    kind: Any = type(value)
    if isinstance(value, Tensor):
        return copies[id(value)]
    if kind is dict:
        return {key: _with(item, copies) for key, item in value.items()}
    return kind(_with(item, copies) for item in value) if kind in (list, tuple) else value


def tree_at_boundary(cursor: Cursor) -> dict[str, Any]:
    """The run's state where no iteration is open: what could not be fetched will be fetched again."""
    tree, passes = capture(cursor.run, who="flight_recorder"), cursor.passes
    if passes.phase is not None:
        twin = _twin(passes.source, passes.source.taken)
        tree["sources"][passes.plan.phase] = twin.state_dict()
    return tree


def tree_before(
    cursor: Cursor, state: State, batch: Batch, own: dict[str, Any], before: tuple[dict[str, Any], dict[str, Any]]
) -> dict[str, Any]:
    """The run's state at the boundary before the open iteration, with its batch fetched ahead; parts stand there.

    Args:
        cursor: The run's machine.
        state: The open iteration's, or that of one whose boundary failed.
        batch: Its batch.
        own: State of the generators that hang on the source, behind the fetch.
        before: The process's generators before the fetch, and those of the source: for a batch that cannot be saved.
    """
    tree, passes, progress = capture(cursor.run, who="flight_recorder"), cursor.passes, cursor.progress
    kept = not batch.why_not
    twin = _twin(passes.source, passes.source.taken - 1)
    if kept:
        if not passes.source.has_ahead and passes.source.under_way:  # its own state is that behind the batch
            twin._iterator = passes.source._iterator
        twin._ahead = batch.saved()
    place = twin.state_dict()
    drawn = own if kept else before[1]
    place["own"] = {path: drawn.get(path, now) for path, now in place["own"].items()}
    if kept:
        place["ahead"]["device"] = None if passes.source.device else device_of(batch.content)
    else:
        tree["generators"] = before[0]
    tree["sources"][passes.plan.phase] = place
    where = {"phase": passes.plan.phase, "index": state.index, "began": passes.began, "began_at": passes.began_at}
    tree |= {"pass": where, "border": False, "place": [passes.place.entry, passes._done]}
    done = {"round": passes.plan.round, "samples": cursor._samples, "seconds": cursor.began}
    if state.trains:
        done |= {"epoch": state.epoch, "iteration": state.iteration}
    tree["progress"] |= done | {"epoch": done.get("epoch", progress.epoch)}
    return tree


def _twin(source: Source, taken: int) -> Source:
    """A source that has to find its place again, behind so many batches."""
    twin = copy.copy(source)
    twin.taken, twin._iterator, twin._failed = taken, None, True
    twin._ahead = twin._unmoved = _NOTHING
    twin._before = None
    return twin


def facts_of(cursor: Cursor, state: State | None, batch: Batch | None, **what: str) -> dict[str, Any]:
    """What the file says besides.

    Args:
        cursor: The run's machine.
        state: The iteration's; None if there was none.
        batch: Its batch.
        what: What was wrong.
    """
    found: dict[str, Any] = {"part": "", "error": "", "traceback": "", "nonfinite": ""}
    found |= {key: _text(text) for key, text in what.items()}
    found |= {"open": state is not None, "phase": cursor.passes.plan.phase, "batch": "", "batch_lost": ""}
    for key in ("epoch", "iteration"):
        found[key] = getattr(state or cursor.progress, key)
    found["index"] = cursor.passes.index if state is None else state.index
    if batch is not None:
        found |= {"batch": _text(contents(batch.content)), "batch_lost": _text(batch.why_not)}
    found["versions"] = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        LIBRARY: str(sys.modules[LIBRARY].__version__),
        "cuda": str(torch.version.cuda or ""),
    }
    return found


def told(error: BaseException) -> dict[str, str]:
    """An exception as text, without frames of looptools, as a user will see it; *error* itself is left as it is."""
    whole = traceback.TracebackException.from_exception(error)
    waiting: list[tuple[traceback.TracebackException | None, BaseException | None]] = [(whole, error)]
    while waiting and os.environ.get(FULL, "0") == "0":
        shown, one = waiting.pop()
        if shown is not None and one is not None:
            _leave_out_own(shown, one)
            waiting += [(shown.__cause__, one.__cause__), (shown.__context__, one.__context__)]
            members = one.exceptions if isinstance(one, BaseExceptionGroup) else ()
            waiting += zip(shown.exceptions or (), members, strict=False)
    text = "".join(whole.format())
    return {"error": "".join(traceback.format_exception_only(error)).strip(), "traceback": text[-MOST:]}


def _leave_out_own(shown: traceback.TracebackException, error: BaseException) -> None:
    """As `tracebacks.shorten`, which cannot be asked here: it changes the exception, whose frames are still needed."""
    frames: list[TracebackType] = []
    at = error.__traceback__
    while at is not None:
        frames.append(at)
        at = at.tb_next
    if len(frames) == len(shown.stack):  # else ``sys.tracebacklimit`` is set
        pairs = list(zip(shown.stack, frames, strict=True))
        kept = [text for text, at in pairs if not _is_own(at.tb_frame) or (at.tb_next is None and _is_slip(error, at))]
        shown.stack = traceback.StackSummary.from_list(kept)


def _text(text: str) -> str:
    """What can be written in any encoding."""
    return text.encode("utf-8", "replace").decode()


def files_in(folder: Path) -> list[Path]:
    """The files of flight recorders in *folder*, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("crash_*.pt") if (match := NAMES.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def next_file(folder: Path, progress: dict[str, Any]) -> Path:
    """A name for one more, behind the others."""
    number = max((int(NAMES.fullmatch(path.name)[1]) for path in files_in(folder)), default=0) + 1  # type: ignore[index]
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = f"-rank_{torch.distributed.get_rank()}" if together else ""
    return folder / f"crash_{number:04d}-epoch_{progress['epoch']:04d}-iteration_{progress['iteration']:06d}{rank}.pt"
