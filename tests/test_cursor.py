"""What parts may do with the stream: pass on, drop, end it; in which order and number."""

from __future__ import annotations

import itertools
import warnings

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import looptools as lt


def named(name, calls):
    """A part that writes its name down, and when its loop is over."""

    def part(states):
        calls.append(f"{name} begins")
        for state in states:
            calls.append(f"{name} {state.phase} {state.index}")
            yield state
        calls.append(f"{name} over")

    return part


def keep(condition):
    """A part that drops the states that do not fulfil *condition*."""

    def filtering(states):
        for state in states:
            if condition(state):
                yield state

    return filtering


def phase(batches, make=lt.train, **options):
    return make(None, batches, lambda model, batch: {"x": batch.mean()}, **options)


@pytest.mark.parametrize("known", [True, False], ids=["len", "no-len"])
def test_parts_run_in_the_order_in_which_they_are_read(batches, known):
    """Phase parts begin anew each pass, run parts do not; clean-up comes when the next state is asked for."""
    calls = []
    source = batches[:1] if known else lambda: iter(batches[:1])
    pipe = phase(source) | named("a", calls) | named("b", calls)
    run = lt.workflow([(pipe, 1)], max_epochs=2) | named("c", calls)

    next(run)
    assert calls == ["a begins", "a train 0", "b begins", "b train 0", "c begins", "c train 0"]
    calls.clear()
    next(run)
    assert calls == ["a over", "b over", "a begins", "a train 0", "b begins", "b train 0", "c train 0"]
    calls.clear()
    assert next(run, None) is None
    assert calls == ["a over", "b over", "c over"]


@pytest.mark.parametrize("known", [True, False], ids=["len", "no-len"])
def test_one_next_is_one_iteration(batches, known):
    """`next` fetches one batch; one more only where the length is not known, since `average` asks for `last`."""
    fetched = []

    class Source:
        def __iter__(self):
            for batch in batches:
                fetched.append(batch)
                yield batch

    class Sized(Source):
        def __len__(self):
            return 3

    run = lt.workflow([(phase(Sized() if known else Source()), 1)], max_epochs=1)

    next(run)

    assert len(fetched) == (1 if known else 2)


@pytest.mark.parametrize("known", [True, False], ids=["len", "no-len"])
@pytest.mark.parametrize("kept", list(itertools.product([True, False], repeat=3)), ids=str)
@pytest.mark.parametrize("scope", ["phase", "run"])
@pytest.mark.filterwarnings("ignore:train. every state of this pass was dropped:UserWarning")
def test_a_part_that_drops_states_is_given_the_next(batches, known, kept, scope):
    """Any of three batches dropped, in two passes: the others come, means leave them out, passes end."""
    pipe = phase(batches if known else lambda: iter(batches))
    dropping = keep(lambda state: kept[state.index])
    run = lt.workflow([(pipe | dropping if scope == "phase" else pipe, 1)], max_epochs=2)
    ends = []

    def watch(states):
        for state in states:
            if state.last:
                ends.append((state.epoch, state.index, state.dropped, state.round_last))
            yield state

    run = (run if scope == "phase" else run | dropping) | watch

    seen = [(state.epoch, state.index) for state in run]

    assert seen == [(epoch, index) for epoch in range(2) for index in range(3) if kept[index]]
    assert ends == [(epoch, 2, not kept[2], True) for epoch in range(2)]
    assert run.ended == "finished: 2 epochs, 6 iterations"
    means = [row.get("x") for row in run.history]
    counted = [n + 1 for n in range(3) if kept[n] or scope == "run"]
    assert means == [sum(counted) / len(counted) if counted else None] * 2


def test_two_dropping_parts(batches):
    """Each is given the next state that the one before it lets through."""
    pipe = phase([torch.tensor([float(n)]) for n in range(12)])
    run = lt.workflow([(pipe | keep(lambda s: s.index % 2) | keep(lambda s: s.index % 3), 1)], max_epochs=1)

    assert [state.index for state in run | keep(lambda s: s.index != 7)] == [1, 5, 11]


@pytest.mark.parametrize("known", [True, False], ids=["len", "no-len"])
def test_a_phase_part_that_ends_its_stream_ends_the_pass(batches, known):
    """`itertools.islice` as a middleware: the pass ends, its means are written, the run goes on."""
    pipe = phase(batches if known else lambda: iter(batches)) | (lambda states: itertools.islice(states, 2))
    run = lt.workflow([(pipe, 1)], max_epochs=2)

    assert [(state.epoch, state.index) for state in run] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert run.results == {"train/x": 1.5}
    assert run.ended.startswith("finished: 2 epochs")


def test_a_run_part_that_ends_its_stream_ends_the_run(batches):
    """`run.ended` names it."""
    run = lt.workflow([(phase(batches), 1)], max_epochs=2) | (lambda states: itertools.islice(states, 2))

    assert [state.index for state in run] == [0, 1]
    assert run.ended == "run/lambda ended the stream"


def twice(states):
    for state in states:
        yield state
        yield state


def behind(states):
    before = None
    for state in states:
        if before is not None:
            yield before
        before = state


def nothing(states):
    for _ in states:
        yield None


@pytest.mark.parametrize(
    ("part", "kind", "message"),
    [
        (twice, RuntimeError, "train/twice must yield the state it was given last, once or not at all"),
        (behind, RuntimeError, "train/behind must yield the state it was given last"),
        (nothing, TypeError, "train/nothing yielded NoneType, not the state. Write `yield state`"),
        (lambda states: 3, TypeError, r"train/lambda returned a int, not an iterator of states"),
        (lambda: 3, TypeError, r"takes 0 positional arguments"),
    ],
)
def test_parts_that_break_the_contract_are_named(batches, part, kind, message):
    """One state out for one in: what else a part does is an error with its name."""
    run = lt.workflow([(phase(batches) | part, 1)], max_epochs=1)

    with pytest.raises(kind, match=message):
        run.to_end()


@pytest.mark.parametrize("what", [lt.clip_grad_norm, 3, None])
def test_what_is_no_middleware_is_refused_where_it_is_piped(batches, what):
    """A class without its options, or no callable at all."""
    with pytest.raises(TypeError, match="is a class. Give it its options first|a middleware is a callable"):
        phase(batches) | what
    with pytest.raises(TypeError, match="is a class. Give it its options first|a middleware is a callable"):
        lt.chain(what)


def test_a_recipe_that_was_not_called_says_to_call_it(batches):
    """`phase | lt.optimize` without its optimizer, or the optimizer itself."""
    with pytest.raises(TypeError, match=r"optimize takes options. Call it first: optimize\(...\)"):
        phase(batches) | lt.optimize
    with pytest.raises(TypeError, match=r"got a SGD. Write lt.optimize\(optimizer\)"):
        phase(batches) | torch.optim.SGD([torch.ones(1)], lr=0.1)


def test_pipe_is_plain_nesting(model, sgd):
    """Outside a run the same parts work on any states, one at a time."""
    states = (lt.State(phase="train", loss=model(torch.ones(1)) * n) for n in (1, 2))
    stream = lt.pipe(states, lt.optimize(sgd, max_norm=10.0))

    first = next(stream)

    assert (first.grad_norm.item(), model.w.item()) == (1.0, 2.0)
    assert len(list(stream)) == 1


def test_closing_early_closes_every_part_once(batches):
    """`close` in mid-pass ends each loop, collects what parts raise, and the run is over."""
    calls = []

    @attrs.define(eq=False)
    class failing:
        def __call__(self, states):
            for state in states:
                yield state
            calls.append("failing over")
            raise ValueError("planted")

        def close(self):
            calls.append("failing closed")

    pipe = phase(batches) | named("a", calls) | failing()
    run = lt.workflow([(pipe, 1)], max_epochs=1) | named("b", calls)
    next(run)
    calls.clear()

    with pytest.raises(ValueError, match="planted"):
        run.close()

    assert calls == ["a over", "failing over", "b over", "failing closed"]
    assert (run.ended, next(run, None)) == ("closed", None)
    run.close()
    assert len(calls) == 4


def test_with_puts_the_run_to_sleep_and_next_wakes_it(batches):
    """At the end of `with` loops are over and files closed; the run goes on in mid-pass all the same."""
    calls = []
    run = lt.workflow([(phase(batches), 1)], max_epochs=1) | named("a", calls)

    with run:
        next(run)

    assert calls[-1] == "a over"
    assert [state.index for state in run] == [1, 2]


def test_workers_are_released_by_sleep_and_the_place_is_found_again():
    """A loader with workers, left in mid-pass: the workers end, and the same order goes on."""

    def order(sleeps):
        torch.manual_seed(3)
        loader = torch.utils.data.DataLoader(torch.arange(12.0), 2, shuffle=True, num_workers=2)
        run = lt.workflow([(phase(loader), 1)], max_epochs=2)
        seen = []
        while not run.ended:
            if sleeps:
                with run:
                    seen += [state.batch for state in run.take(4)]
                assert run.cursor.passes.sources[id(run._agenda.phases[0])]._iterator is None
            else:
                seen += [state.batch for state in run]
        return torch.cat(seen)

    assert torch.equal(order(True), order(False))


def test_a_state_that_an_earlier_part_made_the_last_is_not_given_to_a_later_dropper(batches):
    """The first part drops the last state while the second waits for its next: the second's loop is over."""
    seen = []

    def second(states):
        for state in states:
            seen.append((state.index, state.dropped))
            if state.index != 1:
                yield state

    run = lt.workflow([(phase(batches) | keep(lambda state: state.index != 2) | second, 1)], max_epochs=1)

    assert [state.index for state in run] == [0]
    assert seen == [(0, False), (1, False)]
    assert run.results == {"train/x": 1.0}


def test_a_part_that_does_not_yield_is_named_before_it_takes_anything(batches):
    """A loop without `yield` would walk through the whole pass when it is called."""

    def silent(states):
        for _ in states:
            pass

    run = lt.workflow([(phase(batches) | silent, 1)], max_epochs=1)

    with pytest.raises(TypeError, match="train/silent asked for a state before it returned an iterator"):
        next(run)
    assert run.failed.state.index == 0


def test_metrics_are_kept_as_they_were(model, sgd, batches):
    """A parameter among them is copied before the update moves it; the loop's body may change `metrics`."""
    step = lambda model, batch: {"loss": model(batch), "w": model.w}  # noqa: E731
    run = lt.workflow([(lt.train(model, batches, step) | lt.optimize(sgd), 1)], max_epochs=1)

    for state in run:
        state.metrics.clear()

    assert run.results["train/w"] == (3 + 2 + 0) / 3


@pytest.mark.parametrize("part", [lt.log(line=None), lt.checkpoint("nowhere")])
def test_parts_that_read_results_belong_onto_the_run(batches, part):
    """In a phase they would come before `average`, and show the pass before."""
    with pytest.raises(TypeError, match=r"pipe it onto the run, not onto a phase: lt.workflow\(...\) \| lt\."):
        next(lt.workflow([(phase(batches) | part, 1)], max_epochs=1))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sets(st.tuples(st.integers(0, 1), st.integers(0, 2))), min_size=4, max_size=4), st.booleans())
def test_any_number_of_parts_may_drop(drops, known):
    """Two on the phase and two on the run, each with states of its own to drop: the rest comes, each pass ends once."""

    def dropping(which):
        def part(states):
            for state in states:
                if (state.epoch, state.index) not in which:
                    yield state

        return part

    ends = []

    def watch(states):
        for state in states:
            if state.last:
                ends.append(state.epoch)
            yield state

    batches = [torch.ones(1)] * 3
    pipe = phase(batches if known else lambda: iter(batches)) | dropping(drops[0]) | dropping(drops[1])
    run = lt.workflow([(pipe, 1)], max_epochs=2) | dropping(drops[2]) | dropping(drops[3]) | watch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = [(state.epoch, state.index) for state in run]

    assert seen == [(e, i) for e in range(2) for i in range(3) if not any((e, i) in which for which in drops)]
    assert ends == [0, 1]
    assert run.ended == "finished: 2 epochs, 6 iterations"
