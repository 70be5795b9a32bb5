"""The random generators of the process, seeded, saved and set together."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from typing import Any

import torch


def seed_everything(seed: int, *, deterministic: bool = False) -> int:
    """Seed the generators of Python, NumPy (if it is installed) and torch, on the CPU and all devices.

    Call it before the model is made. The same seed gives the same numbers on the same machine and versions; on a GPU
    the same bits only with *deterministic*. A loader's workers draw their seeds from torch's generator, and so follow.
    It cannot set what Python has read when it started: for the order of sets of strings, start it with
    ``PYTHONHASHSEED=0``. Generators of your own (``torch.Generator``, ``numpy.random.default_rng``) keep their seeds.

    Args:
        seed: A whole number from 0 to 2**32 - 1, as NumPy takes them.
        deterministic: Have torch use algorithms that give the same bits each time, which may be slower, and raise where
            there is none. Sets ``CUBLAS_WORKSPACE_CONFIG`` unless it is set, which CUDA reads at its first use.

    Returns:
        The seed, to be logged.

    Raises:
        ValueError: If *seed* is out of this range.
        TypeError: If it is not a whole number.

    Example:
        >>> seed_everything(7)
        7
        >>> first = torch.rand(1)
        >>> bool(first == torch.rand(1)), bool(first == torch.rand(1, generator=torch.Generator().manual_seed(7)))
        (False, True)
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed_everything: seed must be a whole number, got {seed!r}.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed_everything: seed must be from 0 to 2**32 - 1, got {seed}. For any number n: n % 2**32.")
    random.seed(seed)
    if importlib.util.find_spec("numpy") is not None:
        import numpy

        numpy.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    return seed


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
