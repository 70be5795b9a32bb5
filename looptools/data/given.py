"""What a user gives as a source of batches."""

from __future__ import annotations

from typing import Any

from torch.nn import Module
from torch.utils.data import DataLoader, IterableDataset


def trusted_len(source: Any) -> int | None:
    """How many batches *source* gives a pass, where its ``len`` can be believed.

    That of a DataLoader over an IterableDataset cannot: it is the data set's own guess.
    """
    if isinstance(source, DataLoader) and isinstance(source.dataset, IterableDataset):
        return None
    try:
        return len(source)
    except (TypeError, NotImplementedError):
        return None


def check_source(where: str, source: Any) -> None:
    """Refuse what cannot be walked through where it is typed."""
    if isinstance(source, type):
        raise TypeError(f"{where}: source is the class {source.__name__}; give an instance of it.")
    if isinstance(source, Module):
        raise TypeError(f"{where}: source is a module. The model comes first: {where}(model, source, step).")
    if not callable(source) and not hasattr(source, "__iter__") and not hasattr(source, "__getitem__"):
        raise TypeError(f"{where}: source must be an iterable of batches or a function that makes one, got {source!r}.")
