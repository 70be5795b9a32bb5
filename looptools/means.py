"""Weighted means of scalars that stay on their device until somebody reads them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

FOLD_AT = 256  # entries kept as they came; appending costs 0.1 µs, adding a tensor each time 1.4 µs


class Means:
    """Collects scalars by name; a mean is the sum of value · weight over the sum of weights.

    Args:
        window: How many of the last entries count; None for all of them.

    Example:
        >>> means = Means()
        >>> means.add({"loss": torch.tensor(1.0)}, weight=4)
        >>> means.add({"loss": torch.tensor(4.0)}, weight=2)
        >>> means.read()
        {'loss': 2.0}
    """

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.entries: deque[tuple[Mapping[str, Any], float]] = deque(maxlen=window)
        self._sums: dict[str, Any] = {}
        self._weights: dict[str, float] = {}

    def add(self, values: Mapping[str, Any], weight: float) -> None:
        """Take in one entry; tensors must have shape ``()`` and no graph.

        The same may be done by ``entries.append((values, weight))``, if `fold` is called at `FOLD_AT` entries.
        """
        self.entries.append((values, weight))
        if len(self.entries) >= FOLD_AT:
            self.fold()

    def read(self, also: Mapping[str, Any] | None = None) -> dict[str, float]:
        """The means as floats, and with them the scalars of *also*. Waits for each device once."""
        if self.window is None:
            self.fold()
            sums, weights = self._sums, self._weights
        else:
            sums, weights = {}, {}
            _gather(self.entries, sums, weights)
        means = {key: sums[key] / weights[key] for key in sums if weights[key]}
        return read({**means, **(also or {})})

    @property
    def empty(self) -> bool:
        """Whether nothing has been collected."""
        return not self.entries and not self._sums

    def clear(self) -> None:
        """Forget everything."""
        self.entries.clear()
        self._sums, self._weights = {}, {}

    def fold(self) -> None:
        """Add the entries up, so that they need no room; those of a window stay."""
        if self.window is None:
            _gather(self.entries, self._sums, self._weights)
            self.entries.clear()

    def state_dict(self) -> dict[str, Any]:
        """Everything collected, in plain values and tensors: one column for each key that came with the same others.

        Nothing is added up for it, since that would change the last bits of the means.
        """
        runs: list[dict[str, Any]] = []  # of entries in a row that have the same keys
        for values, weight in self.entries:
            if not runs or list(runs[-1]["columns"]) != list(values):
                runs.append({"columns": {key: [] for key in values}, "weights": []})
            for key, value in values.items():
                runs[-1]["columns"][key].append(value)
            runs[-1]["weights"].append(weight)
        for run in runs:
            run["columns"] = {key: _packed(column) for key, column in run["columns"].items()}
        return {"runs": runs, "sums": dict(self._sums), "weights": dict(self._weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        entries = list(state.get("entries", ()))  # of older versions
        for run in state.get("runs", ()):
            columns = {key: list(column) for key, column in run["columns"].items()}
            for number, weight in enumerate(run["weights"]):
                entries.append(({key: column[number] for key, column in columns.items()}, weight))
        self.entries = deque(((values, weight) for values, weight in entries), maxlen=self.window)
        self._sums, self._weights = dict(state["sums"]), dict(state["weights"])


def _packed(column: list[Any]) -> Any:
    """Tensors alike as one tensor, which is one record in a file instead of hundreds; all else as it is."""
    kinds = {(value.dtype, value.device, value.shape) if isinstance(value, Tensor) else None for value in column}
    return torch.stack(column) if len(kinds) == 1 and None not in kinds else column


def _gather(
    entries: Iterable[tuple[Mapping[str, Any], float]], sums: dict[str, Any], weights: dict[str, float]
) -> None:
    """Add value · weight and weight of all *entries*, in order, to *sums* and *weights*."""
    columns: dict[str, tuple[list[Any], list[float]]] = {}
    for values, weight in entries:
        for key, value in values.items():
            column = columns.setdefault(key, ([], []))
            column[0].append(value)
            column[1].append(weight)
    for key, (column_values, column_weights) in columns.items():
        total = _weighted_sum(column_values, column_weights)
        sums[key] = sums[key] + total if key in sums else total
        weights[key] = weights.get(key, 0.0) + sum(column_weights)


def _weighted_sum(values: list[Any], weights: list[float]) -> Any:
    """Sum of value · weight in float64: a tensor on the values' device, or a float."""
    plain = [(value, weight) for value, weight in zip(values, weights, strict=True) if not isinstance(value, Tensor)]
    total: Any = sum(float(value) * weight for value, weight in plain)
    if len(plain) == len(values):
        return total
    pairs = [(value, weight) for value, weight in zip(values, weights, strict=True) if isinstance(value, Tensor)]
    device = pairs[-1][0].device
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    column = torch.stack([value.to(device=device, dtype=dtype) for value, _ in pairs])
    factors = torch.tensor([weight for _, weight in pairs], dtype=dtype)
    return total + (column * factors.to(device, non_blocking=True)).sum()  # else the host would wait for a GPU


def number(scalar: Tensor) -> float:
    """One scalar as a float; waits for its device.

    Example:
        >>> number(torch.tensor(0.5))
        0.5
    """
    return float(scalar.detach().item())


def read(values: Mapping[str, Any]) -> dict[str, float]:
    """Turn scalars into floats: one wait for each device that holds some.

    This and `number` are the one place of the library where tensors become numbers.

    Example:
        >>> read({"loss": torch.tensor(0.5), "lr": 0.1})
        {'loss': 0.5, 'lr': 0.1}
    """
    result = dict(values)
    by_device: dict[torch.device, list[str]] = {}
    for key, value in values.items():
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, []).append(key)
        else:
            result[key] = float(value)
    for device, keys in by_device.items():
        for key in keys:
            if values[key].numel() != 1:
                raise TypeError(
                    f"{key!r} in state.metrics or state.gauges must be one number, got shape "
                    f"{tuple(values[key].shape)}. Average it: .mean()."
                )
        dtype = torch.float32 if device.type == "mps" else torch.float64
        numbers = torch.stack([values[key].detach().reshape(()).to(dtype) for key in keys]).tolist()
        result.update(zip(keys, numbers, strict=True))
    return result
