"""The options of a part, and the source of a phase, as they were given."""

from __future__ import annotations

import re
from typing import Any

import attrs

MOST = 200  # characters of one option


def given(part: Any) -> str:
    """Show the options that were given, long ones cut; those at their default go without saying.

    Example:
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(()))], lr=0.1)
        >>> given(lt.backward(sgd, accumulate=4)), given(print)
        ('optimizer=SGD, accumulate=4', '')
    """
    kind: Any = type(part)
    if not attrs.has(kind):
        return ""
    shown = []
    for field in attrs.fields(kind):
        if field.init and field.repr is not False and not _is_default(field, getattr(part, field.name)):
            show = field.repr if callable(field.repr) else repr
            shown.append(f"{field.name}={_shown(show, getattr(part, field.name))}")
    return re.sub(r" at 0x[0-9a-fA-F]+", "", ", ".join(shown))  # a reader can do nothing with an address


def source_of(phase: Any, length: int | None) -> str:
    """A phase's source: its kind, its length where that is known, and where its batches are moved to.

    Example:
        >>> phase = lt.validate(None, [1, 2, 3], lambda model, batch: batch).limit(2)
        >>> source_of(phase, 3)
        'list, 2 batches'
    """
    if length is not None and phase.max_batches is not None:
        length = min(length, phase.max_batches)
    batches = "length unknown" if length is None else "1 batch" if length == 1 else f"{length} batches"
    where = "" if phase.device is None else f", to device {phase.device!r}"
    return f"{type(phase.source).__name__}, {batches}{where}"


def _shown(show: Any, value: Any) -> str:
    try:
        shown = str(show(value))
    except Exception:  # the user's own repr, which must not keep the rest from being seen
        shown = f"<{type(value).__name__}>"
    return shown if len(shown) <= MOST else f"{shown[:MOST]}..."


def _is_default(field: Any, value: Any) -> bool:
    """Whether an option is as if it had not been given; if its default cannot be had without the part, it is not."""
    try:
        return _equals_default(field, value)
    except Exception:  # a factory or converter that asks for the part, or fails
        return False


def _equals_default(field: Any, value: Any) -> bool:
    default = field.default
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        default = default.factory()
    if default is not attrs.NOTHING and field.converter is not None:
        default = field.converter(default)
    if attrs.has(type(value)):
        return type(value) is type(default) and repr(value) == repr(default)
    return value is default or (isinstance(value, str | int | float) and value == default)
