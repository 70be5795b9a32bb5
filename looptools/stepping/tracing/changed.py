"""What a part has changed on a state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from torch import Tensor

from ...state import State

FACTS = {"phase", "trains", "epoch", "index", "iteration", "first", "plan", "run", "replayed", "forwarded"}
FACTS |= {"last", "round_last"}  # asking for them would fetch a batch
FIELDS = [field.name for field in attrs.fields(State) if field.name not in FACTS]
OPEN = ("metrics", "gauges", "results")  # by key
PLAIN = (str, int, float, bool, type(None))


def look(state: State | None, results: Mapping[str, float]) -> dict[str, tuple[Any, Any]]:
    """Remember a state's fields as they are: what each holds, and how often its tensors have been written to."""
    fields = {name: getattr(state, name) for name in FIELDS} if state is not None else {}
    seen: dict[str, tuple[Any, Any]] = {}
    for name, value in {**fields, "results": results}.items():
        if name in OPEN:
            seen.update({f"{name}[{key}]": (each, _written(each)) for key, each in value.items()})
        elif name == "windows":
            seen[name] = (None, [(id(optimizer), window) for optimizer, window in value.items()])
        else:
            seen[name] = (value, _written(value))
    return seen


def changes(before: Mapping[str, tuple[Any, Any]], after: Mapping[str, tuple[Any, Any]]) -> tuple[str, ...]:
    """The fields that are others now: ``loss``, ``metrics[loss, accuracy]``, ``batch (in place)``.

    Example:
        >>> state = State(phase="train")
        >>> before = look(state, {})
        >>> state.loss, state.metrics["loss"], state.metrics["accuracy"] = torch.ones(()), 1.0, 0.5
        >>> changes(before, look(state, {}))
        ('loss', 'metrics[loss, accuracy]')
    """
    found: dict[str, list[str]] = {}
    for name, (value, written) in after.items():
        old, old_written = before.get(name, (MISSING, None))
        if not _same(old, value):
            _add(found, name, "")
        elif written != old_written:
            _add(found, name, "" if name == "windows" else " (in place)")
    for name in before.keys() - after.keys():
        _add(found, name, " (taken away)")
    return tuple(f"{name}[{', '.join(keys)}]" if keys else name for name, keys in found.items())


MISSING: Any = object()


def _add(found: dict[str, list[str]], name: str, how: str) -> None:
    field, bracket, key = name.partition("[")
    if bracket:
        found.setdefault(field, []).append(key[:-1] + how)
    else:
        found[field + how] = []


def _same(old: Any, new: Any) -> bool:
    return old is new or (type(old) is type(new) and isinstance(new, PLAIN) and bool(old == new))


def _written(value: Any, depth: int = 3) -> Any:
    """How often the tensors in it have been written to."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    if depth and isinstance(value, Mapping):
        return [_written(each, depth - 1) for each in value.values()]
    if depth and isinstance(value, tuple | list) and len(value) < 1000:
        return [_written(each, depth - 1) for each in value]
    return None
