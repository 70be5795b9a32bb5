"""What a part can do with a state: the fields that count, and who reads and writes them."""

from __future__ import annotations

import ast
from collections.abc import Iterable

import attrs

MAPPINGS = ("outputs", "metrics", "gauges")
MADE = ("batch", "outputs", "loss", "num_samples", "metrics", "gauges", "lr", "grad_norm", "updates", "windows")
FIELDS = (*MADE, "dropped")  # what parts make of a state; its other fields are facts


def _ordered(items: Iterable[str]) -> dict[str, None]:
    return dict.fromkeys(items)


@attrs.define
class Uses:
    """What a part reads and writes on a state: ``"lr"``, ``"metrics[f1]"``, ``"metrics"`` where keys are not known.

    Args:
        reads: What it reads, now and then at least.
        writes: What it writes.
        needs: What it reads before its yield, without asking first whether it is there.
        unseen: Whether it may do more than can be seen.

    Example:
        >>> from looptools.stepping.explaining import reader
        >>> def halve(states):
        ...     for state in states:
        ...         state.metrics["half"] = state.metrics["loss"] / 2
        ...         yield state
        >>> uses = reader.read(halve, {0: "stream"})
        >>> list(uses.reads), list(uses.writes), uses.unseen
        (['metrics[loss]'], ['metrics[half]'], False)
    """

    reads: dict[str, None] = attrs.field(factory=dict, converter=_ordered)
    writes: dict[str, None] = attrs.field(factory=dict, converter=_ordered)
    needs: dict[str, None] = attrs.field(factory=dict, converter=_ordered)
    unseen: bool = False

    def add(self, other: Uses) -> Uses:
        """Take in what *other* does."""
        self.reads |= other.reads
        self.writes |= other.writes
        self.needs |= other.needs
        self.unseen = self.unseen or other.unseen
        return self


def item_of(field: str, key: ast.expr) -> str:
    """The name of one key of a mapping; that of the mapping where the key is no literal."""
    return f"{field}[{key.value}]" if isinstance(key, ast.Constant) and isinstance(key.value, str) else field


def items_of(field: str, mapping: ast.expr) -> list[str]:
    """Those of all keys of a literal."""
    if not isinstance(mapping, ast.Dict):
        return [field]
    return [field if key is None else item_of(field, key) for key in mapping.keys]
