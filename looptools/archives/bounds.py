"""Whether a tree is small enough to be walked through."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch

from .archive import Refused
from .stand_ins import Ordered, Outline

DEEPEST = 100  # containers within containers: those who walk through a tree recurse

_LEAVES = {str, int, float, bool, type(None), torch.dtype, torch.device, torch.Size, Outline, set}


def _held(value: Any) -> Iterable[Any]:
    """What a container holds."""
    kind = type(value)
    if kind is Ordered:
        return chain(value.values(), (value.metadata,))
    if isinstance(value, dict):
        return iter(value.values())
    if isinstance(value, list | tuple):
        return iter(value)
    raise Refused("holds a function, class or bare storage where a value should be")


def require_small(tree: Any, most: int) -> None:
    """See that a tree can be walked through: what is shared counts at each of its places.

    Raises:
        Refused: If it holds itself, is too deep, or has more than *most* values.
    """
    if type(tree) in _LEAVES:
        return
    done: dict[int, tuple[int, int]] = {id(tree): (0, 0)}  # values and depth; 0 while it is being looked at
    path: list[list[Any]] = [[tree, _held(tree), 1, 1]]
    while path:
        frame = path[-1]
        for child in frame[1]:
            if type(child) in _LEAVES:
                frame[2] += 1
                continue
            values, depth = done.get(id(child), (-1, 0))
            if values > 0:
                frame[2], frame[3] = frame[2] + values, max(frame[3], depth + 1)
                continue
            if values == 0 or len(path) >= DEEPEST:
                raise Refused(f"holds a value that {'holds itself' if not values else f'is over {DEEPEST} deep'}")
            done[id(child)] = (0, 0)
            path.append([child, _held(child), 1, 1])
            break
        else:
            node, _, values, depth = path.pop()
            done[id(node)] = (values, depth)
            if values > most or depth > DEEPEST:
                raise Refused(f"holds values that are shared so often, or so deep, that they unfold to {values}")
            if path:
                path[-1][2], path[-1][3] = path[-1][2] + values, max(path[-1][3], depth + 1)
