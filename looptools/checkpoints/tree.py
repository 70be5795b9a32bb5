"""The state tree of a run: everything that must come back, in plain values and tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch

from ..agenda import Place
from ..cursor import Cursor
from ..generators import get_generators, set_generators
from ..phases import Phase
from ..plain import require_plain
from ..warn import warn
from .beside import loose_gradients, put_gradients, tell_of_optimizers
from .fingerprint import bounds, fingerprint, lookers, options, pipe, said, workflow
from .fit import kinds, misfits, obstacles, stateful
from .identity import identity, resume_identity
from .inventory import inventory, parameter_names, require_owners
from .memory import memories, remember

if TYPE_CHECKING:
    from ..run import Run

FORMAT = 2
FORMATS = (1, 2)  # that can be read; 1 has no passes under way and no fingerprint


def capture(run: Run, *, best: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """The run's state at a boundary. Tensors are not copied.

    Args:
        run: The run.
        best: What ``run.best`` will be once this is saved; None for what it is.

    Raises:
        TypeError: If something in it could not be loaded again, by name of its part and field.
        ValueError: If an optimizer moves a parameter that no model of the run holds.
    """
    cursor = run.cursor
    require_owners(cursor, "save")
    found = inventory(cursor)
    tell_of_optimizers(cursor, found)
    progress = attrs.asdict(cursor.progress, filter=lambda field, _: field.name != "updates")
    progress["seconds"] = cursor.seconds
    progress["updates"] = {name: cursor.progress.updates.get(o, 0) for name, o in found.optimizers.items()}
    held = stateful(cursor)
    tree = {
        "format": FORMAT,
        "torch": str(torch.__version__),
        "run": attrs.asdict(identity(cursor)),
        "border": cursor.passes.phase is None,
        "pass": _where(cursor),
        "stopping": cursor.stopping,
        "pipe": pipe(cursor),
        "lookers": lookers(cursor),
        "options": options(cursor),
        "workflow": workflow(cursor),
        "bounds": bounds(cursor),
        "fingerprint": fingerprint(cursor),
        "kinds": kinds(held),
        "parameters": parameter_names(found),
        "progress": progress,
        "place": [cursor.passes.place.entry, cursor.passes.place.done],
        "results": dict(run.results),
        "history": [dict(row) for row in run.history],
        "best": {metric: dict(facts) for metric, facts in (run.best if best is None else best).items()},
        "parts": memories(cursor),
        "sources": {cursor.passes.names[key]: source.state_dict() for key, source in cursor.passes.sources.items()},
        "gradients": loose_gradients(cursor, found),
        "generators": get_generators(),
    }
    for kind, things in held.items():
        tree[kind] = {name: thing.state_dict() for name, thing in things.items()}
    require_plain(tree, "checkpoint")
    return tree


def _where(cursor: Cursor) -> dict[str, Any] | None:
    """The pass under way; None between two. Its source keeps its own place."""
    passes = cursor.passes
    if passes.phase is None:
        return None
    return {"phase": passes.plan.phase, "index": passes.index, "began": passes.began, "began_at": passes.began_at}


def restore(run: Run, tree: dict[str, Any], accept: Iterable[str] = ()) -> None:
    """Put the run where `capture` was called. Everything is looked at before anything is changed.

    Args:
        run: A run that has not begun.
        tree: What `capture` gave.
        accept: Words for differences that are accepted; see `fingerprint.WORDS`.

    Raises:
        RuntimeError: If the tree differs from the run in what was not accepted.
    """
    cursor, accept = run.cursor, tuple(accept)
    problems = [d for d in obstacles(cursor, tree) if d.word not in accept]
    if problems:
        listed = "\n".join(f"- {d.text}" + (f'  (accept="{d.word}")' if d.word else "") for d in problems)
        words = sorted({d.word for d in problems if d.word})
        cure = "Go on all the same with run.resume(accept=...), or take the weights alone with lt.load_weights(...)."
        raise RuntimeError(
            f"resume: the checkpoint does not fit this run. Nothing was changed. They differ in:\n{listed}\n"
            + (cure if words and all(d.word for d in problems) else cure.partition(", or ")[2].capitalize())
        )
    changed = said(cursor, tree)
    if changed:
        listed = "\n".join(f"- {line}" for line in changed)
        warn(f"resume: since the checkpoint was saved, this has changed; the run goes on with what is here.\n{listed}")
    try:
        _stand(cursor, tree)
        for slot in cursor.slots:
            if slot.name in tree["parts"]:
                remember(slot.part, tree["parts"][slot.name])
        for key, source in cursor.passes.sources.items():
            if cursor.passes.names[key] in tree["sources"]:
                source.load_state_dict(tree["sources"][cursor.passes.names[key]])
        _load(cursor, tree)
    except BaseException as error:
        run.reset()  # its parts are made anew
        error.add_note("resume: the run is as if new, but for weights and optimizers, which may be loaded already.")
        raise
    run.results.clear()
    run.results.update(tree["results"])
    run.history, run.best = list(tree["history"]), dict(tree["best"])
    cursor.stopping = tree["stopping"]  # a run that was stopped stays so, until it is extended
    for slot in cursor.line:
        if hasattr(slot.part, "on_resume"):
            slot.part.on_resume(run)
    resume_identity(cursor, tree)
    set_generators(tree["generators"])


def _stand(cursor: Cursor, tree: dict[str, Any]) -> None:
    """Have counters, workflow and pass stand where they stood."""
    progress, passes = dict(tree["progress"]), cursor.passes
    updates, optimizers = progress.pop("updates"), inventory(cursor).optimizers
    for name, value in progress.items():
        setattr(cursor.progress, name, value)
    cursor.began = cursor.progress.seconds  # else what is due every n seconds would be due at once
    cursor.progress.updates = {optimizers[name]: n for name, n in updates.items() if n and name in optimizers}
    passes.place = _place(cursor, tree)
    where = tree.get("pass")
    if where is None:
        return
    entry = passes.agenda.entries[passes.place.entry]
    assert isinstance(entry.phase, Phase)
    passes.open(entry, entry.phase)
    passes.index, passes.began, passes.began_at = _index(tree, where, cursor), where["began"], where["began_at"]
    passes.measure()
    cursor.line_up(entry.phase)
    for slot in cursor.line:  # before they get their memory, which it begins anew
        if hasattr(slot.part, "on_pass") and not hasattr(slot.part, "on_resume"):
            slot.part.on_pass(cursor.run)


def _place(cursor: Cursor, tree: Mapping[str, Any]) -> Place:
    """Where in the workflow the run stands; in another workflow, at the first entry of the same phase."""
    place, here = Place(*tree["place"]), workflow(cursor)
    then = tree.get("workflow", here)
    if then == here or place.entry >= len(then):
        return place if then == here else Place()
    names = [entry[0] for entry in here]
    name = then[place.entry][0]
    if name not in names:
        return Place()
    number = names.index(name)
    return Place(number, min(place.done, here[number][1] - (tree.get("pass") is not None)))


def _index(tree: dict[str, Any], where: Mapping[str, Any], cursor: Cursor) -> int:
    """Batches of the pass that are done; with another batch size as many as have the same samples."""
    index: int = where["index"]
    name = where["phase"]
    then = tree.get("fingerprint", {}).get("sources", {}).get(name, {}).get("batch_size")
    now = fingerprint(cursor)["sources"][name]["batch_size"]
    if then and now and then != now:
        place = {key: value for key, value in tree["sources"][name].items() if key != "ahead"}
        tree["sources"][name] = {**place, "taken": place["taken"] * then // now}
        index = index * then // now
    return index


def _load(cursor: Cursor, tree: Mapping[str, Any]) -> None:
    """Give models, optimizers, scalers and schedulers their states; those of another kind begin afresh."""
    fresh = {name for kind, names in misfits(cursor, tree).items() for name in names if kind != "models"}
    for kind, things in stateful(cursor).items():
        for name, thing in things.items():
            if name in tree[kind] and name not in fresh:
                thing.load_state_dict(tree[kind][name])
    put_gradients(inventory(cursor), tree.get("gradients", {}))
    for optimizer in cursor.progress.updates:  # torch's schedulers warn if it has not stepped in this process
        optimizer._opt_called = True  # type: ignore[attr-defined]
