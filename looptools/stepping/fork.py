"""Runs that go on independently from where another one stands."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..checkpoints.around import generators_around
from ..checkpoints.changes import take_up_changes
from ..checkpoints.fit import stateful
from ..checkpoints.forgetful import forgetful
from ..checkpoints.identity import identity
from ..checkpoints.inventory import inventory
from ..checkpoints.memory import NOTED, note_parts
from ..checkpoints.tree import apply, capture
from ..checks import whole_number
from ..cursor import Cursor
from ..generators import get_generators
from ..interrupts import interrupts
from ..warn import warn
from .forking.base_values import option_names, set_option
from .forking.entangled import owned_by, require_apart
from .forking.outlets import folders_of, silent
from .forking.own_generators import OwnGenerators
from .forking.twins import Twins

if TYPE_CHECKING:
    from ..run import Run


def fork(run: Run, n: int | None, folders: Iterable[str | Path] | None, options: Mapping[str, Any]) -> tuple[Run, ...]:
    """Make runs that stand where *run* stands, and share nothing with it but functions and data sets.

    Each ends with the bits that *run* would have ended with, in whatever turn they are stepped: it has its own states
    of the process's random generators, which are put in while it is at work. What a checkpoint does not hold is not
    known to a fork either: local variables of generator functions, random transforms within workers in mid-pass.

    Args:
        run: At a boundary; begun or not.
        n: How many; None for as many as an option has values.
        folders: One for each, for the parts that write files; None mutes these. What goes to a log's ``to=`` is left
            out, and so are profiles. Where parts write into several folders, those stand below it in the same way.
        options: Names of options of the param groups, each with a value for each run. Where a schedule moves one, that
            is the base value which it begins from.

    Raises:
        RuntimeError: If an iteration is open; if something of the pipe cannot be copied, or a function in it uses a
            model, optimizer or random generator of *run*, naming the function and its variable.
        ValueError: If numbers do not agree, or a folder is in use.
        LookupError: If no optimizer has such an option.
    """
    cursor = run.cursor
    count, places = _read(cursor, n, folders, options)
    _require_boundary(cursor)
    for name in forgetful(cursor) if cursor.started else ():
        warn(f"fork: {name} begins anew in each fork: what it keeps in local variables cannot be copied.")
    tree = capture(run, who="fork")  # what a checkpoint would hold
    forks = []
    for number in range(count):
        new = _twin(run, places[number], tree)
        for name, values in options.items():
            set_option(new.cursor, name, values[number])
        forks.append(new)
    return tuple(forks)


def _require_boundary(cursor: Cursor) -> None:
    if cursor._working and interrupts.calls(cursor):
        raise RuntimeError(
            "fork: the run is at work, within an iteration or a function of its workflow. Fork it from outside."
        )
    if cursor.state is not None:
        raise RuntimeError("fork: an iteration is open. Finish it first: next(run), or drop it: run.skip().")


def _twin(run: Run, folder: Path | None, tree: dict[str, Any]) -> Run:
    """One fork, where *run* stands."""
    cursor, own = run.cursor, OwnGenerators(get_generators())
    new = type(run)(run._agenda, (), run._snapshots)
    twins = Twins(run, new, folder)
    twins.make()
    require_apart(owned_by(cursor), twins.roots, [new, *twins.shared])
    own.look_after(new)
    with own, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all of it has been said by the run
        _name_alike(new.cursor, cursor)
        _take_notes(new.cursor, cursor, twins)
        fitting = _fitting(new.cursor, copy_of_tree(tree), folder)
        take_up_changes(new.cursor, fitting)
        apply(new, fitting)
    _stand_alike(new, run, folder)
    return new


def _name_alike(new: Cursor, old: Cursor) -> None:
    """Parts that were replaced or put in have the name that they have in the run."""
    lines = [(new.lines[key], line) for key, line in zip(new.lines, old.lines.values(), strict=True)]
    for mine, theirs in [*lines, (new.run_slots, old.run_slots)]:
        del mine[len(theirs) :]  # an `average` is put there anew if the run's was removed
        for slot, its in zip(mine, theirs, strict=True):
            slot.name = its.name
            slot.muted = isinstance(slot.part, silent)


def _take_notes(new: Cursor, old: Cursor, twins: Twins) -> None:
    """What objects of plain classes were when the run was built: what has changed since is saved in checkpoints."""
    note_parts(new)
    noted, parts = vars(old)[NOTED], {slot.name: slot.part for slot in old.slots}
    for name, (thing, _) in list(vars(new)[NOTED].items()):
        before, attributes = noted.get(name, (None, {}))
        part = parts.get(name.removesuffix("/options"))
        if before is not None and (before is part or (part is None and twins.copy_of(before) is thing)):
            vars(new)[NOTED][name] = thing, twins.copied(attributes, name)


def _fitting(new: Cursor, tree: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """What of *tree* is for this fork: muted parts held things that it does not, and plain objects are copies."""
    for kind, things in stateful(new).items():
        tree[kind] = {name: state for name, state in tree[kind].items() if name in things}
    here = generators_around(new)
    tree["around"] = {path: state for path, state in tree["around"].items() if path in here}
    tree["parts"] = {name: memory for name, memory in tree["parts"].items() if name not in vars(new)[NOTED]}
    tree["held"] = {}
    for memory in tree["parts"].values() if folder is not None else ():
        if "marks" in memory:
            memory["marks"] = {}  # its files begin in the new folder
    return tree


def _stand_alike(new: Run, run: Run, folder: Path | None) -> None:
    cursor, old = new.cursor, run.cursor
    cursor.ended = old.ended
    if old.unsure is None:
        cursor.unsure = None
    cursor.resumed_from = old.resumed_from
    if old.started:  # its parts must not take it for one that begins; no such folder is there
        cursor.resumed_from = Path(f"forked from run {identity(old).id}", "nothing")
    if folder is not None:
        new.best = {}  # its best files are to come


def copy_of_tree(value: Any) -> Any:
    """The same containers with copies of all tensors.

    Example:
        >>> tree = {"weights": [torch.ones(2)], "epoch": 3}
        >>> copied = copy_of_tree(tree)
        >>> copied["epoch"], bool((copied["weights"][0] == 1).all()), copied["weights"][0] is tree["weights"][0]
        (3, True, False)
    """
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        new = copy.copy(value)  # the versions of a model's layers hang on its state_dict
        for key, item in value.items():
            new[key] = copy_of_tree(item)
        return new
    if isinstance(value, list | tuple):
        return [copy_of_tree(item) for item in value] if isinstance(value, list) else tuple(map(copy_of_tree, value))
    return copy.copy(value)


# What is asked for


def _read(
    cursor: Cursor, n: int | None, folders: Iterable[str | Path] | None, options: Mapping[str, Any]
) -> tuple[int, list[Path | None]]:
    """How many forks, and the folder of each."""
    given = {"n": whole_number("fork: n", n)} if n is not None else {}
    optimizers = inventory(cursor).optimizers.values()
    known = option_names(optimizers)
    for name, values in options.items():
        if name not in known:
            raise LookupError(f"fork: no optimizer has an option {name!r}. There are: {', '.join(known) or 'none'}.")
        if not isinstance(values, list | tuple):
            raise TypeError(f"fork: give a value of {name} for each run, as in {name}=[{values!r}], got {values!r}.")
        wrong = [value for value in values if isinstance(value, str) or value is None]
        if wrong:
            raise TypeError(f"fork: {name} must be numbers, as in {name}=[1e-3, 3e-4], got {wrong[0]!r}.")
        given[name] = len(values)
    if isinstance(folders, str | Path):
        raise TypeError(f"fork: give a folder for each run, as in folders=[{str(folders)!r}], got {folders!r}.")
    places = None if folders is None else [Path(folder) for folder in folders]
    if places is not None:
        given["folders"] = len(places)
    if not given:
        raise TypeError("fork: say how many: run.fork(2), or give an option a value for each run: lr=[1e-3, 3e-4].")
    if len(set(given.values())) > 1 or 0 in given.values():
        told = ", ".join(f"{name}: {count}" for name, count in given.items())
        raise ValueError(f"fork: there must be as many of everything as there are runs, got {told}.")
    count = next(iter(given.values()))
    if places is not None:
        _require_apart(places, folders_of(cursor))
    return count, [None] * count if places is None else list(places)


def _require_apart(places: list[Path], taken: list[Path]) -> None:
    seen = set(taken)
    for place in places:
        if place.resolve() in seen:
            whose = "the run's own" if place.resolve() in taken else "given twice"
            raise ValueError(f"fork: {place} is {whose}. Give each fork a folder of its own.")
        seen.add(place.resolve())
