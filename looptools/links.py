"""Parts beside each other: each in its slot, each fed by its link."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .pipeline import Middleware, start
from .state import State


class Slot:
    """A part in its place: its name, its generator while it has one, and the link that feeds it."""

    __slots__ = ("guard", "link", "muted", "name", "of_run", "part", "starting", "stream", "waiting")

    def __init__(self, name: str, part: Middleware, refill: Callable[[Slot], State], of_run: bool) -> None:
        self.name = name
        self.part: Any = part
        self.of_run = of_run  # one generator for the whole run, or a new one each pass
        self.stream: Iterator[State] | None = None
        self.guard: Callable[[Iterator[State], str], Iterator[State]] | None = None  # put around the generator
        self.muted = False  # states pass it by
        self.waiting = False  # it dropped a state, and is being found the next one
        self.starting = False  # it may not ask for states before it has returned an iterator
        self.link = Link(self, refill)

    @property
    def short(self) -> str:
        """The name without phase and recipe: ``backward`` of ``train/D.backward``."""
        return self.name.rpartition("/")[2].rpartition(".")[2].partition("#")[0]

    @property
    def closes(self) -> bool:
        """Whether the part must learn that a pass has ended even if its last state was dropped."""
        return self.of_run or getattr(self.part, "closes_pass", False)

    def begin(self) -> Iterator[State]:
        """A new generator."""
        state, self.link.state = self.link.state, None
        self.starting = True
        try:
            self.stream = start(self.part, self.link, self.name)
            if self.guard is not None:
                self.stream = self.guard(self.stream, self.name)
        finally:
            self.starting = False
        self.link.state = state
        return self.stream

    def forget(self) -> Iterator[State] | None:
        """Let the generator go, and return it."""
        stream, self.stream, self.link.state = self.stream, None, None
        return stream


class Link:
    """What a part iterates over: holds one state; asked twice, the part dropped it and gets the next one."""

    __slots__ = ("_refill", "_slot", "state")

    def __init__(self, slot: Slot, refill: Callable[[Slot], State]) -> None:
        self.state: State | None = None
        self._slot = slot
        self._refill = refill

    def __iter__(self) -> Link:
        return self

    def __next__(self) -> State:
        state = self.state
        if state is None:
            return self._refill(self._slot)
        self.state = None
        return state


def close_streams(slots: Iterable[Slot]) -> list[BaseException]:
    """End the generators of *slots*: their loops are over, so what stands behind a loop runs.

    Their links must give nothing more. All are closed, whatever they raise.

    Returns:
        What they raised.
    """
    errors: list[BaseException] = []
    for slot in slots:
        stream = slot.forget()
        for clean_up in (_run_out, _close):
            try:
                clean_up(stream)
            except BaseException as error:
                error.add_note(f"looptools: while {slot.name} was closed.")
                errors.append(error)
    return errors


def _run_out(stream: Iterator[State] | None) -> None:
    for _ in stream or ():
        break  # yields once more, though its source is exhausted: it is closed


def _close(stream: Any) -> None:
    if hasattr(stream, "close"):
        stream.close()


def raise_all(errors: list[BaseException]) -> None:
    """Raise the one error, or an ExceptionGroup of several; nothing if there is none."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise BaseExceptionGroup("several parts failed while they were closed", errors)
