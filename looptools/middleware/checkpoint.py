"""Save the run every so often."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from ..checks import whole
from ..interrupts import interrupts
from ..intervals import (
    Interval,
    epochs,
    highest,
    interval,
    is_criterion,
    iterations,
    rounds,
    samples,
    seconds,
    target,
)
from ..state import State

if TYPE_CHECKING:
    from ..run import Run


def _count_or_none(part: Any, field: Any, value: Any) -> None:
    if value is not None:
        whole()(part, field, value)


def _criteria(best: Any) -> Any:
    """Read the option ``best=``: one criterion, several, or None."""
    return () if best is None else tuple(best) if isinstance(best, list | tuple) else (best,)


def _are_best(part: Any, field: Any, best: tuple[Any, ...]) -> None:
    for criterion in best:
        is_criterion(part, field, criterion)
    metrics = [criterion.metric for criterion in best]
    twice = next((metric for metric in metrics if metrics.count(metric) > 1), None)
    if twice is not None:
        raise ValueError(f'checkpoint: best has "{twice}" twice. To keep several of its best, give top=.')


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class checkpoint:
    """Save everything that the run needs to go on, in ``folder/epoch_0001-iteration_000100.pt`` and the like.

    Piped onto the run. Saving happens at the iteration's boundary, when every part is through with it, before
    its state is handed out. A file is written whole or not at all, synced and read back; older ones go only once the
    new one is safe. ``run.resume()`` goes on from the newest sound one, wherever in a pass it was saved.

    Every file also holds under ``"weights"`` a plain ``state_dict`` to load into a model: in a best file that of the
    model that the metric was measured on, else that of the first training phase's, with `AveragedModel`,
    `DataParallel` and the like taken off: ``model.load_state_dict(torch.load(file, weights_only=True)["weights"])``.

    Args:
        folder: Where to, made if missing. A folder that holds another run's checkpoints is refused, and one that
            another process writes to. The run lets it go when it rests or ends.
        every: How often: ``lt.rounds(1)`` (after the validation), ``lt.epochs(n)``, a number of training
            iterations, or a predicate of the state.
        keep: How many of the newest files stay; None for all.
        best: ``lt.highest("val/accuracy")`` or ``lt.lowest("val/loss")``, looked at whenever the metric's phase ends a
            pass, whatever *every* says: the best is kept in ``best.pt``, and ``run.best`` says what it was. Of a list
            of them, each has its own file, as in ``best-val-accuracy.pt``. With ``lt.highest(..., top=3)`` the three
            best are kept besides, named after their epoch and iteration and ranked in ``run.best[metric]["top"]``.
            What is not finite is never best; of equals the older one is.
        background: Write while training goes on, which stands still only for a copy of all tensors into memory that is
            kept for it: as much again as a file has, pinned for those of a GPU. One write at a time: the next save
            waits for the one before, and so do the end of the run, of ``with run:`` and of the process. What a write
            raises is raised once, at the next boundary or where it is waited for; ``next(run)`` then writes the same
            copy again. For large models: with a million parameters a save takes some hundredths of a second anyway,
            and the writing slows a loop on the CPU.
        at_end: Save when the run ends, if something was trained since the newest checkpoint; None for doing so where
            *every* is a number of iterations, epochs or the like.

    Raises:
        FileExistsError: If the folder holds checkpoints that the run was not resumed from, before it begins.
        LookupError: If nobody has written the metric after the first round.
        RuntimeError: If another process writes to the folder, before the run begins.
        TypeError: If something that is to be saved could not be loaded safely, by part and field: what can be seen
            when the run is built is refused there, the rest at the save.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> phase = lt.validate(model, [torch.ones(1, 1)], lambda model, batch: model(batch).mean())
        >>> run = lt.workflow([(phase, 1)], max_rounds=2) | lt.checkpoint(folder, best=lt.lowest("val/loss"))
        >>> results = run.to_end()
        >>> sorted(path.name for path in folder.iterdir())  # doctest: +NORMALIZE_WHITESPACE
        ['best.pt', 'checkpoints.json', 'epoch_0000-iteration_000000-2.pt', 'epoch_0000-iteration_000000.pt']
    """

    folder: Path = attrs.field(converter=Path, repr=str)
    every: int | Interval = attrs.field(factory=lambda: rounds(1), kw_only=True, converter=interval)
    keep: int | None = attrs.field(default=3, kw_only=True, validator=_count_or_none)
    best: tuple[highest, ...] = attrs.field(
        default=None,
        kw_only=True,
        converter=_criteria,
        validator=_are_best,
        repr=lambda best: repr(best[0] if len(best) == 1 else list(best)),
    )
    background: bool = attrs.field(default=False, kw_only=True, validator=attrs.validators.instance_of(bool))
    at_end: bool | None = attrs.field(
        default=None, kw_only=True, validator=attrs.validators.optional(attrs.validators.instance_of(bool))
    )
    only_looks: ClassVar[bool] = True
    _saver: Any = attrs.field(default=None, init=False, repr=False)  # the run's, from `on_build` on

    def on_build(self, run: Run) -> None:
        """See that the folder can be written to, and that all that is there already can be saved."""
        run.require_run_scope(self)
        run.require_folder(self.folder, "checkpoint")
        for slot in () if run.begun else run.cursor.run_slots:  # later, it takes the place of another one
            other = slot.part
            if isinstance(other, checkpoint) and other is not self:
                both = {criterion.metric for criterion in self.best} & {criterion.metric for criterion in other.best}
                if both:  # `run.best` is by metric: for the second one nothing would ever be better
                    raise ValueError(f"checkpoint: two parts keep the best {min(both)!r}. Give best= to one of them.")
        if self._saver is None:
            self._saver = run.saver(self.folder, self.keep, self.best, self.background)
        self._saver.check()

    def on_start(self, run: Run) -> None:
        """Take the folder; refuse one that holds what this run did not come from, or that another process has."""
        self._saver.start()

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        is_due: Any = self.every
        at_ends = isinstance(self.every, rounds | epochs | target)  # then there is nothing to ask within a pass
        saver = self._saver
        for state in states:
            if saver is not None and saver.writer.error is not None:
                saver.run.at_boundary(self._settle)
            if not state.replayed and (state.last or not at_ends):
                due = is_due(state)
                if due or (self.best and state.last):
                    if state.run is None:
                        raise RuntimeError("checkpoint: these states belong to no run, so there is nothing to save.")
                    state.run.at_boundary(self._save if due else self._save_if_best)
            yield state

    def on_end(self, run: Run) -> None:
        """Save the end of the run, if something was trained since the newest checkpoint."""
        self._saver.settle()  # before the run is over: after an error next(run) comes here again
        counts = isinstance(self.every, iterations | epochs | rounds | samples | seconds)
        wanted = counts if self.at_end is None else self.at_end
        if wanted and run.state is not None and self._saver.trained != run.progress.iteration:  # else resumed here
            self.save_now(run)

    def save_now(self, run: Run) -> Path:
        """Save *run* at this boundary, unless the newest checkpoint is of it already; then all is on the disk.

        Returns:
            The newest checkpoint.
        """
        path: Path = self._saver.save_now()
        return path

    def on_back(self, run: Run) -> None:
        """The run went back: it may take another course from here."""
        self._saver.go_back()

    def close(self) -> None:
        """Wait for what is being written in the background; let the folder go until the next save."""
        self._saver.close()

    def _save(self, run: Run) -> None:
        self._saver.save()

    def _save_if_best(self, run: Run) -> None:
        self._saver.save(only_best=True)

    def _settle(self, run: Run) -> None:
        if not interrupts.pending:  # a signal saves once more, and sees to what has failed
            self._saver.settle()
