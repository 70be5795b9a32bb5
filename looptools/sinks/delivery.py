"""Rows on their way to the sinks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from ..state import State
from .rows import Row, Sink


@attrs.define(eq=False)
class Parcel:
    """What is to be written: how, who still lacks it, and the state that brought it up."""

    write: Callable[[str], Any]
    names: list[str]
    state: State | None


class Delivery:
    """Gives everything to each sink once, whatever another one raises; what failed is tried again.

    A sink takes up where it stood before the first thing that it is given. Methods return what sinks raised.

    Args:
        sinks: All of them, by name.
        hparams: What those that take hyperparameters get first.

    Attributes:
        marks: How far each sink has written; each change makes a new dictionary.
        waiting: What some sink still lacks, oldest first.
    """

    def __init__(self, sinks: Mapping[str, Sink], hparams: Mapping[str, Any] | None = None) -> None:
        self.sinks: dict[str, Any] = dict(sinks)
        self.hparams = hparams
        self.marks: dict[str, Any] = {}
        self.waiting: list[Parcel] = []
        self._unready = set(self.sinks)
        self._failed: set[str] = set()  # who did not get what comes first

    def add(self, row: Row, state: State) -> None:
        """Have *row* written to all sinks."""
        self.waiting.append(Parcel(lambda name: self.sinks[name].write({**row}, state), list(self.sinks), state))

    def flush(self) -> list[BaseException]:
        """Write what is waiting, up to the first thing that somebody fails to take."""
        while self.waiting:
            errors = self.each(self.waiting[0].names, self.waiting[0].write)
            self._failed = set(self.waiting[0].names)
            if errors:
                return errors
            del self.waiting[0]
        return []

    def each(self, names: list[str], write: Callable[[str], Any]) -> list[BaseException]:
        """Call *write* with each of *names*, and take those off the list that did not fail."""
        errors: list[BaseException] = []
        for name in names.copy():
            try:
                self._take_up(name)
                write(name)
            except Exception as error:
                error.add_note(f"log: while {name} was written to.")
                errors.append(error)
            else:
                names.remove(name)
                if hasattr(self.sinks[name], "mark"):
                    self.marks = {**self.marks, name: self.sinks[name].mark()}
        return errors

    def _take_up(self, name: str) -> None:
        if name in self._unready:
            sink = self.sinks[name]
            if hasattr(sink, "rewind"):
                sink.rewind(self.marks.get(name))
            if self.hparams and hasattr(sink, "hparams"):
                sink.hparams(self.hparams)
            self._unready.remove(name)

    def rewind(self, marks: dict[str, Any]) -> list[BaseException]:
        """Have each sink take up where *marks* say before the next thing that it is given."""
        self.waiting.clear()
        errors = self.close()
        self.marks, self._unready, self._failed = marks, set(self.sinks), set()
        return errors

    def skip_failed(self) -> None:
        """Where the user skipped the state, who failed does without its rows; the others still get them."""
        for parcel in self.waiting:
            if parcel.state is not None and parcel.state.dropped:
                parcel.names = [name for name in parcel.names if name not in self._failed]
        self.waiting = [parcel for parcel in self.waiting if parcel.names]

    def take_over(self, old: Delivery) -> None:
        """Go on where *old* stood, which may have had other sinks."""
        self.marks = old.marks
        for parcel in old.waiting:
            parcel.names = [name for name in parcel.names if name in self.sinks]
        self.waiting = [parcel for parcel in old.waiting if parcel.names]

    def close(self) -> list[BaseException]:
        """Flush and close all sinks; they open again with the next row."""
        self.skip_failed()
        left = self.waiting and all(parcel.state is not None and parcel.state.dropped for parcel in self.waiting)
        errors = self.flush() if left else []  # of a skipped iteration; after it none has come
        for sink in self.sinks.values():
            try:
                sink.close()
            except BaseException as error:
                errors.append(error)
        return errors
