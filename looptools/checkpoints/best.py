"""Which checkpoints are the best ones, and the files that hold them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from torch.nn import DataParallel, Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..archives.files import free_name, stem_of
from ..intervals import highest, newest
from ..pipeline import numbered
from .manifest import Manifest

if TYPE_CHECKING:
    from ..run import Run


@attrs.frozen(eq=False)
class Taken:
    """A result that is among the best: what is kept of it.

    Args:
        metric: Its metric.
        model: The model that it was measured on.
        facts: What ``run.best`` says of the metric from now on.
        files: Names of the files to write.
    """

    metric: str
    model: Any
    facts: dict[str, Any]
    files: list[str]


def stems(criteria: Iterable[highest]) -> dict[str, str]:
    """What the names of each metric's files begin with.

    Example:
        >>> stems([highest("val/accuracy")]), stems([highest("val/accuracy"), highest("val/f1")])
        ({'val/accuracy': 'best'}, {'val/accuracy': 'best-val-accuracy', 'val/f1': 'best-val-f1'})
    """
    metrics = [criterion.metric for criterion in criteria]
    if len(metrics) == 1:
        return {metrics[0]: "best"}
    return dict(zip(metrics, numbered("best-" + re.sub(r"[^\w.+-]+", "-", metric) for metric in metrics), strict=True))


def take(run: Run, criterion: highest, folder: Path, stem: str) -> Taken | None:
    """What is to be kept if the pass that ends here is among the best so far.

    Ties keep the older one.

    Raises:
        LookupError: If nobody writes the metric.
    """
    state, progress, metric, better = run.state, run.progress, criterion.metric, criterion.better
    value = newest("best", metric, state) if state is not None and state.last else None
    if value is None:
        return None
    new = {"value": value, "epoch": progress.epoch, "iteration": progress.iteration}
    facts, files = dict(run.best.get(metric, {})), []
    top = [entry for entry in facts.pop("top", []) if (folder / entry["file"]).exists()][: criterion.top]
    if better(value, facts.get("value")):
        files.append(f"{stem}.pt")
        facts = {**new, "file": files[0]}
    if criterion.top > 1:
        if better(value, top[-1]["value"] if len(top) == criterion.top else None):
            place = next((n for n, entry in enumerate(top) if better(value, entry["value"])), len(top))
            files.append(free_name(f"{stem}-{stem_of(progress)}", {entry["file"] for entry in top}))
            top = [*top[:place], {**new, "file": files[-1]}, *top[place:]][: criterion.top]
        facts["top"] = top
    if not files:
        return None
    return Taken(metric, _model_of(run, metric.partition("/")[0]), facts, files)


def enter(manifest: Manifest, taken: Taken, written: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    """Put what was *taken* into the manifest, and take out what it displaces, which is returned.

    Args:
        manifest: It is changed.
        taken: The result.
        written: Size and checksum of each new file.
    """
    known = {entry["file"]: entry for entry in manifest.best}
    facts = taken.facts
    best = {key: facts[key] for key in ("value", "epoch", "iteration", "file")}
    ranked = [(1, best), *enumerate(facts.get("top", []), 1)]
    new = []
    for rank, entry in ranked:
        sums = written.get(entry["file"], known.get(entry["file"]))
        if sums is not None:
            new.append({"metric": taken.metric, "rank": rank, **entry, "bytes": sums["bytes"], "crc32": sums["crc32"]})
    names = {entry["file"] for entry in new}
    others = [e for e in manifest.best if e.get("metric", taken.metric) != taken.metric and e["file"] not in names]
    old = [entry for entry in manifest.best if entry not in others and entry["file"] not in names]
    manifest.best = [*others, *new]
    return old


def _model_of(run: Run, phase: str) -> Any:
    """The model of the phase that is called so."""
    passes = run.cursor.passes
    return next((p.model for p in passes.agenda.phases if passes.names[id(p)] == phase), run.model)


def weights(model: Any) -> dict[str, Any] | None:
    """The plain ``state_dict`` of a model, without what is wrapped around it; tensors are not copied."""
    while isinstance(model, DataParallel | DistributedDataParallel | AveragedModel) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return dict(model.state_dict()) if isinstance(model, Module) else None
