"""Validate here and now, beside the workflow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import attrs

from ..agenda import Agenda, Entry
from ..cursor import Cursor
from ..modes import set_mode
from ..phases import Phase
from ..state import State
from .mended import mended

if TYPE_CHECKING:
    from ..run import Run


def validate(run: Run, phase: Phase) -> dict[str, float]:
    """Run one pass of *phase* between two iterations of *run*, which then goes on as if nothing had been.

    The pass has new instances of the phase's parts, its states the epoch and iteration of the last training state.
    Parts of the run do not see them; those with a method ``on_results(state)``, as `log` and `early_stop` have, get the
    pass's last one.
    The model is left in the mode that it was in. What is drawn from the random generators, by shuffling or by the
    loader itself, is drawn as in a loop by hand that validates there. With the very loader of a pass that is under way,
    whose workers persist, these are made anew, and random transforms in them go on with other numbers.

    Args:
        run: The run.
        phase: One of its workflow, with what was replaced in it, or another one. Another one of the same name is called
            ``val#2``.

    Returns:
        The means by their own names; none if a part stopped the run before the pass was over.

    Raises:
        RuntimeError: If an iteration is open, or the phase's source can be walked through only once.
        TypeError: If *phase* is not a validation phase.
    """
    cursor = run.cursor
    _check(cursor, phase)
    cursor.start()
    ended: list[State] = []

    def note_the_last(states: Iterable[State]) -> Iterator[State]:
        for state in states:
            if state.last:
                ended.append(state)
            yield state

    beside = _beside(run, phase, note_the_last)
    training = getattr(phase.model, "training", None)
    try:
        beside.to_end()
    except Exception as error:
        failed, notes = beside.failed, getattr(error, "__notes__", [])
        if failed is not None and failed.verbs in notes:
            notes.remove(failed.verbs)  # its verbs are those of a run that nobody holds
        error.add_note("looptools: run.validate is given up; the run itself stands where it stood.")
        raise
    finally:
        beside.close()
        if not cursor._working:  # else a callable in the workflow validates, and its time counts already
            run.progress.seconds += beside.progress.seconds
        if training is not None and phase.model.training is not training:
            set_mode(phase.model, training)
    if beside.cursor.stopping:
        run.stop(beside.cursor.stopping)
    return _take_over(run, beside, ended[-1]) if ended else {}


def _check(cursor: Cursor, phase: Any) -> None:
    if not isinstance(phase, Phase):
        raise TypeError(f"validate: give a phase, as in run.validate(lt.validate(model, loader, step)), got {phase!r}.")
    if phase.trains:
        raise TypeError(f"validate: {phase.name} is a training phase. Run it by itself: {phase.name}.to_end().")
    if cursor.state is not None:
        raise RuntimeError("validate: an iteration is open. Finish it first: next(run).")
    if hasattr(phase.source, "__next__") and id(phase) in cursor.passes.names:
        raise RuntimeError(
            f"validate: the source of {phase.name} can be walked through only once; the workflow would miss it. "
            "Give a function that makes it anew (lambda: ...)."
        )


def _beside(run: Run, phase: Phase, part: Any) -> Run:
    """A run of one pass that stands where *run* stands."""
    passes, done = run.cursor.passes, run.progress
    for source in passes.sources.values():
        if source.given is phase.source and source.under_way and getattr(phase.source, "persistent_workers", False):
            source.release()  # workers that a loader keeps serve one walk at a time; the place is found again
    name = passes.names.get(id(phase), phase.name)
    if id(phase) not in passes.names and name in passes.names.values():
        taken = set(passes.names.values())
        name = next(f"{name}#{n}" for n in range(2, len(taken) + 3) if f"{name}#{n}" not in taken)
    entry = Entry(attrs.evolve(mended(run.cursor, phase), name=name), 1)
    beside = type(run)(Agenda((entry,), max_rounds=done.round + 1), (part,))
    in_training = passes.phase is not None and passes.phase.trains
    beside.progress.epoch = done.epoch + in_training  # a state bears the number of the last pass, or of the open one
    beside.progress.iteration, beside.progress.round = done.iteration, done.round
    within = beside.cursor.passes
    within.epochs, within.iterations = passes.epochs, passes.iterations  # the horizon is that of the run
    beside._optimizer = run.optimizer
    return beside


def _take_over(run: Run, beside: Run, state: State) -> dict[str, float]:
    """Give *run* the results of the pass that ended with *state*, and its parts the news."""
    prefix = f"{state.phase}/"
    for key in [key for key in run.results if key.startswith(prefix)]:
        del run.results[key]
    run.results.update(beside.results)
    run.history.append({**beside.history[-1], "on_demand": True})
    state.run, state.round_last = run, False  # the workflow's round goes on
    for slot in run.cursor.run_slots:
        if hasattr(slot.part, "on_results") and not slot.muted:
            slot.part.on_results(state)
            if run.ended and hasattr(slot.part, "close"):
                slot.part.close()  # nobody else would
    if run.cursor.keeper is not None:
        run.cursor.keeper.touched = True  # computed again, nobody would validate here
    return {key.removeprefix(prefix): value for key, value in beside.results.items()}
