"""Stopping when enough is done."""

from __future__ import annotations

import pytest
import torch

import looptools as lt


def training(*parts, epochs=3):
    """Three epochs of four batches, of 3, 3, 3 and 1 samples, with a validation each."""
    data = [torch.ones(n) for n in (3, 3, 3, 1)]
    step = lambda model, batch: {"x": batch.sum()}  # noqa: E731
    entries = [(lt.train(None, data, step), 1), (lt.validate(None, data[:2], step), 1)]
    run = lt.workflow(entries, max_epochs=epochs)
    for part in parts:
        run = run | part
    return run


@pytest.mark.parametrize(
    ("when", "states", "reason"),
    [
        (5, 4 + 2 + 1, "5 iterations"),
        (lt.iterations(1), 1, "1 iteration"),
        (lt.epochs(2), 4 + 2 + 4, "2 epochs"),
        (lt.rounds(2), 4 + 2 + 4 + 2, "2 rounds"),
        (lt.samples(10), 4, "10 samples"),
        (lt.samples(11), 4 + 2 + 1, "11 samples"),
        (lt.target("val/x", at_least=3.0), 4 + 2, "val/x is at least 3"),
        (lt.target("train/x", at_most=3), 4, "train/x is at most 3"),
    ],
)
def test_when(when, states, reason):
    """At that iteration's boundary: its state is the last one that is handed out."""
    run = training(lt.stop_after(when))

    assert len(list(run)) == states
    assert run.ended == f"stop_after: {reason}"


def test_a_predicate_stops_when_it_first_says_so():
    """Any function of the state; its name is the reason."""

    def enough(state):
        return state.phase == "val" and state.index == 1

    run = training(lt.stop_after(enough))

    assert len(list(run)) == 6
    assert run.ended == "stop_after: enough"


def test_a_target_that_is_not_reached_lets_the_run_end_by_itself():
    """The schedule of the run is its own."""
    run = training(lt.stop_after(lt.target("val/x", at_least=3.1)))
    run.to_end()

    assert run.ended == "finished: 3 epochs, 12 iterations"


def test_seconds_count_the_work_of_resumed_runs_too(tmp_path, monkeypatch):
    """A clock that ticks at each look; a resumed run has done what its checkpoint says."""
    clock = iter(range(10_000))
    monkeypatch.setattr("looptools.cursor.perf_counter", lambda: float(next(clock)))
    whole = training(lt.stop_after(lt.seconds(60)), epochs=100)
    whole.to_end()
    first = training(lt.checkpoint(tmp_path), lt.stop_after(lt.seconds(60)), epochs=100)
    list(first.take(6))
    run = training(lt.checkpoint(tmp_path), lt.stop_after(lt.seconds(60)), epochs=100)
    run.resume()
    assert 0 < run.progress.seconds < 60
    run.to_end()

    assert whole.ended == run.ended == "stop_after: 60 seconds at work"
    assert whole.progress.seconds >= 60
    assert run.progress.seconds >= 60


@pytest.mark.parametrize(("when", "ended"), [(4, "finished: 3 epochs, 12 iterations"), (9, "stop_after: 9 iterations")])
@pytest.mark.filterwarnings("ignore:resume. since the checkpoint was saved:UserWarning")
def test_it_stops_once_and_an_extended_run_goes_on(tmp_path, when, ended):
    """Resumed, it stays stopped until then; another bound holds anew."""
    every = lt.epochs(1)
    training(lt.checkpoint(tmp_path, every=every), lt.stop_after(4)).to_end()
    run = training(lt.checkpoint(tmp_path, every=every), lt.stop_after(when))
    run.resume()

    assert next(run, None) is None
    assert run.ended == "stop_after: 4 iterations"
    run.extend(max_epochs=3)
    run.to_end()
    assert run.ended == ended


def test_a_bound_whose_own_iteration_was_dropped_still_holds():
    """The next one that comes stops the run."""

    def drops(states):
        for state in states:
            if state.iteration != 1:
                yield state

    phase = lt.train(None, [1.0] * 5, lambda model, batch: {"x": batch}) | drops
    run = lt.workflow([(phase, 1)], max_epochs=1) | lt.stop_after(2)

    assert [state.iteration for state in run] == [0, 2]


@pytest.mark.parametrize("when", [0, 1.5, "soon", None, lt.epochs])
def test_bad_bounds_are_refused(when):
    """Where they are typed."""
    with pytest.raises((TypeError, ValueError), match="must be"):
        lt.stop_after(when)


def test_it_belongs_onto_the_run():
    """Within a phase it would see only that one."""
    phase = lt.train(None, [1.0], lambda model, batch: {"x": batch}) | lt.stop_after(1)
    with pytest.raises(TypeError, match="stop_after: pipe it onto the run, not onto a phase"):
        next(lt.workflow([(phase, 1)], max_epochs=1))


def test_another_predicate_holds_anew_in_a_resumed_run(tmp_path):
    """Both are called lambda; the one that stopped does not stop an extended run again."""
    every = lt.epochs(1)
    make = lambda when: training(lt.checkpoint(tmp_path, every=every), lt.stop_after(when))  # noqa: E731
    make(lambda state: state.iteration >= 3).to_end()
    for bound, ended in [(3, "finished: 3 epochs, 12 iterations"), (8, "stop_after: lambda")]:
        run = make(lambda state, bound=bound: state.iteration >= bound)
        run.resume(tmp_path / "epoch_0001-iteration_000004.pt")
        assert next(run, None) is None
        run.extend(max_epochs=3)
        iterations = [state.iteration for state in run if state.trains]
        assert (iterations[-1], run.ended) == (11 if bound == 3 else 8, ended)


def test_a_predicate_of_training_states_stops_once():
    """That it is false in validation says nothing."""
    run = training(lt.stop_after(lambda state: state.trains and state.iteration >= 2))
    run.to_end()
    run.extend(max_epochs=3)
    run.to_end()

    assert run.ended == "finished: 3 epochs, 12 iterations"


def test_a_state_that_was_dropped_counts_no_samples():
    """The pass's last state of one sample is dropped: the tenth comes with the next pass."""

    def drops(states):
        for state in states:
            if state.index != 3:
                yield state

    phase = lt.train(None, [torch.ones(n) for n in (3, 3, 3, 1)], lambda model, batch: {"x": batch.sum()}) | drops
    run = lt.workflow([(phase, 1)], max_epochs=2) | lt.stop_after(lt.samples(10))

    assert [state.index for state in run] == [0, 1, 2, 0]
    assert run.progress.samples == 12


def test_a_target_is_reached_by_a_validation_beside_the_workflow():
    """By a function in the workflow, or on demand."""
    val = lt.validate(None, [2.0], lambda model, batch: {"x": batch})
    train = lt.train(None, [1.0] * 2, lambda model, batch: {"x": batch})
    part = lt.stop_after(lt.target("val/x", at_least=2.0))
    run = lt.workflow([(train, 1), (lambda run: run.validate(val), 1)], max_epochs=3) | part
    assert len(list(run)) == 2
    assert run.ended == "stop_after: val/x is at least 2"

    run = lt.workflow([(train, 1)], max_epochs=3) | part
    next(run)
    run.validate(val)
    assert next(run, None) is None
