"""What a run holds that has a state: models, optimizers, scalers, schedulers, each once, by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import attrs
from torch.amp.grad_scaler import GradScaler
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..cursor import Cursor
from ..pipeline import numbered

T = TypeVar("T")


@attrs.frozen(eq=False)
class Inventory:
    """Everything with a state, by name. The first of a kind has the plain name, as in ``"model"``."""

    modules: dict[str, Module]
    optimizers: dict[str, Optimizer]
    scalers: dict[str, GradScaler]
    schedulers: dict[str, LRScheduler]


def inventory(cursor: Cursor) -> Inventory:
    """Go through phases and parts, and list by identity what they hold."""
    held = [("", phase.model) for phase in cursor.passes.agenda.phases]
    for slot in cursor.slots:
        recipe = slot.name.rpartition("/")[2].rpartition(".")[0]
        kind: Any = type(slot.part)
        if attrs.has(kind):
            values = (getattr(slot.part, field.name, None) for field in attrs.fields(kind) if field.init)
            held += [(f"{recipe}." if recipe else "", value) for value in values]
    modules = [(prefix, module) for prefix, value in held for module in _modules(value)]
    return Inventory(
        _named(modules, "model", Module),
        _named(held, "optimizer", Optimizer),
        _named(held, "scaler", GradScaler),
        _named(held, "scheduler", LRScheduler),
    )


def _modules(value: Any) -> Iterator[Module]:
    """A module, or those in a list, tuple or dictionary."""
    if isinstance(value, Module):
        yield value
    elif isinstance(value, Mapping):
        yield from (v for v in value.values() if isinstance(v, Module))
    elif isinstance(value, list | tuple):
        yield from (v for v in value if isinstance(v, Module))


def _named(held: Iterable[tuple[str, Any]], word: str, kind: type[T]) -> dict[str, T]:
    unique = {id(value): (prefix, value) for prefix, value in reversed(list(held)) if isinstance(value, kind)}
    in_order = list(reversed(unique.values()))
    names = numbered(prefix + word for prefix, _ in in_order)
    return {name: value for name, (_, value) in zip(names, in_order, strict=True)}


def only(things: Mapping[str, T]) -> Any:
    """The one of *things*, None if there is none, all of them by name if there are several."""
    return dict(things) if len(things) > 1 else next(iter(things.values()), None)


def require_owners(cursor: Cursor) -> None:
    """See that every parameter that an optimizer moves belongs to a model of the run, so that it can be saved.

    Raises:
        ValueError: If one does not.
    """
    found = inventory(cursor)
    owned = {id(parameter) for module in found.modules.values() for parameter in module.parameters()}
    for name, optimizer in found.optimizers.items():
        shapes = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"] if id(p) not in owned]
        if shapes:
            raise ValueError(
                f"workflow: {name} ({type(optimizer).__name__}) moves {len(shapes)} parameters that no model of the "
                f"run holds, the first of shape {shapes[0]}; they could not be saved. Give the phase a model that has "
                "them: torch.nn.ModuleList([model, other]), torch.nn.ParameterList([tensor])."
            )
