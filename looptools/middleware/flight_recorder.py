"""Leave a file of the iteration that went wrong."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from ..checks import whole
from ..means import number
from ..state import State

if TYPE_CHECKING:
    from ..run import Run


def _is_count(part: Any, field: Any, value: Any) -> None:
    if value is not None:
        whole()(part, field, value)


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class flight_recorder:
    r"""Leave a file when something raises, or a loss is not finite: `reopen` stands just before that iteration again.

    Piped onto the run. Whatever raises within an iteration (a part, the step, what was to be done at its boundary), or
    as its batch is fetched, leaves ``folder/crash_0001-epoch_0003-iteration_000812.pt``; a note on the exception, which
    goes its way, says so. Of a loss that is nan or infinite it warns, and the run goes on; the next such file is
    written once a finite one came. Ctrl-C and SystemExit leave no file, nor do functions of the workflow and what
    raises as a run starts or ends: what these had changed is not known.

    The file is a checkpoint of the iteration's beginning: batch, random generators, weights, optimizers, what parts
    remember, counters. Besides it says what was wrong, with the traceback as text, and the versions. It holds plain
    values and tensors only. A batch of a class of your own, and one that was changed in place, is described; its
    iteration is reopened with a batch from the source. ``python -m looptools inspect FILE`` shows what a file says.

    Costs, as long as nothing happens: at the beginning of each iteration weights, buffers, optimizers and what parts
    remember are copied, on their device, which takes as much memory as they do; and with *nonfinite* the device is read
    once an iteration. While a file is written, the run's present state is copied as well. As with snapshots, a failure
    in the middle of a part that changes things is rolled back, and `Run.retry` redoes any open iteration.

    Args:
        folder: Where to; made with its first file, but checked when the run is built.
        keep: How many of the newest files of the folder stay; None for all.
        nonfinite: Whether to look at each loss, where this part stands in the pipe; what `nan_guard` drops does not
            come here.

    Raises:
        OSError: If the folder cannot be made or written to, when the run is built.
        TypeError: If something of the run could not be loaded again safely, by part and field, when it is built.

    Example:
        >>> def step(model, batch):
        ...     return model(batch).sum() / (batch[0, 0] != 2)
        >>> model = torch.nn.Linear(1, 1)
        >>> def piped():
        ...     sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     train = lt.train(model, [torch.full((1, 1), n) for n in (1.0, 2.0, 3.0)], step) | lt.optimize(sgd)
        ...     return lt.workflow([(train, 1)], max_epochs=1)
        >>> import pytest
        >>> with pytest.warns(UserWarning, match=r"flight_recorder: loss is -?inf \(iteration 1, epoch 0"):
        ...     results = (piped() | lt.flight_recorder(folder)).to_end()
        >>> run = lt.reopen(folder, piped())
        >>> run.state.iteration, run.state.batch
        (1, tensor([[2.]]))
    """

    folder: Path = attrs.field(converter=Path, repr=str)
    keep: int | None = attrs.field(default=5, kw_only=True, validator=_is_count)
    nonfinite: bool = attrs.field(default=True, kw_only=True, validator=attrs.validators.instance_of(bool))
    only_looks: ClassVar[bool] = True
    _recorder: Any = attrs.field(default=None, init=False, repr=False)  # the run's
    _place: Path | None = attrs.field(default=None, init=False, repr=False)  # the folder, wherever the process goes

    @property
    def place(self) -> Path:
        """The folder, wherever the process goes."""
        return self._place or self.folder

    def on_build(self, run: Run) -> None:
        """See that the folder can be written to."""
        run.require_run_scope(self)
        self._place = self.folder.absolute()
        require_writable(self._place)

    def records_with(self, recorder: Any) -> None:
        """The run gives what sees each failure, and writes files."""
        self._recorder = recorder

    def on_start(self, run: Run) -> None:
        """See that there is one."""
        if self._recorder is None:
            raise RuntimeError(
                "flight_recorder: it has to be there when the run is built, to keep the beginning of each iteration. "
                "Pipe it on: run | lt.flight_recorder(folder)."
            )

    def carry_over(self, old: flight_recorder) -> None:
        """Take the place of *old*."""
        self._recorder = old._recorder

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        for state in states:
            if self.nonfinite and state.loss is not None and not (state.dropped or state.replayed):
                self._look(state)
            yield state

    def _look(self, state: State) -> None:
        if self._recorder is not None:  # else these states belong to no run
            loss = number(state.loss)  # type: ignore[arg-type]
            self._recorder.looked_at(state, "" if math.isfinite(loss) else f"loss is {loss}")


def require_writable(folder: Path) -> None:
    """See that files can be written to *folder*, which is not made yet.

    Raises:
        OSError: If not.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        error.add_note(f"flight_recorder: cannot write to {folder}. Give a folder that can be made and written to.")
        raise
