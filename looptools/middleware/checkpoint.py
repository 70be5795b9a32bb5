"""Save the run every so often."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from ..checks import whole
from ..intervals import Interval, epochs, highest, interval, rounds
from ..state import State

if TYPE_CHECKING:
    from ..run import Run


def _count_or_none(part: Any, field: Any, value: Any) -> None:
    if value is not None:
        whole()(part, field, value)


def _is_best(part: Any, field: Any, best: Any) -> None:
    if best is not None and not isinstance(best, highest):
        raise TypeError(f'checkpoint: best must be lt.highest("val/accuracy") or lt.lowest(...), got {best!r}.')


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class checkpoint:
    """Save everything that the run needs to go on, in ``folder/epoch_0001-iteration_000100.pt`` and the like.

    Piped onto the run. Saving happens at the iteration's boundary, when every part is through with it, before
    its state is handed out. A file is written whole or not at all; older ones go only once the new one is safe.
    ``run.resume()`` goes on from the newest sound one.

    Args:
        folder: Where to, made if missing. A folder that holds another run's checkpoints is refused.
        every: How often: ``lt.rounds(1)`` (after the validation), ``lt.epochs(n)``, a number of training
            iterations, or a predicate of the state. ``run.resume()`` goes on from the newest that was saved at the
            end of a pass; those in the middle of one hold the weights, but cannot be gone on from yet.
        keep: How many of the newest files stay; None for all. The newest that can be gone on from always stays.
        best: ``lt.highest("val/accuracy")`` or ``lt.lowest("val/loss")``, looked at after every pass, whatever
            *every* says: the best is kept in ``best.pt``, and ``run.best`` says what it was. What is not finite is
            never best. The weights alone: ``torch.load("best.pt", weights_only=True)["models"]["model"]``.

    Raises:
        FileExistsError: If the folder holds checkpoints that the run was not resumed from, before it begins.
        LookupError: If nobody has written the metric after the first round.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> phase = lt.validate(model, [torch.ones(1, 1)], lambda model, batch: model(batch).mean())
        >>> run = lt.workflow([(phase, 1)], max_rounds=2) | lt.checkpoint(folder, best=lt.lowest("val/loss"))
        >>> results = run.to_end()
        >>> sorted(path.name for path in folder.iterdir())  # doctest: +NORMALIZE_WHITESPACE
        ['best.pt', 'checkpoints.json', 'epoch_0000-iteration_000000-2.pt', 'epoch_0000-iteration_000000.pt']
    """

    folder: Path = attrs.field(converter=Path)
    every: int | Interval = attrs.field(factory=lambda: rounds(1), kw_only=True, converter=interval)
    keep: int | None = attrs.field(default=3, kw_only=True, validator=_count_or_none)
    best: highest | None = attrs.field(default=None, kw_only=True, validator=_is_best)

    def on_build(self, run: Run) -> None:
        """See that the folder can be written to."""
        run.require_run_scope(self)
        run.require_folder(self.folder, "checkpoint")

    def on_start(self, run: Run) -> None:
        """Refuse a folder that holds what this run did not come from."""
        run.require_own(self.folder)

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        is_due: Any = self.every
        at_ends = isinstance(self.every, rounds | epochs)  # then there is nothing to ask within a pass
        for state in states:
            if not state.replayed and (state.last or not at_ends):
                due = is_due(state)
                if due or (self.best is not None and state.last):
                    if state.run is None:
                        raise RuntimeError("checkpoint: these states belong to no run, so there is nothing to save.")
                    state.run.at_boundary(self._save if due else self._save_if_best)
            yield state

    def _save(self, run: Run) -> None:
        run.save(self.folder, keep=self.keep, best=self.best)

    def _save_if_best(self, run: Run) -> None:
        run.save(self.folder, keep=self.keep, best=self.best, only_best=True)
