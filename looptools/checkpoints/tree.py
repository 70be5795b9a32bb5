"""The state tree of a run: everything that must come back, in plain values and tensors."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from ..agenda import Place
from ..cursor import Cursor
from ..generators import get_generators, set_generators
from .identity import identity, resume_identity
from .inventory import inventory

if TYPE_CHECKING:
    from ..run import Run

FORMAT = 1
PLAIN = {str, int, float, bool, type(None), torch.Size, torch.dtype, torch.device}
CONTAINERS = {dict, OrderedDict, Counter, list, tuple, set}


def capture(run: Run, *, border: bool, best: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """The run's state at a boundary. Tensors are not copied.

    Args:
        run: The run.
        border: Whether a pass ends here.
        best: What ``run.best`` will be once this is saved; None for what it is.

    Raises:
        TypeError: If something in it could not be loaded again, by name of its part and field.
    """
    cursor = run.cursor
    found = inventory(cursor)
    progress = attrs.asdict(cursor.progress, filter=lambda field, _: field.name != "updates")
    progress["seconds"] = cursor.seconds
    progress["updates"] = {name: cursor.progress.updates.get(o, 0) for name, o in found.optimizers.items()}
    tree = {
        "format": FORMAT,
        "torch": str(torch.__version__),
        "run": attrs.asdict(identity(cursor)),
        "border": border,
        "stopping": cursor.stopping,
        "pipe": pipe_names(cursor),
        "progress": progress,
        "place": [cursor.passes.place.entry, cursor.passes.place.done],
        "results": dict(run.results),
        "history": [dict(row) for row in run.history],
        "best": {metric: dict(facts) for metric, facts in (run.best if best is None else best).items()},
        "parts": {slot.name: memory(slot.part) for slot in cursor.slots},
        "sources": {cursor.passes.names[key]: source.state_dict() for key, source in cursor.passes.sources.items()},
        "generators": get_generators(),
    }
    for kind, things in _stateful(cursor).items():
        tree[kind] = {name: thing.state_dict() for name, thing in things.items()}
    require_plain(tree, "checkpoint")
    return tree


def restore(run: Run, tree: dict[str, Any]) -> None:
    """Put the run where `capture` was called. Everything is looked at before anything is changed.

    Raises:
        RuntimeError: If the tree belongs to another pipe or other models.
    """
    cursor = run.cursor
    problems = list(differences(cursor, tree))
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise RuntimeError(
            f"resume: the checkpoint does not fit this run. Nothing was changed. They differ in:\n{listed}"
        )
    for kind, things in _stateful(cursor).items():
        for name, thing in things.items():
            thing.load_state_dict(tree[kind][name])
    progress = dict(tree["progress"])
    updates = progress.pop("updates")
    for name, value in progress.items():
        setattr(cursor.progress, name, value)
    cursor.began = cursor.progress.seconds  # else what is due every n seconds would be due at once
    optimizers = inventory(cursor).optimizers
    cursor.progress.updates = {optimizers[name]: n for name, n in updates.items() if n}
    cursor.stopping = tree["stopping"]  # a run that was stopped stays so, until it is extended
    cursor.passes.place = Place(*tree["place"])
    run.results.clear()
    run.results.update(tree["results"])
    run.history, run.best = list(tree["history"]), dict(tree["best"])
    for slot in cursor.slots:
        remember(slot.part, tree["parts"][slot.name])
    for key, source in cursor.passes.sources.items():
        source.load_state_dict(tree["sources"][cursor.passes.names[key]])
    resume_identity(cursor, tree)
    set_generators(tree["generators"])


def pipe_names(cursor: Cursor) -> list[str]:
    """The names of all parts, in order."""
    return [slot.name for slot in cursor.slots]


def _stateful(cursor: Cursor) -> dict[str, dict[str, Any]]:
    found = inventory(cursor)
    return {
        "models": dict(found.modules),
        "optimizers": dict(found.optimizers),
        "scalers": dict(found.scalers),
        "schedulers": dict(found.schedulers),
    }


def differences(cursor: Cursor, tree: dict[str, Any]) -> list[str]:
    """What keeps *tree* from being loaded, in words."""
    found = []
    if tree["pipe"] != pipe_names(cursor):
        found.append(f"the pipe: {_pipe_differences(tree['pipe'], pipe_names(cursor))}")
    for kind, things in _stateful(cursor).items():
        if sorted(things) != sorted(tree[kind]):
            found.append(f"{kind}: saved {', '.join(tree[kind]) or 'none'}; here {', '.join(things) or 'none'}")
        elif kind == "models":
            for name, module in things.items():
                found += _model_differences(name, module.state_dict(), tree[kind][name])
        elif kind == "optimizers":
            for name, optimizer in things.items():
                here = [len(group["params"]) for group in optimizer.param_groups]
                saved = [len(group["params"]) for group in tree[kind][name]["param_groups"]]
                if here != saved:
                    found.append(f"{name}: parameters in its groups: saved {saved}; here {here}")
    return found


def _pipe_differences(saved: list[str], here: list[str]) -> str:
    lost, new = [name for name in saved if name not in here], [name for name in here if name not in saved]
    both = [("in the file only ", lost), ("here only ", new)]
    words = [word + ", ".join(names) for word, names in both if names]
    return "; ".join(words) or f"the order: saved {', '.join(saved)}; here {', '.join(here)}"


def _model_differences(name: str, here: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    found = [f"{name}: {key} is in the file only" for key in saved if key not in here]
    found += [f"{name}: {key} is not in the file" for key in here if key not in saved]
    for key in here:
        shapes = [tuple(values[key].shape) for values in (saved, here) if isinstance(values.get(key), Tensor)]
        if len(shapes) == 2 and shapes[0] != shapes[1]:
            found.append(f"{name}: {key} has shape {shapes[0]} in the file, {shapes[1]} here")
    return found


def memory(part: Any) -> dict[str, Any]:
    """What a part remembers: its ``state_dict()``, or its fields that are not options and have no underscore."""
    if hasattr(part, "state_dict"):
        return dict(part.state_dict())
    if not attrs.has(type(part)):
        return {}
    fields = [field.name for field in attrs.fields(type(part)) if not field.init and not field.name.startswith("_")]
    values = {name: getattr(part, name) for name in fields}
    return {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in values.items()}


def remember(part: Any, values: dict[str, Any]) -> None:
    """Give a part back what `memory` gave."""
    if hasattr(part, "load_state_dict"):
        part.load_state_dict(values)
        return
    for name, value in values.items():
        held: Any = getattr(part, name, None)
        if hasattr(held, "load_state_dict"):
            held.load_state_dict(value)
        else:
            setattr(part, name, value)


def require_plain(value: Any, where: str) -> None:
    """Refuse what ``torch.load(weights_only=True)`` would not load.

    Raises:
        TypeError: With the place of the value.
    """
    if isinstance(value, Tensor) or type(value) in PLAIN:
        return
    if type(value) not in CONTAINERS:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(
            f"{where} is a {kind}, which could not be loaded safely. Keep plain numbers, strings, lists, dictionaries "
            "and tensors, or begin the field's name with _ if it need not be saved."
        )
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str | int | float | bool | tuple):
                raise TypeError(f"{where}: the key {key!r} cannot be saved; keys must be strings or numbers.")
            require_plain(item, f"{where}/{key}")
    else:
        for number, item in enumerate(value):
            require_plain(item, f"{where}[{number}]")
