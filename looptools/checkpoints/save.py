"""Write a checkpoint, keep the last ones and the best ones."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, ref

import attrs

from ..archives.files import copy, free_name, stem_of, write
from ..archives.whole import remove_leftovers
from ..cursor import Cursor
from ..intervals import highest
from ..plain import require_plain
from ..warn import warn
from .background import Background, Buffers
from .best import Taken, enter, stems, take, weights
from .fit import stateful
from .identity import identity
from .lock import hold, let_go
from .manifest import Manifest, read_manifest, require_own, write_manifest
from .memory import memory
from .tree import capture

if TYPE_CHECKING:
    from ..run import Run


def save(run: Run, folder: str | Path, *, keep: int | None = None, best: Sequence[highest] = ()) -> Path:
    """Save the run at a boundary; older checkpoints go only once the new one is safe.

    Args:
        run: The run.
        folder: Where to, made if missing.
        keep: How many of the newest stay; None for all.
        best: By what results are ranked: if the newest is among the best so far, it is written to their files as well.

    Returns:
        The file.

    Raises:
        FileExistsError: If the folder holds another run's checkpoints.
        LookupError: If nobody writes the metric of *best*.
        OSError: If the file cannot be written; what was there stays, and so does ``run.best``.
        RuntimeError: If an iteration is open, or another process writes into the folder.
        TypeError: If something cannot be saved, by name.
    """
    try:
        path = Saver(run, Path(folder), keep, tuple(best), background=False).save()
        assert path is not None
        return path
    finally:
        if run.ended or not run.begun or not _savers(run.cursor):  # else they let go when the run rests
            let_go(run.cursor)


def saver(run: Run, folder: Path, keep: int | None, best: Sequence[highest], background: bool) -> Saver:
    """What a part of the run saves with, again and again; the run's other folders know of it."""
    made = Saver(run, folder.absolute(), keep, tuple(best), background)  # wherever the process goes
    _SAVERS.add(made)
    return made


@attrs.define(eq=False, weakref_slot=True)
class Saver:
    """Saves one run into one folder, again and again.

    What is to be saved is collected into a `_Job` at the boundary; that is written, here or in the background. One
    that fails in the background is kept with its copies, to be written all the same before the next one.

    Args:
        run: The run.
        folder: Where to.
        keep: How many of the newest checkpoints stay; None for all.
        best: By what results are ranked.
        background: Write while training goes on.
    """

    run: Run
    folder: Path
    keep: int | None
    best: tuple[highest, ...]
    background: bool
    writer: Background = attrs.field(factory=Background, init=False)
    _cursor: Cursor = attrs.field(init=False)
    _buffers: Buffers = attrs.field(factory=Buffers, init=False)
    _writing: _Job | None = attrs.field(default=None, init=False)  # what the writer was given
    _undone: _Job | None = attrs.field(default=None, init=False)  # what it could not write
    _judged: tuple[Any, ...] | None = attrs.field(
        default=None, init=False
    )  # the boundary whose results were ranked last
    _trained: int | None = attrs.field(default=None, init=False)
    _newest: tuple[Path, tuple[Any, ...]] | None = attrs.field(default=None, init=False)  # checkpoint, its boundary

    def __attrs_post_init__(self) -> None:
        self._cursor = self.run.cursor

    def check(self) -> None:
        """Refuse what can be seen to be unsavable before the run begins.

        Raises:
            TypeError: With its part and field.
        """
        self._wait_for_others()  # a run of the cell before may still be writing what is about to be resumed
        for slot in self._cursor.slots:
            try:
                remembered = memory(slot.part)
            except Exception:  # it cannot tell before the run has begun; the first save asks again
                continue
            require_plain(remembered, f"checkpoint/parts/{slot.name}")
        for kind, things in stateful(self._cursor).items():
            for name, thing in things.items():
                require_plain(thing.state_dict(), f"checkpoint/{kind}/{name}")

    def start(self) -> None:
        """Take the folder, before the first iteration.

        Raises:
            FileExistsError: If it holds another run's checkpoints.
            RuntimeError: If another process writes into it.
        """
        self._wait_for_others()
        if read_manifest(self.folder).run != identity(self._cursor).id:  # else a part that was taken out has begun it
            require_own(self.folder, self._cursor.resumed_from)
        hold(self._cursor, self.folder)
        remove_leftovers(self.folder)
        resumed = self._cursor.resumed_from
        if resumed is not None and resumed.parent.resolve() == self.folder.resolve():
            self._trained = self.run.progress.iteration

    def save(self, *, only_best: bool = False, wait: bool = False) -> Path | None:
        """Save at a boundary, once what was saved before is written.

        Args:
            only_best: Write only what is among the best.
            wait: Write it here and now, whatever *background* says.

        Returns:
            The checkpoint; None if only the best are written.
        """
        self.settle()
        self._wait_for_others()
        boundary = _boundary(self.run)
        best = self.best if self._judged != boundary else ()  # else the same result would be ranked twice
        job = _job(self.run, self.folder, self.keep, best, only_best)
        if job is None:
            self._judged = boundary
            return None
        if self.background and not wait:
            job.tree, job.weights = self._buffers.copy((job.tree, job.weights))
            self._count_on(job)
            self._writing = job
            self.writer.start(partial(self._write, job), f"checkpoint: {job} could not be written in the background.")
        else:
            job.write()
            self._count_on(job)
        self._judged = boundary
        return None if only_best else job.path

    def go_back(self) -> None:
        """The run stands at an earlier boundary: what comes now is judged and saved anew."""
        self._judged = self._trained = None
        if self._newest is not None:
            self._newest = self._newest[0], ()

    @property
    def trained(self) -> int | None:
        """Training iterations that were done when the newest checkpoint was saved; None before the first."""
        return self._trained

    def save_now(self) -> Path:
        """Save at this boundary, unless the newest checkpoint is of this very boundary; nothing is under way then."""
        try:
            self._wait()
        except Exception as error:
            warn(f"checkpoint: {error!r} in the background. Writing it again.")
        self.settle()
        if self._newest is None or self._newest[1] != _boundary(self.run):
            self.save(wait=True)
        assert self._newest is not None
        return self._newest[0]

    def settle(self) -> None:
        """Wait for what is being written in the background; write here and now what it could not write.

        Raises:
            BaseException: What the background has raised; when it is asked again, the rest is done.
        """
        self._wait()
        if self._undone is not None:
            hold(self._cursor, self.folder)  # the run may have rested since, and another one may write there now
            self._undone.write()
            self._count_on(self._undone)
            self._undone = None

    def close(self) -> None:
        """Wait for what is being written in the background, and let the run's folders go.

        Raises:
            BaseException: What the background has raised, unless it was told before.
        """
        for saver in _savers(self._cursor):  # their folders are let go together
            saver.writer.join()
        let_go(self._cursor)
        self._wait()

    def _write(self, job: _Job) -> None:
        job.write()  # a method of this object, so that neither it nor the run, which has the lock, is gone before

    def _wait(self) -> None:
        self.writer.join()
        job, self._writing = self._writing, None
        if job is not None and self.writer.error is not None:
            self._undone, self._newest, self._trained = job, None, None
            kept = {metric: facts for metric, facts in self.run.best.items() if metric not in job.best_before}
            self.run.best = kept | {metric: facts for metric, facts in job.best_before.items() if facts is not None}
        self.writer.wait()

    def _wait_for_others(self) -> None:
        """Wait for what others write into the same folder: a second part, a run of the cell before."""
        folder = self.folder.resolve()
        for other in list(_SAVERS):
            if other is not self and other.writer.running and other.folder.resolve() == folder:
                other.writer.join()

    def _count_on(self, job: _Job) -> None:
        """From here on what is in *job* is on the disk, or will be."""
        job.best_before = {taken.metric: self.run.best.get(taken.metric) for taken in job.taken}
        self.run.best = self.run.best | {taken.metric: taken.facts for taken in job.taken}
        own = identity(self._cursor)
        own.number = max(own.number, job.number)
        if job.name:
            self._newest, self._trained = (job.path, job.boundary), job.facts["iteration"]


_SAVERS: WeakSet[Saver] = WeakSet()  # of all runs' parts


def _savers(cursor: Cursor) -> list[Saver]:
    return [saver for saver in _SAVERS if saver._cursor is cursor]


@attrs.define(eq=False)
class _Job:
    """All that one save writes.

    Args:
        folder: Where to.
        run: The run's id.
        number: The checkpoint's running number.
        name: The checkpoint's file; empty if only the best are written.
        facts: What the manifest says of it.
        keep: How many of the newest checkpoints stay; None for all.
        tree: What each file holds.
        weights: The plain weights of each model that has a file.
        files: All files, each with the number of its model; the checkpoint is the first.
        taken: The results that are among the best.
        boundary: Where in the run it is of.
        best_before: What ``run.best`` said of their metrics.
    """

    folder: Path
    run: str
    number: int
    name: str
    facts: dict[str, Any]
    keep: int | None
    tree: dict[str, Any]
    weights: list[dict[str, Any] | None]
    files: list[tuple[int, str]]
    taken: list[Taken]
    boundary: tuple[Any, ...]
    best_before: dict[str, dict[str, Any] | None] = attrs.field(factory=dict)

    def __str__(self) -> str:
        return " and ".join(str(self.folder / name) for _, name in self.files)

    @property
    def path(self) -> Path:
        return self.folder / self.name

    def write(self) -> None:
        """Write the files, list them, and let go of those that they displace."""
        manifest = read_manifest(self.folder)
        sums: dict[str, dict[str, int]] = {}
        first: dict[int, str] = {}
        for model, name in self.files:
            if first.setdefault(model, name) == name:
                plain = self.weights[model]
                sums[name] = write(self.folder / name, self.tree if plain is None else {**self.tree, "weights": plain})
            else:
                sums[name] = copy(self.folder / first[model], self.folder / name)
        old = self._list(manifest, sums[self.name]) if self.name else []
        for result in self.taken:
            old += enter(manifest, result, sums)
        manifest.run = self.run
        write_manifest(self.folder, manifest)
        for entry in old:
            with contextlib.suppress(OSError):
                (self.folder / entry["file"]).unlink()

    def _list(self, manifest: Manifest, sums: dict[str, int]) -> list[dict[str, Any]]:
        """Put the checkpoint into the manifest, and take out those that are to go, which are returned."""
        others = [entry for entry in manifest.checkpoints if entry["file"] != self.name]
        entries = [entry for entry in others if (self.folder / entry["file"]).exists()]
        entries.append({"number": self.number, "file": self.name, **self.facts, **sums})
        entries.sort(key=lambda entry: entry["number"])  # what failed in the background may come after a newer one
        old = entries[: -self.keep] if self.keep else []
        manifest.checkpoints = entries[len(old) :]
        return old


def _job(run: Run, folder: Path, keep: int | None, best: Sequence[highest], only_best: bool) -> _Job | None:
    """Collect what is to be saved; None if that is nothing. Tensors are not copied."""
    cursor = run.cursor
    if cursor.state is not None and not cursor._counted:
        raise RuntimeError("save: an iteration is open. Finish it first: next(run).")
    folder.mkdir(parents=True, exist_ok=True)
    manifest, own = read_manifest(folder), identity(cursor)
    if manifest.run != own.id:
        require_own(folder, cursor.resumed_from, "save")
    hold(cursor, folder)
    named = stems(best)
    results = [take(run, criterion, folder, named[criterion.metric]) for criterion in best]
    taken = [result for result in results if result is not None]
    if only_best and not taken:
        return None
    number = max([own.number, *(entry["number"] for entry in manifest.checkpoints)]) + (not only_best)
    name = "" if only_best else free_name(stem_of(run.progress), {entry["file"] for entry in manifest.checkpoints})
    tree = capture(run, best=run.best | {result.metric: result.facts for result in taken})
    files = [(run.model, name)] if name else []
    files += [(result.model, file) for result in taken for file in result.files]
    models = list({id(model): model for model, _ in files}.values())
    numbers = {id(model): n for n, model in enumerate(models)}
    passes, progress = cursor.passes, run.progress
    facts: dict[str, Any] = {"epoch": progress.epoch, "iteration": progress.iteration, "round": progress.round}
    facts |= {"border": passes.phase is None, "phase": passes.plan.phase, "index": passes.index}
    return _Job(
        folder,
        own.id,
        number,
        name,
        facts,
        keep,
        tree | {"run": {"id": own.id, "number": number}},
        [weights(model) for model in models],
        [(numbers[id(model)], file) for model, file in files],
        taken,
        _boundary(run),
    )


def _boundary(run: Run) -> tuple[Any, ...]:
    """Where in the run it stands: the state that was finished last, and whether something was judged since."""
    state = run.state
    return None if state is None else ref(state), len(run.history)
