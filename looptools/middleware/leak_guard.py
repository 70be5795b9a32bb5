"""See that parts of your own leave torch's modes as they were."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from ..links import Slot
from ..modes import all_torch_modes, put_back, switched
from ..state import State
from .forward import forward

if TYPE_CHECKING:
    from ..run import Run

LIBRARY = __name__.partition(".")[0]


@attrs.frozen(eq=False)
class leak_guard:
    """Refuse parts of your own, and steps, that leave one of torch's modes switched when they hand a state on.

    ``with torch.no_grad(): yield state`` switches gradients off for everything that comes after it, the caller's own
    code included. Piped onto the run, it looks after each turn of every part that is not looptools' own, also of one
    that is put in later with ``run.replace``, and of every ``forward``, which calls your step: at gradients,
    inference_mode, autocast, deterministic algorithms, anomaly detection, the default dtype and device. What was
    switched is put back before the error is raised. It takes 2 µs a part, and reads no device: leave it in while you
    write parts, or for good. The states themselves pass through it untouched.

    Raises:
        RuntimeError: From the part that left a mode switched, with its name and the mode's.

    Example:
        >>> def step(model, batch):
        ...     torch.set_default_dtype(torch.float64)
        ...     return model(batch).mean()
        >>> phase = lt.train(torch.nn.Linear(1, 1), [torch.ones(1, 1)], step)
        >>> run = lt.workflow([(phase, 1)], max_epochs=1) | lt.leak_guard()
        >>> next(run)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        RuntimeError: leak_guard: train/forward left the default dtype switched when it handed on iteration 0 of ...
        >>> torch.get_default_dtype()
        torch.float32
    """

    only_looks: ClassVar[bool] = True

    def on_build(self, run: Run) -> None:
        """Take all parts under guard."""
        run.require_run_scope(self)
        for slot in run.cursor.slots:
            slot.guard = slot.guard or functools.partial(_guard, slot)

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        for state in states:
            yield state


def _guard(slot: Slot, stream: Iterator[State], name: str) -> Iterator[State]:
    """*stream* itself, or under guard if the part that stands in *slot* now is the user's own."""
    part: Any = slot.part
    while isinstance(part, functools.partial):
        part = part.func
    module = getattr(part, "__module__", None) or type(part).__module__
    own = module.partition(".")[0] != LIBRARY
    return _Guarded(stream, name) if own or isinstance(part, forward) else stream


class _Guarded:
    """A part's iterator, looked after. Not a generator, so that its traceback stays as it was."""

    __slots__ = ("_name", "_stream")

    def __init__(self, stream: Iterator[State], name: str) -> None:
        self._stream = stream
        self._name = name

    def __iter__(self) -> _Guarded:
        return self

    def __next__(self) -> State:
        before = all_torch_modes()
        try:
            state = next(self._stream)
        except BaseException:
            put_back(before)  # what it raised matters more than what it left
            raise
        if all_torch_modes() != before:
            self._refuse(before, state)
        return state

    def close(self) -> None:
        """Close the part, if it can be."""
        if hasattr(self._stream, "close"):
            self._stream.close()

    def _refuse(self, before: tuple[Any, ...], state: State) -> None:
        names = switched(before)
        self.close()  # a generator leaves its `with`
        left = put_back(before)
        where = f"iteration {state.iteration} of {state.phase}" if isinstance(state, State) else repr(state)
        still = f" (still so, and not to be put back: {', '.join(left)})" if left else ""
        raise RuntimeError(
            f"leak_guard: {self._name} left {' and '.join(names)} switched when it handed on {where}{still}. Only the "
            "work goes inside the `with`; the yield comes after it, outside. What it sets by hand it must put back."
        )
