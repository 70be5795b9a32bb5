"""The random generators of the process, saved and set together."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


def get_generators() -> dict[str, Any]:
    """State of Python's, NumPy's (if it is in use), torch's and each CUDA device's generator, in plain values.

    Example:
        >>> state = get_generators()
        >>> first = torch.rand(1)
        >>> set_generators(state)
        >>> bool(torch.rand(1) == first)
        True
    """
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(numbers), gauss], "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        kind, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state()
        state["numpy"] = [kind, keys.tolist(), int(position), int(has_gauss), float(cached)]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_generators(state: dict[str, Any]) -> None:
    """Put back what `get_generators` gave."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        import numpy

        numpy.random.set_state(tuple(state["numpy"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
