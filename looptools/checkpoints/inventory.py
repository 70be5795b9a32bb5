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
from .around import surroundings

T = TypeVar("T")

Held = tuple[str, str, Any]  # recipe's prefix, the field's name, what it holds


@attrs.frozen(eq=False)
class Inventory:
    """Everything with a state, by name.

    Models of phases are called ``"model"``, ``"model#2"`` and so on, those of training phases first; a module that a
    part has among its options has that option's name, as in ``"averaged"``. Of the rest, the first of a kind has the
    plain name, as in ``"optimizer"``.
    """

    modules: dict[str, Module]
    optimizers: dict[str, Optimizer]
    scalers: dict[str, GradScaler]
    schedulers: dict[str, LRScheduler]


def inventory(cursor: Cursor) -> Inventory:
    """Go through phases and parts, and list by identity what they hold.

    The user's own parts and steps are looked into as well: attributes of plain classes, and what functions use from
    around them. Of these an optimizer, scaler or scheduler counts, and a module if an optimizer moves its parameters.
    """
    held = [found for slot in cursor.slots for found in _options(slot.name, slot.part)]
    around = [found for slot in cursor.slots for found in surroundings(slot.name, slot.part)]
    phases = cursor.passes.agenda.phases
    trained = [("", "model", phase.model) for phase in phases if phase.trains]
    others = [("", "model", phase.model) for phase in phases if not phase.trains]
    everything = [*held, *around]
    optimizers = [(p, one) for p, _, value in everything for one in (value if isinstance(value, tuple) else (value,))]
    moved = {
        id(parameter)
        for _, one in optimizers
        if isinstance(one, Optimizer)
        for group in one.param_groups
        for parameter in group["params"]
    }
    in_order = [*trained, *held, *others]  # the first to hold a thing names it
    modules = [(prefix + word, module) for prefix, word, value in in_order for module in _modules(value)]
    known = {id(parameter) for _, module in modules for parameter in module.parameters()}
    moved -= known
    found = ((prefix + word, module) for prefix, word, value in around for module in _modules(value))
    modules += [(word, module) for word, module in found if any(id(p) in moved for p in module.parameters())]
    return Inventory(
        _named(modules, Module),
        _named([(f"{prefix}optimizer", one) for prefix, one in optimizers], Optimizer),
        _named([(f"{prefix}scaler", value) for prefix, _, value in everything], GradScaler),
        _named([(f"{prefix}scheduler", value) for prefix, _, value in everything], LRScheduler),
    )


def _options(name: str, part: Any) -> Iterator[Held]:
    """The options of the part called *name*."""
    kind: Any = type(part)
    if attrs.has(kind):
        for field in attrs.fields(kind):
            if field.init:
                yield _prefix(name), field.name.lstrip("_"), getattr(part, field.name, None)


def _prefix(name: str) -> str:
    recipe = name.rpartition("/")[2].rpartition(".")[0]
    return f"{recipe}." if recipe else ""


def _modules(value: Any) -> Iterator[Module]:
    """A module, or those in a list, tuple or dictionary."""
    if isinstance(value, Module):
        yield value
    elif isinstance(value, Mapping):
        yield from (v for v in value.values() if isinstance(v, Module))
    elif isinstance(value, list | tuple):
        yield from (v for v in value if isinstance(v, Module))


def _named(held: Iterable[tuple[str, Any]], kind: type[T]) -> dict[str, T]:
    unique: dict[int, tuple[str, T]] = {}
    for word, value in held:
        if isinstance(value, kind):
            unique.setdefault(id(value), (word, value))
    names = numbered(word for word, _ in unique.values())
    return {name: value for name, (_, value) in zip(names, unique.values(), strict=True)}


def only(things: Mapping[str, T]) -> Any:
    """The one of *things*, None if there is none, all of them by name if there are several."""
    return dict(things) if len(things) > 1 else next(iter(things.values()), None)


def parameter_names(found: Inventory) -> dict[str, list[list[str]]]:
    """The names of what each optimizer moves, group by group: a file that has them in another order is another's."""
    names: dict[int, str] = {}
    for word, module in found.modules.items():
        for name, parameter in module.named_parameters():
            names.setdefault(id(parameter), f"{word}.{name}")
    return {
        word: [[names.get(id(parameter), "") for parameter in group["params"]] for group in optimizer.param_groups]
        for word, optimizer in found.optimizers.items()
    }


def require_owners(cursor: Cursor, who: str = "workflow") -> None:
    """See that every parameter that an optimizer moves belongs to a model of the run, so that it can be saved.

    Args:
        cursor: The run's machine.
        who: What the user has called.

    Raises:
        ValueError: If one does not.
    """
    found = inventory(cursor)
    owned = {id(parameter) for module in found.modules.values() for parameter in module.parameters()}
    for name, optimizer in found.optimizers.items():
        shapes = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"] if id(p) not in owned]
        if shapes:
            raise ValueError(
                f"{who}: {name} ({type(optimizer).__name__}) moves {len(shapes)} parameters that no model of the "
                f"run holds, the first of shape {shapes[0]}; they could not be saved. Was the model made "
                "anew since the optimizer was? Or give the phase a model that has them: torch.nn.ModuleList([model, "
                "other]), torch.nn.ParameterList([tensor])."
            )
