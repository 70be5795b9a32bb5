"""What a run does and holds, as short texts that are equal only if the bits are."""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from ..checkpoints.tree import capture
from ..generators import get_generators
from ..means import number
from ..state import State

if TYPE_CHECKING:
    from ..run import Run

CLOCKS = {"seconds", "data_time", "iter_time", "samples_per_s", "eta", "memory_mb", "began", "marks"}
FACTS = ("phase", "trains", "epoch", "index", "iteration", "first", "last", "round_last", "num_samples")
OUTSIDE = {"format", "torch", "run", "border", "pipe", "lookers", "options", "workflow", "bounds", "fingerprint"}
OUTSIDE |= {"kinds", "parameters"}  # of a checkpoint's tree: what says whose it is
SHORT = 60  # characters: what is longer is shown as its checksum

Leaves = dict[str, str]


def digest(value: Any) -> str:
    """A short text for *value*: the value itself if it is short, else a checksum of all its bits.

    Example:
        >>> digest(torch.tensor(0.5)), digest([1, "two"])
        ('0.5', "[1, 'two']")
        >>> digest(torch.zeros(3)) == digest(torch.zeros(3)), digest(torch.zeros(3)) == digest(-torch.zeros(3))
        (True, False)
    """
    if isinstance(value, Tensor):
        return _of_tensor(value)
    text = value if isinstance(value, str) else _spelled(value, 0)
    return (
        text if len(text) <= SHORT else f"#{hashlib.blake2b(text.encode(errors='replace'), digest_size=8).hexdigest()}"
    )


def _of_tensor(tensor: Tensor) -> str:
    tensor = tensor.detach()
    if tensor.numel() == 1 and not tensor.is_complex() and tensor.layout is torch.strided:
        value = number(tensor)
        if math.isfinite(value):
            return f"{math.copysign(0.0, value)!r}" if value == 0.0 else f"{value!r}"
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    words = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=8)
    size = tensor.numel() * tensor.element_size()
    if size:
        words.update((ctypes.c_char * size).from_address(tensor.data_ptr()))
    return f"#{words.hexdigest()}"


def _spelled(value: Any, depth: int) -> str:
    """Everything in *value*, spelled out; of objects that are not known, their attributes."""
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_spelled(item, depth + 1)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_spelled(item, depth + 1) for item in value) + "]"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(_spelled(item, depth + 1) for item in value)) + "}"
    if value is None or isinstance(value, str | int | float | complex | bytes | torch.dtype | torch.device):
        return repr(value)
    if hasattr(value, "tobytes"):  # an array of NumPy's, an image
        data = hashlib.blake2b(value.tobytes(), digest_size=8).hexdigest()
        return f"{getattr(value, 'shape', getattr(value, 'size', ''))} {data}"
    held = _attributes(value) if depth < 8 else {}
    return f"{type(value).__qualname__}{_spelled(held, depth + 1) if held else ''}"


def _attributes(value: Any) -> dict[str, Any]:
    if attrs.has(type(value)):
        return {field.name: getattr(value, field.name, None) for field in attrs.fields(type(value))}
    return dict(getattr(value, "__dict__", {}))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Each value of a tree with its place; a list of plain numbers is one value."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, f"{path}/{key}" if path else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Tensor | Mapping | list | tuple) for item in value):
        for key, item in enumerate(value):
            yield from leaves(item, f"{path}/{key}" if path else str(key))
    else:
        yield path, digest(value)


def of_state(state: State) -> Leaves:
    """What a state tells, its batch and its loss first."""
    told = {"batch": state.batch, **{name: getattr(state, name) for name in FACTS}, "lr": state.lr, "loss": state.loss}
    told |= {"metrics": dict(state.metrics), "gauges": dict(state.gauges)}
    told |= {"grad_norm": state.grad_norm, "updates": state.updates}
    return {path: digest(value) for key, item in told.items() for path, value in _one(key, item)}


def _one(key: str, item: Any) -> Iterable[tuple[str, str]]:
    return leaves(item, key) if key in ("metrics", "gauges") and item else [(key, digest(item))]


def of_run(run: Run) -> Leaves:
    """All that a checkpoint would hold, generators first; of the data's place only what is drawn from."""
    tree = {key: value for key, value in capture(run).items() if key not in OUTSIDE}
    told, sources = of_generators(tree.pop("generators")), tree.pop("sources")
    for name, source in sources.items():
        told |= {f"sources/{name}/{path}": digest(own) for path, own in source["own"].items()}
    return told | dict(leaves(tree))


def of_generators(states: dict[str, Any] | None = None) -> Leaves:
    """The states of the process's random generators, as `get_generators` gives them."""
    states = dict(get_generators() if states is None else states)
    cuda = dict(enumerate(states.pop("cuda", [])))
    told = {f"generators/{name}": digest(value) for name, value in states.items()}
    return told | {f"generators/cuda/{number}": digest(value) for number, value in cuda.items()}


def without(told: Mapping[str, str], names: Collection[str]) -> Leaves:
    """All but what has one of *names* in its place: clocks, and how far a log has written."""
    return {path: value for path, value in told.items() if names.isdisjoint(path.split("/"))}  # type: ignore[attr-defined]
