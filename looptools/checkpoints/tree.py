"""The state tree of a run: everything that must come back, in plain values and tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..agenda import Place
from ..cursor import Cursor
from ..generators import get_generator, get_generators, set_generator, set_generators
from ..links import Slot
from ..middleware.freeze import is_ours
from ..phases import Phase
from ..plain import require_plain
from ..warn import warn
from .around import generators_around
from .beside import loose_gradients, put_gradients, tell_of_optimizers
from .changes import interrupted, kept_changes, muted, take_up_changes
from .fingerprint import bounds, fingerprint, lookers, options, pipe, said, workflow
from .fit import batch_sizes, index_here, kinds, misfits, obstacles, stateful
from .identity import identity, resume_identity
from .inventory import Inventory, inventory, parameter_names, require_owners
from .memory import held_memories, memories, remember, remember_held

if TYPE_CHECKING:
    from ..run import Run

FORMAT = 2
FORMATS = (1, 2)  # that can be read; 1 has no passes under way and no fingerprint


def capture(run: Run, *, best: dict[str, dict[str, Any]] | None = None, who: str = "checkpoint") -> dict[str, Any]:
    """The run's state at a boundary. Tensors are not copied.

    Args:
        run: The run.
        best: What ``run.best`` will be once this is saved; None for what it is.
        who: What errors begin with.

    Raises:
        TypeError: If something in it could not be loaded again, by name of its part and field.
        ValueError: If an optimizer moves a parameter that no model of the run holds.
    """
    cursor = run.cursor
    require_owners(cursor, "save" if who == "checkpoint" else who)
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
        "muted": muted(cursor),
        "changes": kept_changes(cursor),
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
        "held": held_memories(cursor),
        "sources": {cursor.passes.names[key]: source.state_dict() for key, source in cursor.passes.sources.items()},
        "gradients": loose_gradients(cursor, found),
        "buffers": _unlisted(found),
        "frozen": _frozen(found),
        "around": {path: get_generator(generator) for path, generator in generators_around(cursor).items()},
        "generators": get_generators(),
    }
    for kind, things in held.items():
        tree[kind] = {name: thing.state_dict() for name, thing in things.items()}
    require_plain(tree, who)
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
        can = all(d.word for d in problems)
        listed = "\n".join(f"- {d.text}" + (f'  (accept="{d.word}")' if can else "") for d in problems)
        cure = "Go on all the same with run.resume(accept=...), or take the weights alone with lt.load_weights(...)."
        raise RuntimeError(
            f"resume: the checkpoint does not fit this run. Nothing was changed. They differ in:\n{listed}\n"
            + (cure if can else cure.partition(", or ")[2].capitalize())
        )
    changed = said(cursor, tree, misfits(cursor, tree)["optimizers"])
    if changed:
        listed = "\n".join(f"- {line}" for line in changed)
        warn(
            "resume: since the checkpoint was saved, this has changed; the run goes on with what is here, unless said "
            f"otherwise.\n{listed}"
        )
    try:
        take_up_changes(cursor, tree)
        apply(run, tree)
        resume_identity(cursor, tree)
    except BaseException as error:
        run.reset()  # its parts are made anew
        error.add_note("resume: the run is as if new, but for weights and optimizers, which may be loaded already.")
        raise


def apply(run: Run, tree: dict[str, Any]) -> None:
    """Put the run where `capture` was called; what *tree* holds may be changed by what the run does then.

    Args:
        run: One that has not begun, or that rests and has no iteration open.
        tree: What fits it.
    """
    cursor = run.cursor
    within = _stand(cursor, tree)
    for slot in cursor.slots:
        if slot.name in tree["parts"]:
            remember(slot.part, tree["parts"][slot.name])
    remember_held(cursor, tree.get("held", {}))
    for key, source in cursor.passes.sources.items():
        if cursor.passes.names[key] in tree["sources"]:
            source.load_state_dict(tree["sources"][cursor.passes.names[key]])
    _load(cursor, tree)
    run.results.clear()
    run.results.update(tree["results"])
    run.history, run.best = list(tree["history"]), dict(tree["best"])
    cursor.stopping = tree["stopping"]  # a run that was stopped stays so, until it is extended
    for slot in within:
        if hasattr(slot.part, "on_resume"):
            slot.part.on_resume(run)
    _set_around(cursor, tree.get("around", {}))
    set_generators(tree["generators"])


def _stand(cursor: Cursor, tree: dict[str, Any]) -> list[Slot]:
    """Have counters, workflow and pass stand where they stood.

    Returns:
        The parts that have the beginning of the pass under way behind them; also those that were muted since.
    """
    progress, passes = dict(tree["progress"]), cursor.passes
    updates, optimizers = progress.pop("updates"), inventory(cursor).optimizers
    for name, value in progress.items():
        setattr(cursor.progress, name, value)
    cursor.began = cursor.progress.seconds  # else what is due every n seconds would be due at once
    cursor.progress.updates = {optimizers[name]: n for name, n in updates.items() if n and name in optimizers}
    passes.place = _place(cursor, tree)
    passes.phase, cursor.line = None, []
    where = tree.get("pass")
    if where is None:
        return []
    sizes = batch_sizes(cursor, tree, where)
    if sizes is not None:
        place = {key: value for key, value in tree["sources"][where["phase"]].items() if key != "ahead"}
        tree["sources"][where["phase"]] = {**place, "taken": place["taken"] * sizes[0] // sizes[1]}
    entry = passes.agenda.entries[passes.place.entry]
    assert isinstance(entry.phase, Phase)
    passes.open(entry, entry.phase)
    passes.index, passes.began, passes.began_at = index_here(cursor, tree, where), where["began"], where["began_at"]
    passes.measure()
    cursor.line_up(entry.phase)
    within = [*cursor.line, *interrupted(cursor, entry.phase, tree)]
    for slot in within:  # before they get their memory, which it begins anew
        if hasattr(slot.part, "on_pass") and not hasattr(slot.part, "on_resume"):
            slot.part.on_pass(cursor.run)
    return within


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


def _load(cursor: Cursor, tree: Mapping[str, Any]) -> None:
    """Give models, optimizers, scalers and schedulers their states; those of another kind begin afresh."""
    fresh = {name for kind, names in misfits(cursor, tree).items() for name in names if kind != "models"}
    for kind, things in stateful(cursor).items():
        for name, thing in things.items():
            if name in tree[kind] and name not in fresh:
                thing.load_state_dict(tree[kind][name])
                if kind == "optimizers":
                    _keep_dtypes(thing, tree[kind][name])
    found = inventory(cursor)
    for name, buffers in _unlisted(found).items():
        for key, value in tree.get("buffers", {}).get(name, {}).items():
            if key in buffers and buffers[key].shape == value.shape:
                where = tuple(slice(0, 1) if step == 0 else slice(None) for step in buffers[key].stride())  # expanded
                buffers[key][where].copy_(value[where])
    _freeze(found, tree.get("frozen", {}), cursor.started)
    put_gradients(found, tree.get("gradients", {}))
    for optimizer in cursor.progress.updates:  # torch's schedulers warn if it has not stepped in this process
        optimizer._opt_called = True  # type: ignore[attr-defined]


def _unlisted(found: Inventory) -> dict[str, dict[str, Tensor]]:
    """Buffers that a model's own state_dict leaves out (``persistent=False``), but that training may change."""
    unlisted: dict[str, dict[str, Tensor]] = {}
    for word, module in found.modules.items():
        for path, inner in module.named_modules():
            for name in sorted(inner._non_persistent_buffers_set):
                if (buffer := inner._buffers.get(name)) is not None:
                    unlisted.setdefault(word, {})[f"{path}.{name}" if path else name] = buffer
    return unlisted


def _keep_dtypes(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Undo that torch casts an optimizer's state to its parameters' dtype: NAdam's and master weights are of others."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, value in saved["state"].get(number, {}).items():
            held = optimizer.state[parameter].get(key)
            if isinstance(value, Tensor) and isinstance(held, Tensor) and held.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(held.device)


def _frozen(found: Inventory) -> dict[str, list[str]]:
    """The parameters of each model that do not ask for gradients, but those that a `freeze` sees to itself."""
    return {
        word: [name for name, p in module.named_parameters() if not (p.requires_grad or is_ours(p))]
        for word, module in found.modules.items()
    }


def _freeze(found: Inventory, frozen: Mapping[str, Iterable[str]], begun: bool) -> None:
    """Have the parameters ask for gradients as they did, which a function of the workflow may have changed."""
    here = _frozen(found)
    for word in frozen.keys() & here.keys():
        changed = set(frozen[word]) ^ set(here[word])
        for name, parameter in found.modules[word].named_parameters():
            if name in changed:
                parameter.requires_grad_(name not in frozen[word])
        if changed and not begun:
            warn(
                f"resume: requires_grad of {len(changed)} parameters of {word} was another one when it was saved "
                f"({min(changed)} ...). The saved ones hold, until you set them."
            )


def _set_around(cursor: Cursor, states: Mapping[str, Any]) -> None:
    here = generators_around(cursor)
    for path in states.keys() & here.keys():
        set_generator(here[path], states[path])
    missing = sorted(states.keys() - here.keys())
    if missing:
        warn(f"resume: the random generator {missing[0]} is not here any more, so what it draws is not reproduced.")
