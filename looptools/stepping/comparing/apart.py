"""How far two values are apart."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from ...means import number

WORDS = (str, bool, int, float)


@attrs.frozen
class Gap:
    """What differs between two values.

    Args:
        a: The first, in words; of a tensor the element that differs most.
        b: The second.
        difference: The largest one between two elements; nan where there is none to tell.
        nan: Who has some: ``"a"``, ``"b"``, ``"both"``; empty if neither has.
    """

    a: str
    b: str
    difference: float = math.nan
    nan: str = ""


@attrs.frozen
class Tolerance:
    """Two numbers agree if they are not further apart than ``atol + rtol * abs(b)``; nan agrees with nan."""

    rtol: float = 0.0
    atol: float = 0.0

    def gap(self, a: Any, b: Any) -> Gap | None:
        """What differs; None if they agree. What is neither tensor nor plain is not looked at.

        Example:
            >>> Tolerance(atol=0.5).gap(1.0, 1.25), Tolerance().gap(1, 3)
            (None, Gap(a='1', b='3', difference=2.0, nan=''))
        """
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return None if _equal(a, b) else self._of_tensors(_plain(a), _plain(b))
        if _is_number(a) and _is_number(b):
            return self._of_tensors(_scalar(a), _scalar(b))
        if a is None or b is None or (isinstance(a, WORDS) and isinstance(b, WORDS)):
            return None if a is b or a == b else Gap(_word(a), _word(b))
        if hasattr(a, "tobytes") and hasattr(b, "tobytes"):  # arrays of NumPy's
            with contextlib.suppress(TypeError, ValueError):
                return self.gap(torch.as_tensor(a), torch.as_tensor(b))
        return None

    def _of_tensors(self, a: Tensor, b: Tensor) -> Gap | None:
        if a.shape != b.shape:
            return Gap(f"shape {tuple(a.shape)}", f"shape {tuple(b.shape)}")
        wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
        whole = not (a.is_floating_point() or a.is_complex() or b.is_floating_point() or b.is_complex())
        equal = a == b if whole else None  # large whole numbers have no float of their own
        a, b = a.to(wide), b.to(wide)
        close = torch.isclose(a, b, rtol=self.rtol, atol=self.atol, equal_nan=True)
        close = close & equal if equal is not None and not (self.rtol or self.atol) else close
        if bool(close.all()):
            return None
        nans = [bool(value.isnan().any()) for value in (a, b)]
        distance = (a - b).abs().masked_fill(close, -1.0).reshape(-1)
        finite = distance[distance.isfinite()]
        largest = number(finite.max()) if finite.numel() else -1.0
        where = distance.nan_to_num(nan=math.inf, posinf=math.inf).argmax()
        place = f" at {tuple(int(number(one)) for one in torch.unravel_index(where, a.shape))}" if a.ndim else ""
        mine, other = (_shown(value.reshape(-1)[where]) + place for value in (a, b))
        nan = {(True, True): "both", (True, False): "a", (False, True): "b"}.get((nans[0], nans[1]), "")
        return Gap(mine, other, largest if largest >= 0 else math.inf, nan)


def _equal(a: Tensor, b: Tensor) -> bool:
    """The quick way, where there is one."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return a.layout is torch.strided and not a.is_quantized and not a.is_nested and torch.equal(a, b)


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU, and dense."""
    tensor = tensor.detach()
    if tensor.is_nested:
        tensor = torch.nested.to_padded_tensor(tensor, 0.0)
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    return (tensor if tensor.layout is torch.strided else tensor.to_dense()).cpu()


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.ndim
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Tensor) -> str:
    return f"{complex(value)}" if value.is_complex() else f"{number(value):.9g}"


def _scalar(value: Any) -> Tensor:
    return _plain(value) if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _word(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "nothing" if value is None else f"{value!r:.80}"


def leaves(value: Any, path: str = "", depth: int = 6) -> Iterator[tuple[str, Any]]:
    """What nested containers hold, each with its place.

    Example:
        >>> list(leaves({"images": [1, 2]}, "batch"))
        [("batch['images'][0]", 1), ("batch['images'][1]", 2)]
    """
    if isinstance(value, Mapping) and depth:
        for key, item in value.items():
            yield from leaves(item, f"{path}[{key!r}]", depth - 1)
    elif isinstance(value, list | tuple) and depth:
        for place, item in enumerate(value):
            yield from leaves(item, f"{path}[{place}]", depth - 1)
    elif depth and (attrs.has(type(value)) or dataclasses.is_dataclass(value)):
        fields: Any = attrs.fields(type(value)) if attrs.has(type(value)) else dataclasses.fields(value)
        for field in fields:
            yield from leaves(getattr(value, field.name, None), f"{path}.{field.name}", depth - 1)
    else:
        yield path, value
