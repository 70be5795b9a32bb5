"""Measure how much memory a training takes."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import torch

from ..devices import model_device
from ..intervals import Interval, interval
from ..state import State

if TYPE_CHECKING:
    from ..run import Run

MIB = 2**20


@attrs.frozen(eq=False)
class memory:
    """Measure the peak of memory in MiB, into ``state.gauges["memory_mb"]``.

    If the phase's model is on a CUDA device: the most that tensors took there at one time
    (``torch.cuda.max_memory_allocated``; asking does not wait for the device). Otherwise the largest resident size
    that the process has had; on Windows that needs ``psutil``, without which there is no gauge. Piped onto a phase,
    it is in ``run.results`` as well; piped onto the run, in the rows of a ``log`` behind it.

    Args:
        every: How often, besides the last iteration of a pass: training iterations, an interval, or a predicate of
            the state. CUDA's counters take 0.1 ms to read.
        reset: Begin the peak of CUDA anew with each pass. The one of a process cannot be.

    Example:
        >>> state = next(memory(every=1)([State(phase="train")]))
        >>> 1 < state.gauges["memory_mb"] < 10**6
        True
    """

    every: int | Interval = attrs.field(default=50, kw_only=True, converter=interval)
    reset: bool = attrs.field(default=False, kw_only=True, validator=attrs.validators.instance_of(bool))
    only_looks: ClassVar[bool] = True

    def on_pass(self, run: Run) -> None:
        """Begin the peak anew."""
        device = model_device(run.phase.model) if self.reset and run.phase is not None else None
        if device is not None and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        due: Any = self.every
        for state in states:
            if due(state) or state.last:
                peak = _peak(model_device(state.model))
                if peak is not None:
                    state.gauges["memory_mb"] = round(peak / MIB, 1)
            yield state


def _peak(device: torch.device | None) -> int | None:
    """Bytes at the peak; None if this system does not say."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "win32":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the others KiB
    if importlib.util.find_spec("psutil") is None:
        return None
    psutil: Any = importlib.import_module("psutil")
    return int(psutil.Process().memory_info().peak_wset)
