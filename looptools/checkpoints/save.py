"""Write a checkpoint, keep the last ones and the best one."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..intervals import highest
from .files import Manifest, describe, read_manifest, serialize, write, write_manifest
from .tree import capture

if TYPE_CHECKING:
    from ..run import Run


def save(
    run: Run, folder: Path, *, keep: int | None = None, best: highest | None = None, only_best: bool = False
) -> None:
    """Save the run at a boundary; older checkpoints go only once the new one is safe.

    Args:
        run: The run.
        folder: Where to.
        keep: How many of the newest stay; None for all.
        best: If the newest result is the best so far, it is written to ``best.pt`` as well.
        only_best: Write nothing but that.

    Raises:
        LookupError: If nobody writes the metric of *best*.
        OSError: If the file cannot be written; what was there stays.
        TypeError: If something cannot be saved, by name.
    """
    state = run.state
    border = state is not None and state.last
    manifest = read_manifest(folder)
    entries = manifest.checkpoints
    progress = run.progress
    name = _free_name(f"epoch_{progress.epoch:04d}-iteration_{progress.iteration:06d}", entries)
    before = dict(run.best)
    is_best = best is not None and _take_best(run, best, state is not None and state.round_last)
    if only_best and not is_best:
        return
    try:
        data = serialize(capture(run, border=border))
        if not only_best:
            write(folder / name, data)
        if is_best:
            write(folder / "best.pt", data)
    except BaseException:
        run.best = before
        raise
    if is_best:
        manifest.best = {"file": "best.pt"} | describe(data)
    old = [] if only_best else _add(manifest, name, data, border, keep, run)
    write_manifest(folder, manifest)
    for entry in old:
        with contextlib.suppress(OSError):
            (folder / entry["file"]).unlink()


def _add(manifest: Manifest, name: str, data: bytes, border: bool, keep: int | None, run: Run) -> list[dict[str, Any]]:
    """Put a new file into the manifest, and take out those that are to go, which are returned."""
    entries, progress = manifest.checkpoints, run.progress
    facts: dict[str, Any] = {"number": entries[-1]["number"] + 1 if entries else 1, "file": name}
    facts |= {"epoch": progress.epoch, "iteration": progress.iteration, "round": progress.round, "border": border}
    entries.append(facts | describe(data))
    newest_border = next((entry for entry in reversed(entries) if entry["border"]), None)
    old = [entry for entry in (entries[:-keep] if keep else []) if entry is not newest_border]
    manifest.checkpoints = [entry for entry in entries if entry not in old]
    return old


def _free_name(stem: str, entries: list[dict[str, Any]]) -> str:
    taken = {entry["file"] for entry in entries}
    name, number = f"{stem}.pt", 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}.pt"
    return name


def _take_best(run: Run, best: highest, round_ends: bool) -> bool:
    """Whether the newest result is the best so far; then it is noted in ``run.best``."""
    phase, _, metric = best.metric.rpartition("/")
    rows = [row for row in run.history if row["phase"] == phase and metric in row]
    if round_ends and not rows:  # after a whole round everybody has written
        known = ", ".join(sorted(run.results)) or "none"
        raise LookupError(f'best: no part writes "{best.metric}"; known are {known}.')
    value = run.results.get(best.metric)
    if value is None or rows[-1]["trained"] != run.progress.iteration:  # it was measured on other weights
        return False
    so_far = run.best.get(best.metric, {}).get("value")
    if not best.better(value, so_far):
        return False
    progress = run.progress
    facts = {"value": value, "epoch": progress.epoch, "iteration": progress.iteration, "file": "best.pt"}
    run.best = {**run.best, best.metric: facts}
    return True
