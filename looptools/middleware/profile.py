"""See what a few iterations spend their time on."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import torch

from ..checks import whole
from ..state import State

if TYPE_CHECKING:
    from ..run import Run

ROWS = 8  # of the table
_is_bool = attrs.validators.instance_of(bool)


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class profile:
    """Profile a few training iterations with ``torch.profiler``: a Chrome trace, and a table of what takes longest.

    In turn, *wait* training iterations are left alone, *warmup* are profiled and thrown away, *active* are kept; then
    ``trace_1.json`` is written into *folder* (open it in Perfetto or ``chrome://tracing``) and the table shown; all
    this *repeat* times. It covers whole iterations, from batch to boundary, and with them your own code between the
    states; a validation in between is in it too. When it is through, it costs nothing. It changes no bit.

    If the run is closed or sleeps meanwhile, what was recorded until then is written. A resumed run profiles again only
    what was not through when the checkpoint was saved.

    Args:
        folder: Where traces go, made if missing; None writes none.
        wait: Training iterations left alone at first.
        warmup: Profiled and thrown away, since the profiler itself is slow at first.
        active: Profiled and kept.
        repeat: How often in all.
        line: Called with each line of the table; None for silence.
        record_shapes: Also record the shapes of the operators' inputs.
        profile_memory: Also record allocations.
        with_stack: Also record where in the source each operator was called.
        with_flops: Also estimate floating point operations.

    Raises:
        ValueError: If nobody would see the result.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> phase = lt.train(model, [torch.ones(1, 1)] * 4, lambda model, batch: model(batch).mean())
        >>> phase = phase | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> profiled = lt.profile(folder, wait=1, warmup=1, active=2, line=None)
        >>> results = (lt.workflow([(phase, 1)], max_epochs=1) | profiled).to_end()
        >>> [path.name for path in folder.iterdir()]
        ['trace_1.json']
    """

    folder: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path), repr=str)
    wait: int = attrs.field(default=5, kw_only=True, validator=whole(0))
    warmup: int = attrs.field(default=2, kw_only=True, validator=whole())  # torch warns of 0
    active: int = attrs.field(default=3, kw_only=True, validator=whole())
    repeat: int = attrs.field(default=1, kw_only=True, validator=whole())
    line: Callable[[str], Any] | None = attrs.field(default=print, kw_only=True, repr=False)
    record_shapes: bool = attrs.field(default=False, kw_only=True, validator=_is_bool)
    profile_memory: bool = attrs.field(default=False, kw_only=True, validator=_is_bool)
    with_stack: bool = attrs.field(default=False, kw_only=True, validator=_is_bool)
    with_flops: bool = attrs.field(default=False, kw_only=True, validator=_is_bool)
    done: int = attrs.field(default=0, init=False, repr=False)  # how often it was through
    _profiler: Any = attrs.field(default=None, init=False, repr=False)  # while it is under way,
    _whole: bool = attrs.field(default=False, init=False, repr=False)  # or through, but not written yet
    _left: Any = attrs.field(default=None, init=False, repr=False)  # what happens if nobody closes it
    only_looks: ClassVar[bool] = True

    def __attrs_post_init__(self) -> None:
        if self.folder is None and self.line is None:
            raise ValueError("profile: without folder and line nobody sees the result. Give one of them.")

    def on_build(self, run: Run) -> None:
        """See that the folder can be written to."""
        if self.folder is not None:
            run.require_folder(self.folder, "profile")

    def on_pass(self, run: Run) -> None:
        """Begin before the batch of the first iteration is fetched."""
        if run.phase is not None and run.phase.trains and self._profiler is None and self.done < self.repeat:
            self._begin()

    on_resume = on_pass  # its memory says whether anything is left to do

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        for state in states:
            if self.done < self.repeat and state.trains:
                if state.run is None:
                    raise RuntimeError("profile: these states belong to no run, which has the boundaries. Iterate one.")
                state.run.at_boundary(self._step)
            yield state

    def close(self) -> None:
        """Stop profiling; it begins anew with the next iteration."""
        profiler, self._profiler, self._whole = self._profiler, None, False
        if profiler is not None:
            self._left.detach()
            profiler.stop()

    def _begin(self) -> None:
        self._profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=self.wait, warmup=self.warmup, active=self.active, repeat=1),
            on_trace_ready=_if_alive(weakref.WeakMethod(self._ready)),
            record_shapes=self.record_shapes,
            profile_memory=self.profile_memory,
            with_stack=self.with_stack,
            with_flops=self.with_flops,
        )
        self._profiler.start()
        self._left = weakref.finalize(self, self._profiler.stop)  # torch crashes if the process ends before that

    def _step(self, run: Run) -> None:
        """An iteration is over."""
        if self._profiler is None:  # it was closed in the middle of a pass
            self._begin()
            return
        if not self._whole:  # else its trace could not be written, and this is the next try
            self._profiler.step()
        if self._whole:
            self._show(self._profiler, whole=True)
            self.done += 1
            self.close()
            if self.done < self.repeat:
                self._begin()  # torch's own repetition warns that it forgets the cycle before

    def _ready(self, profiler: Any) -> None:
        """What torch calls when all is recorded, and when the profiler is stopped before."""
        self._whole = self._profiler is not None
        if not self._whole:
            self._show(profiler, whole=False)

    def _show(self, profiler: Any, whole: bool) -> None:
        """Write the trace, and show the table."""
        where = ""
        if self.folder is not None:
            number = 1
            while (path := self.folder / f"trace_{number}.json").exists():
                number += 1
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
            where = f" ({path})"
        if self.line is not None:
            for text in _table(profiler.key_averages(), where, whole):
                self.line(text)


def _if_alive(method: weakref.WeakMethod[Callable[[Any], None]]) -> Callable[[Any], None]:
    """A function that calls *method* but does not keep its owner: a forgotten run takes its profiler along."""

    def call(profiler: Any) -> None:
        alive = method()
        if alive is not None:
            alive(profiler)

    return call


def _table(rows: Any, where: str, whole: bool) -> Iterator[str]:
    """The operators that take most, by their own time on the GPU, or on the CPU where there is none."""
    steps = [row for row in rows if row.key.startswith("ProfilerStep")]  # the CPU's comes first
    rows = [row for row in rows if not row.key.startswith("ProfilerStep")]
    on_gpu = any(row.self_device_time_total for row in rows)
    word = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    total = sum(getattr(row, word) for row in rows) or 1.0
    what = "closed half way"
    if whole and steps:
        count = steps[0].count
        what = f"{count} iterations of {steps[0].cpu_time_total / count / 1000:.2f} ms"
    yield f"profile: {what}{where}; by time on the {'GPU' if on_gpu else 'CPU'}:"
    for row in sorted(rows, key=lambda row: -getattr(row, word))[:ROWS]:
        own = getattr(row, word)
        yield f"  {row.key[:48]:<48} {own / 1000:9.2f} ms  {own / total:4.0%}  {row.count:6} calls"
