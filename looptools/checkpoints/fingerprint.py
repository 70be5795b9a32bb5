"""What a checkpoint and the run that goes on from it must agree in."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import attrs
import torch
from torch.utils.data import DataLoader, IterableDataset

from ..cursor import Cursor
from ..data.sources import Source
from ..options import given
from ..pipeline import name_of
from .changes import by_hand, lacking
from .inventory import inventory

WORDS = ("data", "batch_size", "world_size", "seed", "pipe")  # what can be accepted
_SEEDS: WeakKeyDictionary[Cursor, int | None] = WeakKeyDictionary()


@attrs.frozen
class Difference:
    """What keeps a checkpoint from being gone on from.

    Args:
        text: In words.
        word: What accepts it; empty if nothing does.
    """

    text: str
    word: str = ""


def note_seed(cursor: Cursor) -> None:
    """Remember what torch was seeded with when the run was built; None if it never was, and drew its own."""
    seed = torch.initial_seed()
    _SEEDS[cursor] = seed if seed < 2**32 else None


def read_words(accept: str | Iterable[str]) -> tuple[str, ...]:
    """Read the option ``accept=``.

    Raises:
        ValueError: If a word is none of `WORDS`.
    """
    words = (accept,) if isinstance(accept, str) else tuple(accept)
    for word in words:
        if word not in WORDS:
            raise ValueError(f"resume: accept knows {', '.join(WORDS)}; got {word!r}.")
    return words


def fingerprint(cursor: Cursor) -> dict[str, Any]:
    """The data of each phase, how many processes share the work, and what torch was seeded with.

    The pipe's own names are kept beside it.
    """
    sources = {cursor.passes.names[key]: _facts(source) for key, source in cursor.passes.sources.items()}
    return {"sources": sources, "world_size": _world_size(), "seed": _SEEDS.get(cursor)}


def _world_size() -> int:
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if together else 1


def _facts(source: Source) -> dict[str, Any]:
    loader = source.given
    facts: dict[str, Any] = {"batches": source.length, "samples": None, "batch_size": None, "seed": None}
    if isinstance(loader, DataLoader):
        facts["batch_size"] = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        if not isinstance(loader.dataset, IterableDataset) and hasattr(loader.dataset, "__len__"):
            facts["samples"] = len(loader.dataset)
        facts |= getattr(loader.dataset, "facts", dict)() if hasattr(type(loader.dataset), "facts") else {}
    return facts


def workflow(cursor: Cursor) -> list[list[Any]]:
    """The workflow's entries: name, passes, and the batches of one where they are given."""
    names = cursor.passes.names
    return [[names.get(id(e.phase)) or name_of(e.phase), e.passes, e.batches] for e in cursor.passes.agenda.entries]


def bounds(cursor: Cursor) -> dict[str, int | None]:
    """How far the run goes."""
    agenda = cursor.passes.agenda
    return {name: getattr(agenda, name) for name in ("max_epochs", "max_iterations", "max_rounds")}


def pipe(cursor: Cursor) -> list[str]:
    """The names of all parts, in order."""
    return [slot.name for slot in cursor.slots]


def lookers(cursor: Cursor) -> list[str]:
    """Names of the parts that only look: with or without them, the training is the same."""
    return [slot.name for slot in cursor.slots if getattr(slot.part, "only_looks", False)]


def options(cursor: Cursor) -> dict[str, str]:
    """The options of all parts, as they were given."""
    return {slot.name: given(slot.part) for slot in cursor.slots}


def differences(cursor: Cursor, tree: Mapping[str, Any]) -> list[Difference]:
    """In what *tree* differs from the run, so that it would not go on as it would have."""
    looking = {*tree.get("lookers", ()), *lookers(cursor)}
    saved, here = ([name for name in names if name not in looking] for names in (tree["pipe"], pipe(cursor)))
    found = []
    if saved != here:
        found.append(Difference(f"the pipe: {_of_names(saved, here, tree)}", "pipe"))
    if tree.get("workflow", workflow(cursor)) != workflow(cursor):
        both = (", ".join(map(_entry, entries)) for entries in (tree["workflow"], workflow(cursor)))
        found.append(Difference("the workflow: saved {}; here {}".format(*both), "pipe"))
    return found + _of_fingerprints(tree.get("fingerprint", {}), fingerprint(cursor))


def _of_fingerprints(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[Difference]:
    found: list[Difference] = []
    for name, now in here["sources"].items():
        then = saved.get("sources", {}).get(name, {})
        sizes = _both(then, now, "batch_size")
        for key, word in (("samples", "data"), ("batches", "data"), ("batch_size", "batch_size"), ("seed", "seed")):
            both = _both(then, now, key)
            if both and not (key == "batches" and (sizes or any(d.text.startswith(f"{name}: sam") for d in found))):
                found.append(Difference(f"{name}: {key.replace('_', ' ')} {both[0]} saved, {both[1]} here", word))
    for key in ("world_size", "seed"):
        both = _both(saved, here, key)
        if both:
            found.append(Difference(f"the {key.replace('_', ' ')}: {both[0]} saved, {both[1]} here", key))
    return found


def _both(then: Mapping[str, Any], now: Mapping[str, Any], key: str) -> tuple[Any, Any] | None:
    """Two values that are known, and differ."""
    values = then.get(key), now.get(key)
    return values if None not in values and values[0] != values[1] else None


def _of_names(saved: list[str], here: list[str], tree: Mapping[str, Any]) -> str:
    lost, new = [name for name in saved if name not in here], [name for name in here if name not in saved]
    both = [("in the file only ", lost), ("here only ", new)]
    words = [word + ", ".join(name + by_hand(tree, name) for name in names) for word, names in both if names]
    return "; ".join(words) or f"the order: saved {', '.join(saved)}; here {', '.join(here)}"


def _entry(entry: list[Any]) -> str:
    name, passes, batches = entry
    return f"{name} x {passes}" if batches is None else f"{name} x {batches} batches"


def said(cursor: Cursor, tree: Mapping[str, Any], fresh: Container[str] = ()) -> list[str]:
    """What else has changed since *tree* was saved: versions, options, the horizon.

    Args:
        cursor: The run's machine.
        tree: What was saved.
        fresh: Names of what begins afresh.
    """
    looking, now = set(lookers(cursor)), options(cursor)
    then = tree.get("options", {})
    moved = {name.removesuffix("/options") for name in tree.get("held", {})}  # by the part itself: they are set back
    changed = [n for n in now if n in then and n not in looking and n not in moved and then[n] != now[n]]
    found = [f"{name}: ({then[name]}) saved, ({now[name]}) here" for name in changed]
    found += lacking(cursor, tree)
    stretched = any(getattr(slot.part, "needs_horizon", False) for slot in cursor.slots)
    for name, bound in bounds(cursor).items():
        before = tree.get("bounds", {}).get(name, bound)
        if before != bound and stretched:
            found.append(f"{name}: {before} saved, {bound} here; schedules stretch over what is here")
    for name, optimizer in inventory(cursor).optimizers.items():
        if name in tree["optimizers"] and name not in fresh:
            found += _of_groups(
                name, tree["optimizers"][name]["param_groups"], optimizer.param_groups, bool(tree["schedulers"])
            )
    for name, module in inventory(cursor).modules.items():
        found += _of_dtypes(name, tree["models"].get(name, {}), module.state_dict())
    version = str(torch.__version__)
    return [*found, f"torch: {tree['torch']} saved, {version} here"] if tree["torch"] != version else found


def _of_groups(
    name: str, saved: Sequence[Mapping[str, Any]], here: Sequence[Mapping[str, Any]], scheduled: bool
) -> list[str]:
    """Options of an optimizer that its saved state will set back; of what a schedule moves, the base value counts.

    Args:
        name: Of the optimizer.
        saved: Its groups in the file.
        here: And here.
        scheduled: Whether a scheduler of torch's is at work, which may move the momentum.
    """
    found = []
    for number, (then, now) in enumerate(zip(saved, here, strict=True)):
        where = f"{name}.param_groups[{number}]" if len(here) > 1 else name
        for key in now:
            moved = key in ("momentum", "betas") and (scheduled or "initial_momentum" in then)
            bookkeeping = key.startswith(("initial_", "scheduled_", "max_", "min_", "base_")) or key.endswith(
                "_by_hand"
            )
            if moved or bookkeeping or key not in then:
                continue
            before, after = (group.get(f"initial_{key}", group[key]) for group in (then, now))
            plain = isinstance(after, str | bool | int | float | tuple | list) and key != "params"
            if plain and type(before) in (type(after), int, float, list, tuple) and _as_list(before) != _as_list(after):
                found.append(f"{where}: {key} {before} saved, {after} here; the saved one holds, until you set it")
    return found


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _of_dtypes(name: str, saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The first tensor that would be cast."""
    for key, value in here.items():
        before = saved.get(key)
        if isinstance(value, torch.Tensor) and isinstance(before, torch.Tensor) and value.dtype != before.dtype:
            return [f"{name}: {key} is {before.dtype} in the file, {value.dtype} here, and will be cast"]
    return []
