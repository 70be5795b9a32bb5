"""Batches: how many samples they hold, and how they get to the model's device."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch.nn import Module


def model_device(model: Any) -> torch.device | None:
    """The device of the model's first parameter or buffer; None if it has neither."""
    if not isinstance(model, Module):
        return None
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), None)


def move(batch: Any, device: torch.device, non_blocking: bool = False) -> Any:
    """Copy all tensors of a nested batch to *device*; what is there already is not copied.

    Goes into tuples, lists, named tuples, mappings, attrs classes and dataclasses; anything with a
    method ``to`` moves itself; all else stays as it is.

    Example:
        >>> move({"image": torch.zeros(2), "name": "a"}, torch.device("meta"))["image"].device.type
        'meta'
    """
    if hasattr(batch, "to"):
        return batch.to(device, non_blocking=non_blocking) if isinstance(batch, torch.Tensor) else batch.to(device)
    if isinstance(batch, Mapping):
        moved = {key: move(value, device, non_blocking) for key, value in batch.items()}
        return moved if type(batch) is dict else type(batch)(moved)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device, non_blocking) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(move(value, device, non_blocking) for value in batch)
    if attrs.has(type(batch)):
        fields = {
            f.alias: move(getattr(batch, f.name), device, non_blocking) for f in attrs.fields(type(batch)) if f.init
        }
        return attrs.evolve(batch, **fields)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {
            f.name: move(getattr(batch, f.name), device, non_blocking) for f in dataclasses.fields(batch) if f.init
        }
        return dataclasses.replace(batch, **fields)
    return batch


def count_samples(batch: Any) -> int:
    """How many samples a batch holds: the first dimension of its first field.

    A tensor or array counts its rows; of a tuple, list, mapping, attrs class or dataclass the first
    field counts; a list whose elements are neither tensors nor fields (names, numbers, mappings) holds
    one sample an element. What has no size is one sample.

    Example:
        >>> count_samples((torch.zeros(8, 3), torch.zeros(8))), count_samples(["a", "b"]), count_samples(None)
        (8, 2, 1)
    """
    if hasattr(batch, "shape") or isinstance(batch, Mapping):
        return _rows(batch)
    if isinstance(batch, tuple | list) and batch:
        head = batch[0]
        return _rows(head) if hasattr(head, "shape") or isinstance(head, tuple | list) else len(batch)
    if attrs.has(type(batch)) and attrs.fields(type(batch)):
        return _rows(getattr(batch, attrs.fields(type(batch))[0].name))
    if dataclasses.is_dataclass(batch) and dataclasses.fields(batch):
        return _rows(getattr(batch, dataclasses.fields(batch)[0].name))
    return 1


def _rows(field: Any) -> int:
    """Rows of one field of a batch."""
    shape = getattr(field, "shape", None)
    if shape is not None:
        return int(shape[0]) if len(shape) else 1
    if isinstance(field, Mapping):
        return _rows(next(iter(field.values()), None))
    return len(field) if isinstance(field, tuple | list | str) and field else 1
