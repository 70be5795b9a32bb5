"""Whether a checkpoint fits the run that is to go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..cursor import Cursor
from .fingerprint import Difference, differences, fingerprint, workflow
from .inventory import inventory, parameter_names


def stateful(cursor: Cursor) -> dict[str, dict[str, Any]]:
    """All that is loaded by its own ``load_state_dict``, by kind and name."""
    found = inventory(cursor)
    return {
        "models": dict(found.modules),
        "optimizers": dict(found.optimizers),
        "scalers": dict(found.scalers),
        "schedulers": dict(found.schedulers),
    }


def kinds(held: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """The class of everything but models."""
    return {
        kind: {name: type(thing).__name__ for name, thing in things.items()}
        for kind, things in held.items()
        if kind != "models"
    }


def misfits(cursor: Cursor, tree: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What cannot be given its state from *tree*, by kind and name, and why."""
    found = inventory(cursor)
    here = kinds(stateful(cursor))
    then = tree.get("kinds", here)
    unfit: dict[str, dict[str, str]] = {kind: {} for kind in here}
    for kind, things in here.items():
        for name, word in things.items():
            if name in tree[kind] and then[kind].get(name, word) != word:
                unfit[kind][name] = f"{name}: saved {then[kind][name]}, here {word}"
    names, parameters = parameter_names(found), tree.get("parameters", {})
    for name, optimizer in found.optimizers.items():
        if name not in tree["optimizers"] or name in unfit["optimizers"]:
            continue
        counts = [
            [len(group["params"]) for group in groups]
            for groups in (tree["optimizers"][name]["param_groups"], optimizer.param_groups)
        ]
        if counts[0] != counts[1]:
            unfit["optimizers"][name] = f"{name}: parameters in its groups: saved {counts[0]}; here {counts[1]}"
        elif parameters.get(name, names[name]) != names[name]:
            unfit["optimizers"][name] = (
                f"{name}: its parameters, or their order: {_first_other(parameters[name], names[name])}"
            )
    return unfit


def _first_other(saved: list[list[str]], here: list[list[str]]) -> str:
    pairs = [pair for groups in zip(saved, here, strict=True) for pair in zip(*groups, strict=True)]
    return "saved {}, here {}".format(*next(pair for pair in pairs if pair[0] != pair[1]))


def obstacles(cursor: Cursor, tree: Mapping[str, Any]) -> list[Difference]:
    """What keeps *tree* from being loaded as it is."""
    found = differences(cursor, tree)
    for kind, things in stateful(cursor).items():
        if sorted(things) != sorted(tree[kind]):
            text = f"{kind}: saved {', '.join(tree[kind]) or 'none'}; here {', '.join(things) or 'none'}"
            found.append(Difference(text, "pipe"))
        if kind == "models":
            for name in things.keys() & tree[kind].keys():
                found += map(Difference, _model_differences(name, things[name].state_dict(), tree[kind][name]))
    found += [Difference(text, "pipe") for texts in misfits(cursor, tree).values() for text in texts.values()]
    where = tree.get("pass")
    if where is not None:
        found += _pass_differences(cursor, tree, where)
    return found


def _pass_differences(cursor: Cursor, tree: Mapping[str, Any], where: Mapping[str, Any]) -> list[Difference]:
    """What keeps the pass under way from being gone on with."""
    names = {name: key for key, name in cursor.passes.names.items()}
    if where["phase"] not in names or where["phase"] not in [entry[0] for entry in workflow(cursor)]:
        return [Difference(f"it was saved within a pass of {where['phase']}, which this run does not have")]
    entry = next(entry for entry in workflow(cursor) if entry[0] == where["phase"])
    length, index = cursor.passes.lengths[names[where["phase"]]], index_here(cursor, tree, where)
    if length is None or index < length or entry[2] is not None:
        return []
    return [Difference(f"{index} batches of the pass of {where['phase']} were done, it has {length} here")]


def batch_sizes(cursor: Cursor, tree: Mapping[str, Any], where: Mapping[str, Any]) -> tuple[int, int] | None:
    """That of the pass under way when it was saved, and that it has here, if they differ."""
    name = where["phase"]
    then = tree.get("fingerprint", {}).get("sources", {}).get(name, {}).get("batch_size")
    now = fingerprint(cursor)["sources"][name]["batch_size"]
    return (then, now) if then and now and then != now else None


def index_here(cursor: Cursor, tree: Mapping[str, Any], where: Mapping[str, Any]) -> int:
    """Batches of the pass that are done; with another batch size as many as have the same samples."""
    sizes = batch_sizes(cursor, tree, where)
    index: int = where["index"]
    return index if sizes is None else index * sizes[0] // sizes[1]


def _model_differences(name: str, here: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    found = [f"{name}: {key} is in the file only" for key in saved if key not in here]
    found += [f"{name}: {key} is not in the file" for key in here if key not in saved]
    for key in here:
        shapes = [tuple(values[key].shape) for values in (saved, here) if isinstance(values.get(key), Tensor)]
        if len(shapes) == 2 and shapes[0] != shapes[1]:
            found.append(f"{name}: {key} has shape {shapes[0]} in the file, {shapes[1]} here")
    return found
