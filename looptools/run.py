"""The user's handle on a training: a run is an iterator of states, with verbs for everything else."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from . import checkpoints, order, stepping
from .agenda import Agenda, agenda
from .checks import known, whole_number
from .cursor import Cursor
from .failures import Failed
from .intervals import highest
from .middleware.freeze import see_who_froze
from .phases import Phase
from .pipeline import Middleware, check
from .state import Progress, State
from .tracebacks import short_verbs, shorten
from .training_doubt import training_doubt
from .warn import warn


class Results(dict[str, float]):
    """The newest means, by phase and metric; a key that is not there says which are."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    def __missing__(self, key: str) -> float:
        if not self and not self._run.begun:
            raise KeyError(
                f"there is no {key!r}: the run has not begun. Go through it first: next(run), for state in run, or "
                "run.to_end()."
            )
        raise KeyError(f"nobody has written {key!r}; {known(key, self)}")

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # copied or pickled, it is plain numbers without their run


@short_verbs
class Run:
    """An iterator over the states of a whole training. Made by `workflow`.

    ``for state in run`` goes on where the run stands; after ``break``, an exception or Ctrl-C the next ``next(run)``
    loses nothing and repeats nothing. A run is built at its first use: until then ``run | middleware`` makes a new
    one. It has its own instances of the parts that were piped; what is piped is options.

    Attributes:
        progress: Counters of what is done so far; see `Progress`.
        results: The newest mean of every metric, as in ``run.results["val/accuracy"]``.
        history: A dictionary for every pass: phase, epoch, iteration, round, iterations of the pass, training
            iterations of the run after it (trained), seconds, on_demand if `validate` made it, and each mean under its
            own name.
        best: What `checkpoint` found best so far, by metric: its value, the epochs and iterations done by then, the
            file's name, and with ``top=`` the ranked list under ``"top"``.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> phase = lt.train(model, [torch.ones(4, 1)] * 3, lambda model, batch: model(batch).pow(2).mean())
        >>> run = lt.workflow([(phase | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1)), 1)], max_epochs=2)
        >>> next(run).iteration, [state.iteration for state in run.take(2)], len(run)
        (0, [1, 2], 6)
        >>> losses = run.to_end()
        >>> run.ended
        'finished: 2 epochs, 6 iterations'
    """

    def __init__(
        self, agenda: Agenda, middlewares: tuple[Middleware, ...] = (), snapshots: stepping.snapshots | None = None
    ) -> None:
        self._agenda = agenda
        self._middlewares = middlewares
        self._snapshots = snapshots
        self._cursor: Cursor | None = None
        self._optimizer: Any = None
        self.progress = Progress()
        self.results: dict[str, float] = Results(self)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, dict[str, Any]] = {}

    def __or__(self, middleware: Middleware) -> Run:
        if self._cursor is not None:
            raise RuntimeError("run | middleware: this run is built already. Pipe first, or use run.insert(...).")
        check(middleware, "run | middleware")
        return Run(self._agenda, (*self._middlewares, middleware), self._snapshots)

    @property
    def cursor(self) -> Cursor:
        """The machine inside; asking for it builds the run."""
        return self._cursor or self._build()

    def _build(self) -> Cursor:
        cursor = Cursor(self, self._agenda, self._middlewares, self.progress)
        try:
            self._cursor = cursor  # parts ask for it; if Ctrl-C strikes from here on, it is built anew
            checkpoints.look(cursor)
            order.check_order(cursor)
            cursor.unsure = training_doubt(cursor)
            self._optimizer = checkpoints.only(checkpoints.inventory(cursor).optimizers)
            for slot in cursor.slots:
                if hasattr(slot.part, "on_build"):
                    slot.part.on_build(self)
            see_who_froze(cursor)
            stepping.keep_snapshots(cursor, self._snapshots)
        except BaseException:
            self._cursor = None
            raise
        return cursor

    # Iterating

    def __iter__(self) -> Run:
        if self.ended:
            raise RuntimeError(
                f"run: it is over ({self.ended}), so there is nothing to iterate over. run.reset() starts it afresh "
                "(weights stay as they are), run.extend(max_epochs=...) moves its end."
            )
        return self

    def __next__(self) -> State:
        try:
            cursor = self._cursor or self._build()
            return cursor.work(cursor.iterate)
        except BaseException as error:
            shorten(error)
            raise

    def __len__(self) -> int:
        """States of the whole run.

        Raises:
            TypeError: If a source does not know its length.
        """
        return stepping.length(self.cursor)

    def __bool__(self) -> bool:
        return True

    def take(self, n: int) -> Iterator[State]:
        """The next *n* states, or as many as there are.

        Lazy: nothing happens before it is iterated over, which is said if it never is.
        """
        whole_number("take: n", n, 0)
        self._warn_if_over(f"run.take({n})")
        states = itertools.islice(iter(self.__next__, None), n)
        return stepping.Lazily(states, f"run.take({n})", f"for state in run.take({n})")

    def to_end(self) -> dict[str, float]:
        """Run to the end, if it is not there yet, and return ``run.results``."""
        for _ in iter(self.__next__, None):
            pass
        return self.results

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        """Put the run to sleep: files are flushed, workers released. ``next(run)`` wakes it."""
        if self._cursor is not None:
            self._cursor.rest()

    def close(self) -> None:
        """End the run here, and close every part."""
        if self._cursor is not None and not self.ended:
            self._cursor.require_rest("close")
            self._cursor.end("closed")

    def reset(self) -> None:
        """Start afresh at the next use: counters, parts' memory, results. Weights stay as they are."""
        if self._cursor is not None:
            self._cursor.require_rest("reset")
            self._cursor.overcome()
            self._cursor.rest()
        self._cursor = None
        self.progress = Progress()
        self.results, self.history, self.best = Results(self), [], {}

    def extend(
        self, *, max_epochs: int | None = None, max_iterations: int | None = None, max_rounds: int | None = None
    ) -> None:
        """Move the end of the run, finished or not; schedules stretch to the new one."""
        stepping.extend(self, max_epochs, max_iterations, max_rounds)

    # Where it stands

    @property
    def state(self) -> State | None:
        """The open iteration's state, or the one that was handed out last."""
        return None if self._cursor is None else self._cursor.state or self._cursor.handed

    @property
    def seconds(self) -> float:
        """Seconds at work until now."""
        return self.cursor.seconds

    @property
    def began(self) -> tuple[float, float]:
        """Seconds at work at which the iteration before this one began, and this one."""
        return self.cursor.began_before, self.cursor.began

    @property
    def ended(self) -> str:
        """Why the run is over; empty while it is not."""
        return "" if self._cursor is None else self._cursor.ended

    @property
    def begun(self) -> bool:
        """Whether it has begun its first iteration."""
        return self._cursor is not None and self._cursor.started

    @property
    def resumed(self) -> bool:
        """Whether it goes on from a checkpoint."""
        return self._cursor is not None and self._cursor.resumed_from is not None

    @property
    def failed(self) -> Failed | None:
        """The part that raised, its state and the exception; None once the run has gone on."""
        return None if self._cursor is None else self._cursor.failed

    @property
    def phase(self) -> Phase | None:
        """The phase whose pass is under way; None between two passes."""
        return None if self._cursor is None else self._cursor.passes.phase

    @property
    def model(self) -> Any:
        """The model of the first training phase, or of the first phase."""
        phases = sorted(self._agenda.phases, key=lambda phase: not phase.trains)
        return phases[0].model

    @property
    def optimizer(self) -> Any:
        """The optimizer of the run; a dictionary by name of several, None if there is none."""
        return self._optimizer

    def __getitem__(self, name: str) -> Any:
        """The part called *name*, as in ``run["train/clip_grad_norm"]``."""
        return stepping.find_slot(self.cursor, name).part

    def __repr__(self) -> str:
        return stepping.describe(self._agenda, self._cursor, self._middlewares)

    def _repr_html_(self) -> str:
        return stepping.html_of_run(self)

    # Stepping and surviving

    def retry(self) -> State:
        """Redo the open iteration from its batch, and return its state.

        Raises:
            RuntimeError: If it cannot be redone any more (the weights have moved, and no snapshots are kept);
                ``next(run)`` goes on then.
            LookupError: If it is dropped this time, and the run ends.
        """
        stepping.redo(self.cursor)
        state = next(self, None)
        if state is None:
            raise LookupError(f"retry: the iteration was dropped this time, and the run is over ({self.ended}).")
        return state

    def skip(self) -> None:
        """Drop the open iteration; ``next(run)`` goes on with the next batch.

        Where its gradients are in an open accumulation window, the window goes with it, with a warning.
        """
        cursor = self.cursor
        cursor.work(lambda: stepping.drop(cursor))

    def stages(self) -> Iterator[tuple[str, State]]:
        """Walk through one iteration, or the rest of the open one: yields (name, state) after each part.

        Lazy, as `take` is. A part that drops its state takes the next one up to its place at once; what that one went
        through is told afterwards.
        """
        self._warn_if_over("run.stages()")
        return stepping.Lazily(stepping.stages(self.cursor), "run.stages()", "for name, state in run.stages()")

    def _warn_if_over(self, verb: str) -> None:
        if self.ended:
            warn(
                f"{verb}: the run is over ({self.ended}), there are no more states. run.reset() or "
                "run.extend(max_epochs=...) goes on.",
                RuntimeWarning,
            )

    def after(self, name: str) -> State:
        """Go on until part *name* has seen a state, and return the state; ``next(run)`` completes it.

        Raises:
            LookupError: If there is no such part, several match, it is muted, or the run ends first.
        """
        return stepping.after(self.cursor, name)

    def before(self, name: str) -> State:
        """Go on until part *name* comes next, and return the state; ``next(run)`` completes it.

        Raises:
            LookupError: As for `after`.
        """
        return stepping.before(self.cursor, name)

    def until(
        self,
        when: Callable[[State], Any] | None = None,
        *,
        epoch: int | None = None,
        iteration: int | None = None,
        before: str | None = None,
    ) -> State:
        """Go on until *when* is true of a state, and return it: ``run.until(lambda s: s.grad_norm > 10)``.

        The iteration is complete then; with ``before="update"`` it stops as that part comes next. What *when* reads of
        a tensor waits for the device, in every iteration.

        Args:
            when: Asked of every state; what is None on it (no gradient norm in a validation) counts as not yet.
            epoch: Stop at the first training state of this epoch, counted from 0.
            iteration: Stop at this training iteration, counted from 0.
            before: A part, by its full or short name, to stop in front of.

        Raises:
            LookupError: If the run ends first, or there is no such part.
            ValueError: If it is behind already (`replay` goes back), or not exactly one is given.
        """
        return stepping.until(self.cursor, when, epoch=epoch, iteration=iteration, before=before)

    def until_nonfinite(self, *, before: str | None = None) -> State:
        """Go on until a loss, metric, gradient norm, gradient or weight is nan or infinite, and return that state.

        With ``before="update"`` before the optimizer has moved. The device is read once an iteration. Gradients under a
        GradScaler are left to it. `nonfinite` says what it was.

        Raises:
            LookupError: If the run ends first.
        """
        return stepping.until_nonfinite(self.cursor, before=before)

    def nonfinite(self) -> dict[str, float]:
        """What is nan or infinite in the open iteration, or the last one, by name. Waits for the device."""
        return stepping.nonfinite(self.cursor)

    def back(self, n: int = 1) -> None:
        """Go *n* iterations back, to the bit: ``next(run)`` then does them again. An open one is dropped first.

        Counted as ``next(run)`` counts, in states of all phases. From the nearest snapshot on it is computed again.

        Raises:
            RuntimeError: If no snapshots are kept: ``lt.workflow(..., snapshots=lt.snapshots())``.
            LookupError: If the oldest snapshot is newer than that.
        """
        stepping.back(self, n)

    def replay(self, iteration: int) -> None:
        """Go back to just before training iteration *iteration*, to the bit: ``next(run)`` does it again.

        Raises:
            RuntimeError: As for `back`.
            LookupError: As for `back`, or if the iteration is still to come.
        """
        stepping.replay(self, iteration)

    @property
    def snapshots(self) -> stepping.Ring | None:
        """The snapshots that are kept: their iterations and their size; None if none are."""
        return stepping.ring(self.cursor)

    def replace(self, *what: Any) -> None:
        """Swap a part or a step: ``run.replace("clip_grad_norm", part)``, or ``run.replace(classify)`` by its name.

        A step of another name: ``run.replace("classify", classify_better)``.

        Memory stays with the name if the class is the same.

        Raises:
            LookupError: If there is no such part.
            ValueError: If the order would not be right; nothing has changed then. So too for the verbs below.
        """
        stepping.replace(self.cursor, *what)

    def insert(self, part: Middleware, *, before: str | None = None, after: str | None = None) -> None:
        """Put one more part into the pipe, before or behind the one that is named: between any two iterations or parts.

        Raises:
            LookupError: If there is no such part, or several match.
        """
        stepping.insert(self.cursor, part, before=before, after=after)

    def remove(self, name: str) -> None:
        """Take the part called *name* out of the pipe, for good.

        Raises:
            LookupError: If there is no such part, or several match.
        """
        stepping.remove(self.cursor, name)

    def mute(self, name: str, on: bool = True) -> None:
        """Have states pass by the part called *name*, until ``run.mute(name, False)``. It keeps what it remembers.

        Raises:
            LookupError: If there is no such part, or several match.
        """
        stepping.mute(self.cursor, name, on)

    @property
    def changes(self) -> list[dict[str, Any]]:
        """What was replaced, inserted, removed or muted, and at which iteration; saved in checkpoints."""
        return stepping.changes(self.cursor)

    def explain(self) -> None:
        """Print the resolved pipe: every part with its options and what it ``reads -> writes`` on the state.

        Below stand the changes made since it was built, and doubts about the order with their cures.
        """
        print(stepping.explain(self.cursor))

    def simulate(self) -> stepping.Simulation:
        """Walk through the whole workflow without model and data: phases, learning rates, logs, checkpoints.

        Returns:
            A `Simulation`: printed it is a table; ``.plot()`` draws it (extra: ``plot``).

        Raises:
            RuntimeError: If an iteration is open.
            TypeError: If a training source has no length, unless max_iterations alone bounds the run.
        """
        return stepping.simulate(self)

    def trace(self) -> stepping.Trace:
        """Do one iteration, or the rest of the open one, and say what each part did and how long it took.

        Returns:
            A `Trace`: printed it is a table. It waits for the device at each part.

        Raises:
            LookupError: If the run is over.
        """
        return stepping.trace(self)

    @property
    def ledger(self) -> stepping.Ledger:
        """Counts by which parts and lines the device is waited for, from when it is first asked for.

        ``with run.ledger:`` counts your own loop's body, too; ``.stop()`` ends it, ``.reset()`` begins anew.
        """
        return stepping.ledger(self.cursor)

    def fork(
        self, n: int | None = None, /, *, folders: Iterable[str | Path] | None = None, **options: Any
    ) -> tuple[Run, ...]:
        """Make independent runs that go on from here: ``a, b = run.fork(lr=[1e-3, 3e-4])``, or ``run.fork(2)``.

        Each has its own weights, optimizers, place in the data and random generators. Parts that write files are muted,
        unless *folders* gives each run one.

        Args:
            n: How many; left out, as many as an option has values.
            folders: One for each run.
            options: Options of the param groups, a value for each run. Where a schedule sets the option, it is the base
                value that the schedule goes by, as if the optimizer had been made with it.

        Raises:
            RuntimeError: If an iteration is open, or a step, part or closure holds the original model.
        """
        return stepping.fork(self, n, folders, options)

    def validate(self, phase: Phase) -> dict[str, float]:
        """Run one pass of *phase* here and now: before training, or on demand between two iterations.

        Its means go to ``run.results``, ``run.history`` and the log; the workflow goes on as if nothing had been. It
        begins the run, so resume first. A phase that is not the workflow's, of a name that is taken, is ``val#2``.

        Returns:
            The means of the pass by their own names, as in ``{"accuracy": 0.97}``.

        Raises:
            RuntimeError: If an iteration is open.
        """
        return stepping.validate(self, phase)

    def rehearse(self, batches: int = 3) -> dict[str, float]:
        """Run *batches* batches of every phase, logs and a checkpoint going to a temporary folder; put all back.

        Returns:
            The results of the rehearsal.
        """
        return stepping.rehearse(self, batches)

    def resume(self, path: str | Path | None = None, *, accept: str | Iterable[str] = ()) -> Path | None:
        """Go on from the newest sound checkpoint of *path*, by default that of the checkpoint part's own folder.

        The run then stands where it was saved, also in the middle of a pass, and ends with the bits that it would have
        ended with. Damaged files are said, set aside, and the one before is taken.

        Args:
            path: A folder, or one file.
            accept: What may differ from the run that was saved: ``"data"``, ``"batch_size"``, ``"world_size"``,
                ``"seed"``, ``"pipe"``, one or several. Parts that only look (`log`, `timer` ...) may come and go.

        Returns:
            The file, or None if there is none: a fresh start.

        Raises:
            RuntimeError: If the run has begun, all files are damaged, or something differs that is not accepted; then
                nothing was changed.
        """
        return checkpoints.resume(self, path, accept)

    # For parts

    def stop(self, why: str) -> None:
        """End the run at the next boundary."""
        self.cursor.stop(why)

    def at_boundary(self, action: Callable[[Run], Any]) -> None:
        """Have *action* done once all parts are through with this iteration, before its state is handed out."""
        self.cursor.at_boundary.append(action)

    def record(self, state: State, means: dict[str, float]) -> None:
        """Take in the means of the pass that *state* ends."""
        prefix = f"{state.phase}/"
        for key in [key for key in self.results if key.startswith(prefix)]:
            del self.results[key]
        self.results.update({prefix + key: value for key, value in means.items()})
        facts = {"phase": state.phase, "epoch": state.epoch, "iteration": state.iteration}
        cursor = self.cursor
        seconds = round(cursor.seconds - cursor.passes.began, 3)
        trained = cursor.progress.iteration + state.trains  # counted at the boundary that follows
        facts |= {"round": cursor.progress.round, "iterations": state.index + 1, "trained": trained, "seconds": seconds}
        made = checkpoints.take_untold(cursor)
        told = {"changes": made} if made and "changes" not in means else {}
        self.history.append({**facts, **means, **facts, **told})  # facts come first, and win over a metric of the name

    def total(self, by: str, optimizer: Optimizer | None = None, epochs: int | None = None) -> int | None:
        """How many updates (of *optimizer*), iterations or epochs the whole run has, or its first *epochs*.

        None if that cannot be known.
        """
        return stepping.total(self.cursor, by, optimizer, epochs)

    def batches_after(self, part: Any) -> int | None:
        """Iterations that go through *part* after the pass under way; None if that cannot be known."""
        return stepping.batches_after(self.cursor, part)

    def is_last(self, state: State) -> bool:
        """What ``state.last`` asks."""
        return self.cursor.is_last(state)

    def is_round_last(self, state: State) -> bool:
        """What ``state.round_last`` asks."""
        return self.cursor.passes.is_round_last()

    def require_run_scope(self, part: Any) -> None:
        """Refuse *part* within a phase: it reads what `average` writes behind all other parts."""
        name = type(part).__name__
        if any(slot.part is part and not slot.of_run for slot in self.cursor.slots):
            raise TypeError(f"{name}: pipe it onto the run, not onto a phase: lt.workflow(...) | lt.{name}(...).")

    def require_folder(self, folder: Path, part: str) -> None:
        """Make *folder*, and refuse one that cannot be written to."""
        checkpoints.require_folder(folder, part)

    def saver(self, folder: Path, keep: int | None, best: tuple[highest, ...], background: bool) -> checkpoints.Saver:
        """What a part saves the run with, again and again."""
        return checkpoints.saver(self, folder, keep, best, background)

    def save(self, folder: str | Path, **options: Any) -> Path:
        """Write a checkpoint into *folder*, made if missing, between two iterations; all of them stay.

        A function of the workflow that calls it runs once more from its beginning when the run is resumed there.

        Returns:
            The file. ``run.resume(folder)`` goes on from it.

        Raises:
            FileExistsError: If the folder holds another run's checkpoints.
            RuntimeError: If an iteration is open.
        """
        return checkpoints.save(self, folder, **options)


def workflow(
    entries: Iterable[Any],
    *,
    max_epochs: int | None = None,
    max_iterations: int | None = None,
    max_rounds: int | None = None,
    snapshots: stepping.snapshots | None = None,
) -> Run:
    """Make a run that walks through *entries* again and again, until training is done.

    Training stops at exactly the given bound, even inside an entry; the rest of that round still runs.

    Args:
        entries: Pairs ``(phase, n)``: n passes of the phase, or with ``lt.iterations(n)`` one pass of n batches,
            for which the source begins again as often as needed. A training source goes on in the next such pass
            where it stood, a validation source begins anew. A pair ``(function, n)`` calls ``function(run)``.
        max_epochs: Training passes of the whole run.
        max_iterations: Training iterations of the whole run.
        max_rounds: Walks through the entries.
        snapshots: ``lt.snapshots(every=50, keep=4)`` for `Run.back`, `Run.replay` and exact rollback of failures.

    Raises:
        ValueError: If the run could never end, or a source is empty.
        TypeError: If an entry is not such a pair.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> step = lambda model, batch: {"output": model(batch).mean()}
        >>> train, val = lt.train(model, [torch.ones(1, 1)] * 2, step), lt.validate(model, [torch.ones(1, 1)], step)
        >>> [f"{state.phase} {state.epoch}" for state in lt.workflow([(train, 1), (val, 1)], max_epochs=2)]
        ['train 0', 'train 0', 'val 0', 'train 1', 'train 1', 'val 1']
    """
    return Run(agenda(entries, max_epochs, max_iterations, max_rounds), (), stepping.require_snapshots(snapshots))
