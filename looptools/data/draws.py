"""The random generators that a source draws from: the process's, and those that hang on it."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from ..generators import (
    generators_within,
    get_generator,
    get_generators,
    same_states,
    set_generator,
    set_generators,
)
from ..warn import warn
from .loaders import Passing, parts_of
from .seeded import is_seeded


@attrs.define
class Said:
    """What cannot be exact is said once for each source, which is known by its *name*."""

    name: str
    messages: set[str] = attrs.field(factory=set, init=False)

    def once(self, message: str) -> None:
        """Warn of it, unless that was done already."""
        if message not in self.messages:
            self.messages.add(message)
            warn(f"{self.name}: {message}")


class Draws:
    """Reads and sets them; for a seeded loader, which draws from none, there is nothing to do.

    Args:
        given: The source.
        said: Told what cannot be exact.
    """

    def __init__(self, given: Any, said: Said) -> None:
        self.given = given
        self.said = said
        self.none = is_seeded(given)

    def own(self) -> dict[str, Any]:
        """State of the generators that hang on a loader, its samplers or its data set, by where they are."""
        if self.none:
            return {}
        return {path: get_generator(generator) for path, generator in generators_within(self.given).items()}

    def set_own(self, states: dict[str, Any] | list[torch.Tensor]) -> None:
        """Put back what `own` gave; older checkpoints have a list, of torch's generators only."""
        if not isinstance(states, dict):
            there = (getattr(part, "generator", None) for part in parts_of(self.given))
            torchs = {id(g): g for g in there if isinstance(g, torch.Generator)}.values()
            for generator, state in zip(torchs, states, strict=True):
                generator.set_state(state)
            return
        here = generators_within(self.given) if states else {}
        for path, state in states.items():
            if path in here:
                set_generator(here[path], state)
        if missing := [path for path in states if path not in here]:
            self.said.once(
                f"the random generator at {', '.join(missing)} of its source was saved, but is not there, so what is "
                "drawn from it will differ. Make it where the data set or sampler is made."
            )

    def now(self) -> dict[str, Any]:
        """State of all of them."""
        return {} if self.none else {"process": get_generators(), "own": self.own()}

    def put(self, state: dict[str, Any]) -> None:
        """Put back what `now` gave."""
        if "process" in state and not self.none:
            set_generators(state["process"])
            self.set_own(state["own"])

    def of_order(self) -> dict[str, Any]:
        """State of those that a sampler may draw from."""
        if self.none:
            return {}
        return {"process": get_generators(), "own": {p: state for p, state in self.own().items() if not _of_data(p)}}

    def tell_of_walk(self, first: dict[str, Any], now: dict[str, Any]) -> None:
        """Say it if walking through the batches again drew random numbers that others have drawn between.

        Args:
            first: The process's generators behind the first batch.
            now: All of them before.
        """
        here = get_generators()
        if not self.none and not same_states(first, here) and not same_states(here, now["process"]):
            self.said.once(
                "its batches were walked through again, and it draws from the process's random generators as it goes, "
                "between other draws. If it keeps what it makes of them (a shuffle buffer), what follows may differ "
                "from a run without interruption. Give it a generator of its own."
            )

    def forward(self, now: dict[str, Any], passing: Passing | None, raised: bool, ends: bool = False) -> None:
        """Put back what `now` gave before the place was found again.

        Args:
            now: All of them.
            passing: How a loader passed over batches; None if they were walked through again, and so drawn again.
            raised: Whether the place was lost by a batch that raised, after what was drawn for it.
            ends: Whether it is the last of the walk: a sampler may have begun its next permutation for it.
        """
        if self.none:
            return
        set_generators(now["process"])
        first, last = ({}, {}) if passing is None else (passing.first or {}, passing.last or {})
        as_it_goes = ends or not same_states(first.get("own"), last.get("own"))
        if not raised or (passing is not None and not as_it_goes):
            self.set_own(now["own"])
        elif passing is not None:  # the sampler had drawn for the batch that raised
            self.set_own({path: state for path, state in now["own"].items() if _of_data(path)})
        if not same_states(first.get("process"), last.get("process")):
            self.said.once(
                "its sampler draws from the process's random generators as it goes, between other draws, so the order "
                "from here on may not be that of a run without interruption. Give the sampler a generator of its own, "
                "or use lt.seeded(loader, seed)."
            )


def _of_data(path: str) -> bool:
    """Whether samples, and not the order, are drawn from the generator there."""
    return path.partition(".")[0] in ("dataset", "collate_fn")
