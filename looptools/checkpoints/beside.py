"""What moves a model beside the parts that are known to: gradients and optimizers that nobody else would save."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor
from torch.optim import Optimizer

from ..cursor import Cursor
from ..gradients import optimizers_of, parameters_of
from ..middleware.backward import backward
from ..middleware.update import update
from ..middleware.update_by_closure import update_by_closure
from ..warn import warn
from .inventory import Inventory

ASK = 3  # times: going through all objects of a process takes some 50 ms
_ASKED: WeakKeyDictionary[Cursor, int] = WeakKeyDictionary()
_TOLD: WeakSet[Optimizer] = WeakSet()


def loose_gradients(cursor: Cursor, found: Inventory) -> dict[str, dict[str, Tensor]]:
    """Gradients that no `backward` keeps, by model and name: a part or step of the user's own may add to them still."""
    keepers = [slot.part for slot in cursor.slots if isinstance(slot.part, backward | update_by_closure)]
    kept = {id(parameter) for part in keepers for parameter in parameters_of(optimizers_of(part))}
    loose: dict[str, dict[str, Tensor]] = {}
    for word, module in found.modules.items():
        for name, parameter in module.named_parameters():
            if parameter.grad is not None and id(parameter) not in kept:
                kept.add(id(parameter))  # of a module within two models once
                loose.setdefault(word, {})[name] = parameter.grad
    return loose


def put_gradients(found: Inventory, gradients: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Put back what `loose_gradients` gave."""
    for word, module in found.modules.items():
        for name, parameter in module.named_parameters():
            saved = gradients.get(word, {}).get(name)
            if saved is not None:
                parameter.grad = saved.to(parameter.device)


def tell_of_optimizers(cursor: Cursor, found: Inventory) -> None:
    """Say once of each optimizer that moves a model of the run, but is held by none of its parts: it is not saved."""
    moved = [any(isinstance(s.part, update | update_by_closure) for s in line) for line in cursor.lines.values()]
    trains = [phase.trains for phase in cursor.passes.agenda.phases]
    if all(moves for moves, train in zip(moved, trains, strict=True) if train) or _ASKED.get(cursor, 0) == ASK:
        return
    _ASKED[cursor] = _ASKED.get(cursor, 0) + 1
    known = set(map(id, found.optimizers.values()))
    ours = {id(parameter): word for word, module in found.modules.items() for parameter in module.parameters()}
    for one in gc.get_objects():
        if issubclass(type(one), Optimizer) and id(one) not in known and one not in _TOLD and one.state:
            names = {ours[id(parameter)] for parameter in parameters_of([one]) if id(parameter) in ours}
            if names:
                _TOLD.add(one)
                kind: Any = type(one).__name__
                warn(
                    f"checkpoint: {kind} moves {', '.join(sorted(names))}, but no part of the run holds it, so its "
                    "state is not saved. Pipe lt.optimize(optimizer) on, or have a part of your own hold it."
                )
