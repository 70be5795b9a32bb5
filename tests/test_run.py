"""Which pass comes when, and what each state says of it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import looptools as lt


def phases(lengths, known=True):
    """Phases t0, t1, ... and v0, v1, ... over sources of the given lengths."""
    made = {}
    for name, length in lengths.items():
        batches = [torch.ones(1)] * length
        make = lt.train if name.startswith("t") else lt.validate
        made[name] = make(None, batches if known else lambda batches=batches: iter(batches), lambda m, b: b, name=name)
    return made


def expected(entries, lengths, max_epochs, max_iterations):
    """What a reader would write down by hand: phase, epoch, index, iteration, first, last, round_last."""
    rows, epoch, iteration = [], 0, 0

    def done():
        return (max_epochs is not None and epoch >= max_epochs) or (
            max_iterations is not None and iteration >= max_iterations
        )

    while not done():
        before = len(rows)
        for name, passes, batches in entries:
            for _ in range(passes):
                trains = name.startswith("t")
                if trains and done():
                    break
                count = batches or lengths[name]
                if trains and max_iterations is not None:
                    count = min(count, max_iterations - iteration)
                for index in range(count):
                    e, i = (epoch, iteration) if trains else (max(epoch - 1, 0), max(iteration - 1, 0))
                    rows.append([name, e, index, i, index == 0, index == count - 1, False])
                    iteration += trains
                epoch += trains
        if len(rows) > before:
            rows[-1][-1] = True
    return [tuple(row) for row in rows]


ENTRY = st.tuples(st.sampled_from(["t0", "t1", "v0", "v1"]), st.integers(1, 3), st.one_of(st.none(), st.integers(1, 7)))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(ENTRY, min_size=1, max_size=4),
    st.fixed_dictionaries({name: st.integers(1, 4) for name in ("t0", "t1", "v0", "v1")}),
    st.one_of(st.none(), st.integers(1, 5)),
    st.one_of(st.none(), st.integers(1, 20)),
    st.booleans(),
)
def test_every_state_bears_the_facts_that_a_reader_would_write_down(entries, lengths, epochs, iterations, known):
    """Any workflow, with lengths known or not: the same states with the same counters as counted by hand."""
    if (epochs is None and iterations is None) or not any(name.startswith("t") for name, *_ in entries):
        return
    entries = [(name, 1 if batches else passes, batches) for name, passes, batches in entries]
    made = phases(lengths, known)
    pairs = [(made[name], lt.iterations(batches) if batches else passes) for name, passes, batches in entries]
    run = lt.workflow(pairs, max_epochs=epochs, max_iterations=iterations)

    rows = [(s.phase, s.epoch, s.index, s.iteration, s.first, s.last, s.round_last) for s in run]

    want = expected(entries, lengths, epochs, iterations)
    assert rows == want
    assert run.progress.round == sum(row[-1] for row in want)
    if known:
        again = lt.workflow(pairs, max_epochs=epochs, max_iterations=iterations)
        assert len(again) == len(want)
        trained = [row for row in want if row[0].startswith("t")]
        assert again.total("iteration") == len(trained)
        assert again.total("epoch") == sum(row[5] for row in trained)


def test_training_stops_at_max_epochs_and_the_round_goes_on(model):
    """`(train, 2), (val, 1)` with three epochs: the last round trains once, and validates."""
    made = phases({"t": 1, "v": 1})

    run = lt.workflow([(made["t"], 2), (made["v"], 1)], max_epochs=3)

    assert [state.phase for state in run] == ["t", "t", "v", "t", "v"]
    assert run.ended == "finished: 3 epochs, 3 iterations"


def test_an_entry_by_iterations_goes_on_where_the_source_stood():
    """Training takes 2 of [0, 1, 2] at a time and goes on; validation begins anew."""
    train = lt.train(None, [0, 1, 2], lambda model, batch: {"n": batch})
    val = lt.validate(None, [0, 1, 2], lambda model, batch: {"n": batch})
    run = lt.workflow([(train, lt.iterations(2)), (val, lt.iterations(2))], max_iterations=6)

    seen = [(state.phase, state.batch, state.first, state.last) for state in run]

    assert [batch for phase, batch, *_ in seen if phase == "train"] == [0, 1, 2, 0, 1, 2]
    assert [batch for phase, batch, *_ in seen if phase == "val"] == [0, 1, 0, 1, 0, 1]
    assert [row[2:] for row in seen] == [(True, False), (False, True)] * 6


def test_a_callable_entry_is_called_with_the_run():
    """A function stands in a workflow like a phase; it is called in its turn, makes no state and moves no counter."""
    made, calls = phases({"t": 2, "v": 1}), []

    run = lt.workflow([(made["t"], 1), (lambda run: calls.append(run.progress.iteration), 2)], max_epochs=2)

    assert [state.round_last for state in run] == [False, True, False, True]
    assert calls == [2, 2, 4, 4]


@pytest.mark.parametrize(
    ("entries", "bounds", "message"),
    [
        ([("t", 1)], {}, "it would never end"),
        ([("v", 1)], {"max_epochs": 3}, "without a training phase it would never end"),
        ([], {"max_epochs": 1}, "there is no phase in it"),
        ([("t", 0)], {"max_epochs": 1}, "must be at least 1, got 0"),
        ([("t", 1)], {"max_epochs": 0}, "max_epochs must be at least 1, got 0"),
    ],
)
def test_what_could_never_end_is_refused(entries, bounds, message):
    """A workflow without an end, or with nothing to do, is an error where it is typed."""
    made = phases({"t": 1, "v": 1})

    with pytest.raises(ValueError, match=message):
        lt.workflow([(made[name], n) for name, n in entries], **bounds)


@pytest.mark.parametrize("entry", ["train", 3, ("train", 1), (torch.nn.Linear, 1), ("a", "b", "c")])
def test_entries_that_are_no_pairs_of_a_phase_and_a_count_are_refused(entry):
    """The error names the entry's number."""
    with pytest.raises(TypeError, match="workflow: entry 1 must"):
        lt.workflow([entry], max_epochs=1)


def test_a_phase_without_a_count_says_what_to_write():
    """`workflow([train])` is the commonest slip."""
    with pytest.raises(TypeError, match=r"entry 1 is a phase without a count. Write \(t, 1\)"):
        lt.workflow([phases({"t": 1})["t"]], max_epochs=1)


def test_two_phases_of_one_name_are_told_apart():
    """The second `train` is `train#2` in states, results and part names; the same phase twice is one."""
    first, second = (lt.train(None, [torch.ones(1)], lambda model, batch: batch) for _ in range(2))
    run = lt.workflow([(first, 1), (second, 1), (first, 1)], max_epochs=3)

    assert [state.phase for state in run] == ["train", "train#2", "train"]
    assert set(run.results) == {"train/loss", "train#2/loss"}
    assert run["train#2/forward"] is not run["train/forward"]


def test_piping_onto_a_run_that_has_begun_is_refused(model):
    """`run | part` makes a new run, so it is only allowed before the run is built."""
    run = lt.workflow([(phases({"t": 2})["t"], 1)], max_epochs=1)
    next(run)

    with pytest.raises(RuntimeError, match="this run is built already"):
        run | lt.log()


def test_what_is_piped_is_options_and_each_run_has_its_own_parts(model, sgd, batches):
    """Making a run twice of the same phase starts afresh: parts share no memory."""
    phase = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd, accumulate=2)
    first, second = (lt.workflow([(phase, 1)], max_epochs=1) for _ in range(2))

    next(first)

    assert first["train/backward"].filled == 1
    assert second["train/backward"].filled == 0


def test_a_part_of_a_plain_class_is_copied_for_each_run(batches):
    """Its attributes at the time of the build; each run counts for itself."""

    class Counts:
        seen = 0

        def __call__(self, states):
            for state in states:
                self.seen += 1
                yield state

    part = Counts()
    phase = lt.train(None, batches, lambda model, batch: {"x": 1.0}) | part
    runs = [lt.workflow([(phase, 1)], max_epochs=1) for _ in range(2)]
    for run in runs:
        run.to_end()

    assert [run["train/Counts"].seen for run in runs] == [3, 3]
    assert part.seen == 0


def test_extend_moves_the_end_and_schedules_stretch(model, sgd, batches):
    """A finished run goes on after `extend`, with the learning rate of the longer schedule."""
    train = lt.train(model, batches, lambda model, batch: model(batch))
    run = lt.workflow([(train | lt.schedule_lr(sgd, lt.schedules.poly()) | lt.optimize(sgd), 1)], max_epochs=1)
    assert [round(state.lr, 4) for state in run] == [1.0, 0.6667, 0.3333]

    run.extend(max_epochs=2)

    assert [round(state.lr, 4) for state in run] == [0.5, 0.3333, 0.1667]
    assert run.ended == "finished: 2 epochs, 6 iterations"
    with pytest.raises(ValueError, match="already behind: 2 are done"):
        run.extend(max_epochs=1)


def test_stop_ends_the_run_after_this_iteration(batches):
    """`state.stop` from the caller's body or from a part: this state is the last, and `run.ended` says why."""
    run = lt.workflow([(lt.train(None, batches, lambda model, batch: batch.mean()), 1)], max_epochs=9)

    for state in run:
        if state.iteration == 4:
            state.stop("enough")

    assert (run.ended, run.progress.iteration) == ("enough", 5)
    assert next(run, None) is None


def test_reset_starts_afresh(batches):
    """After `reset` counters, results and history are new; weights stay."""
    run = lt.workflow([(lt.train(None, batches, lambda model, batch: batch.mean()), 1)], max_epochs=1)
    run.to_end()

    run.reset()

    assert (run.ended, run.progress.iteration, run.history) == ("", 0, [])
    assert [state.iteration for state in run] == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:train. nobody calls backward, so nothing is trained:UserWarning")
def test_history_has_a_row_a_pass(model, batches):
    """Each row says phase, counters and means."""
    phase = lt.train(model, batches, lambda model, batch: model(batch))
    run = lt.workflow([(phase, 1)], max_epochs=2)

    assert run.to_end() == {"train/loss": 6.0}
    keys = ("phase", "epoch", "iteration", "round", "iterations", "loss")
    assert [tuple(row[key] for key in keys) for row in run.history] == [
        ("train", 0, 2, 0, 3, 6.0),
        ("train", 1, 5, 1, 3, 6.0),
    ]


def test_len_is_refused_where_a_source_has_none(batches):
    """`len(run)` counts all states, or says whose length is missing."""
    val = lt.validate(None, lambda: iter(batches), lambda model, batch: {"x": batch.mean()})
    run = lt.workflow([(val, 1)], max_rounds=1)

    with pytest.raises(TypeError, match="the source of val has no length"):
        len(run)


@pytest.mark.filterwarnings("ignore:train. nobody calls backward, so nothing is trained:UserWarning")
def test_zip_of_two_phases_is_sound(batches):
    """Two phases in step, over one model with a frozen layer: each finds its mode, frozen layers stay frozen."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1))
    model[1].eval()
    train = lt.train(model, batches, lambda model, batch: model(batch).mean())
    val = lt.validate(
        model, batches, lambda model, batch: {"training": float(model.training), "x": model(batch).mean()}
    )

    modes = []
    for left, right in zip(train, val, strict=True):
        modes.append((left.loss.requires_grad, right.metrics["training"], right.metrics["x"].requires_grad))
        assert torch.is_grad_enabled()

    assert modes == [(True, 0.0, False)] * 3
    next(iter(train))
    assert (model.training, model[0].training, model[1].training) == (True, True, False)


def test_a_phase_in_place_of_the_list_is_refused(batches):
    """`workflow(train, ...)` would walk through the phase."""
    with pytest.raises(TypeError, match=r"give a list of pairs \(phase, n\).* got a phase"):
        lt.workflow(phases({"t": 1})["t"], max_epochs=1)


def test_extending_in_the_middle_of_a_pass_that_the_bound_cut_short():
    """The pass goes on to the source's own length."""
    run = lt.workflow([(phases({"t": 7})["t"], 1)], max_iterations=10)
    list(run.take(8))

    run.extend(max_iterations=20)

    assert [state.index for state in run] == [1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5]


def test_a_run_by_rounds_can_be_extended():
    """An evaluation alone has rounds for its bound."""
    run = lt.workflow([(phases({"v": 2})["v"], 1)], max_rounds=1)
    run.to_end()
    run.extend(max_rounds=2)

    assert len(list(run)) == 2


def test_results_say_what_is_known(batches):
    """A misspelt metric lists the others."""
    run = lt.workflow([(lt.train(None, batches, lambda model, batch: batch.mean()), 1)], max_epochs=1)

    with pytest.raises(KeyError, match="nobody has written 'train/acc'; known are train/loss"):
        run.to_end()["train/acc"]


@pytest.mark.parametrize("verb", ["close", "reset"])
def test_closing_from_within_an_iteration_is_refused(batches, verb):
    """`state.stop` is what ends a run from inside."""
    run = lt.workflow([(lt.train(None, batches, lambda m, b: getattr(run, verb)()), 1)], max_epochs=1)

    with pytest.raises(RuntimeError, match=f"{verb}: the run is at work.* End it with state.stop"):
        next(run)


def test_a_finished_run_is_not_iterated_in_silence(batches):
    """`for` says why it ended; `next` has nothing more, `to_end` gives the results, `extend` and `reset` go on."""
    run = lt.workflow([(phases({"t": 2})["t"], 1)], max_epochs=1)
    results = run.to_end()

    for iterate in (list, iter, enumerate, lambda run: list(zip(run, [1], strict=False)), lambda run: lt.pipe(run)):
        with pytest.raises(RuntimeError, match=r"run: it is over \(finished: 1 epoch, 2 iterations\)"):
            iterate(run)
    assert next(run, None) is None
    assert run.to_end() == results

    run.extend(max_epochs=2)
    assert len(list(run)) == 2
    run.reset()
    assert len(list(run)) == 4


@pytest.mark.parametrize("verb", ["take", "stages"])
def test_a_finished_run_has_nothing_to_take_and_says_so(verb):
    """No error: `while states := list(run.take(10))` is a way to go through a run."""
    run = lt.workflow([(phases({"t": 2})["t"], 1)], max_epochs=1)
    assert len(list(run.take(9))) == 2

    with pytest.warns(RuntimeWarning, match=f"run.{verb}.*: the run is over .finished.* run.extend"):
        assert list(run.take(9) if verb == "take" else run.stages()) == []


def test_take_takes_no_more_than_it_should():
    """One batch a state, none before it is asked; what it leaves is there for the next."""
    fetched = []
    source = lambda: (fetched.append(n) or torch.ones(1) for n in range(9))  # noqa: E731
    run = lt.workflow([(lt.train(None, source, lambda m, b: b), lt.iterations(9))], max_epochs=1)

    states = run.take(2)
    assert fetched == []
    assert [state.index for state in states] == [0, 1]
    assert fetched == [0, 1]
    assert [state.index for state in zip(run.take(1), run.take(2), strict=False).__next__()] == [2, 3]
    assert list(run.take(0)) == []


def test_results_can_be_pickled_and_copied(batches):
    """They leave the run behind."""
    run = lt.workflow([(phases({"t": 2})["t"], 1)], max_epochs=1)
    results = run.to_end()

    assert pickle.loads(pickle.dumps(results)) == copy.deepcopy(results) == {"t/loss": 1.0}
    assert type(copy.copy(results)) is dict


def test_an_entry_may_count_epochs(model, sgd, batches):
    """(train, lt.epochs(2)) is (train, 2)."""
    phase = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)

    assert [state.epoch for state in lt.workflow([(phase, lt.epochs(2))], max_rounds=1)] == [0, 0, 0, 1, 1, 1]


def test_a_function_in_the_models_place_is_refused(model, batches):
    """The order is (model, source, step)."""
    with pytest.raises(TypeError, match=r"the step is a Weight, a module. The order is train\(model, source, step\)"):
        lt.train(lambda model, batch: 0, batches, model)
