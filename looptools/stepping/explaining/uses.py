"""What each part of a pipe reads and writes on the state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import attrs

from ... import intervals
from ...links import Slot
from ...middleware.forward import forward
from ...order import kind
from .fields import FIELDS, MAPPINGS, Uses
from .reader import STATE, STREAM, read
from .returned_keys import returned_keys
from .source_code import parameters, python_function

MOST_KEYS = 6  # of one mapping that are shown
ASKED = ("every", "when", "until", "weigh", "inputs")  # options that may be functions of the state


def uses_of(slot: Slot) -> Uses:
    """What a part reads and writes: looptools' own as `OURS` says, the user's as its source does.

    Functions of the state among the options of either are looked into as well.
    """
    part, own = slot.part, kind(slot)
    found = OURS[own](part) if own in OURS else read(part, {0: STREAM})
    for option in ASKED if own else ():
        given = getattr(part, option, None)
        if isinstance(given, intervals.samples):
            found.add(Uses(reads=["num_samples"]))
        elif callable(given) and not type(given).__module__.startswith(intervals.__name__):
            found.add(read(given, {0: STATE}))
    return found


# Looptools' own. tests/stepping/test_uses.py compares these with what they really read and write.


def _forward(part: forward) -> Uses:
    found = Uses(reads=["batch"])
    keys, complete = returned_keys(part.step)
    function, _, bound = python_function(part.step)
    if function is not None and parameters(function)[bound + 2 : bound + 3] == ["state"]:
        found.add(read(part.step, {2: STATE}))
    has_loss = ["loss"] if "loss" in keys or not complete else []
    if not complete or "log_vars" in keys:
        written = [*(f"outputs[{key}]" for key in keys), *([] if complete else ["outputs"]), "metrics"]
    else:
        written = [f"outputs[{key}]" for key in keys] + [f"metrics[{key}]" for key in keys if key != "num_samples"]
    return found.add(Uses(writes=[*written, *has_loss, "num_samples"]))


def _backward(part: Any) -> Uses:
    reads = ["loss", *(["num_samples"] if part.weigh == "samples" else [])]
    return Uses(reads=reads, needs=["loss"], writes=["updates", "windows"])


def _update(part: Any) -> Uses:
    writes = ["lr", "windows", *(["updates"] if part.scaler is not None else [])]
    return Uses(reads=["updates", "windows"], writes=writes)


def _update_by_closure(part: Any) -> Uses:
    writes = ["lr", "updates", *(["grad_norm"] if part.max_norm is not None else [])]
    return Uses(reads=["loss", "batch"], needs=["loss"], writes=writes)


def _schedule(part: Any) -> Uses:
    return Uses(writes=[f"gauges[{part._gauge}]" if part._gauge else "lr"])


def _measure(part: Any) -> Uses:
    named = [f"gauges[{name}]" for name, _ in part.metrics if name]  # one that gives a mapping brings its own keys
    return Uses(reads=["metrics", "gauges"], writes=[*named, "gauges"])


def _nan_guard(part: Any) -> Uses:
    return Uses(reads=["loss", *(["grad_norm"] if part._behind else [])])


def _watch(part: Any) -> Uses:
    return Uses(reads=["updates"] if part.gradients else [], writes=["metrics"])


def _timer(part: Any) -> Uses:
    metrics = ["metrics[data_time]", "metrics[iter_time]"]
    return Uses(reads=["num_samples"], writes=[*metrics, "gauges[samples_per_s]", "gauges[eta]"])


def _nothing(part: Any) -> Uses:
    return Uses()


def _turn(part: Any) -> Uses:
    """Whether its gradients are due."""
    return Uses(reads=["updates", "windows"])


OURS: dict[str, Callable[[Any], Uses]] = {
    "average": lambda part: Uses(reads=["num_samples", "metrics", "gauges"]),
    "backward": _backward,
    "checkpoint": _nothing,
    "clip_grad_norm": lambda part: _turn(part).add(Uses(writes=["grad_norm"])),
    "clip_grad_value": _turn,
    "early_stop": _nothing,
    "ema": lambda part: Uses(reads=["updates"] if part.by == "update" else []),
    "forward": _forward,
    "freeze": _nothing,
    "grad_noise": _turn,
    "leak_guard": _nothing,
    "log": lambda part: Uses(reads=["num_samples", "metrics", "gauges", "lr", "grad_norm"]),
    "measure": _measure,
    "memory": lambda part: Uses(writes=["gauges[memory_mb]"]),
    "nan_guard": _nan_guard,
    "profile": _nothing,
    "schedule": _schedule,
    "stop_after": _nothing,
    "swa": _nothing,
    "timer": _timer,
    "unused_params": _nothing,
    "update": _update,
    "update_by_closure": _update_by_closure,
    "watch": _watch,
}


# In words


def shown(uses: Uses, slot: Slot | None = None) -> str:
    """In one line, as in ``loss -> updates, windows``; empty for a part that does nothing to the state.

    Example:
        >>> shown(Uses(reads=["metrics[b]", "metrics[a]"], writes=["lr"])), shown(Uses(unseen=True))
        ('metrics[b, a] -> lr', 'what it does cannot be seen')
    """
    if slot is not None and isinstance(slot.part, forward):  # which of the outputs are scalars cannot be seen
        written = ["metrics" if item.startswith("metrics[") else item for item in uses.writes]
        uses = attrs.evolve(uses, writes=written)
    reads, writes = _listed(uses.reads), _listed(uses.writes)
    if not reads and not writes:
        return "what it does cannot be seen" if uses.unseen else ""
    return f"{reads} -> {writes}".strip() + (", and what cannot be seen" if uses.unseen else "")


def _listed(items: Iterable[str]) -> str:
    words = []
    for field in FIELDS:
        keys = [item[len(field) + 1 : -1] for item in items if item.startswith(f"{field}[")]
        more = ["..."] if len(keys) > MOST_KEYS or (keys and field in items) else []
        if keys and field in MAPPINGS:
            words.append(f"{field}[{', '.join([*keys[:MOST_KEYS], *more])}]")
        elif field in items:
            words.append(field)
    return ", ".join(words)


@attrs.frozen
class Use:
    """One part in its place, with what it does."""

    slot: Slot
    uses: Uses

    def writes(self, item: str) -> bool:
        """Whether it writes an item, or may: one of a mapping whose keys are not known."""
        field = item.partition("[")[0]
        return item in self.uses.writes or (item != field and field in self.uses.writes)
