"""Sources that can be walked through only once."""

from __future__ import annotations

import itertools

from .cursor import Cursor
from .phases import Phase


def require_sources_to_last(cursor: Cursor) -> None:
    """Refuse a source that can be walked through only once under a phase that has several passes.

    Raises:
        ValueError: If there is one.
    """
    passes = cursor.passes
    lengths = {key: n or 0 for key, n in passes.lengths.items()}
    if passes.agenda.max_iterations is not None:
        return  # how many passes there are depends on how long they prove to be
    walks: dict[int, int] = {}
    for entry, _ in itertools.islice(passes.agenda.walk(lengths), 1000):
        phase = entry.phase
        if isinstance(phase, Phase) and hasattr(phase.source, "__next__") and not (entry.trains and entry.batches):
            walks[id(phase)] = walks.get(id(phase), 0) + 1
            if walks[id(phase)] > 1:
                raise ValueError(
                    f"{passes.names[id(phase)]}: its source is a {type(phase.source).__name__}, which is spent after "
                    "one pass, and there are several. Give a function that makes it anew (lambda: ...), or a list."
                )
