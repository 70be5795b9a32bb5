"""Torch's modes across the yields of a user's own parts."""

from __future__ import annotations

import functools
import traceback

import pytest
import torch
from loops import Case, assert_same, by_hand, device_reads, piped

import looptools as lt
from looptools.modes import all_torch_modes, put_back, switched


class Tensors(torch.overrides.TorchFunctionMode):
    """A function mode that changes nothing."""


def entered(mode):
    mode.__enter__()
    return mode  # inference_mode ends when its guard goes


def run_of(model, batches, part):
    phase = lt.train(model, batches, lambda model, batch: model(batch)) | part
    return lt.workflow([(phase, 1)], max_epochs=2) | lt.leak_guard()


def leaking(mode):
    def leaky(states):
        for state in states:
            with mode():
                yield state

    return leaky


def sound(states):
    for state in states:
        with torch.no_grad():
            state.metrics["twice"] = 2 * state.loss
        yield state


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        (torch.no_grad, "gradients"),
        (torch.inference_mode, "gradients and inference_mode"),
        (lambda: torch.autocast("cpu"), "autocast on the CPU and autocast's nesting"),
        (torch.autograd.detect_anomaly, "anomaly detection"),
        (lambda: torch.device("meta"), "the default device"),
        (Tensors, "the default device"),
    ],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_a_yield_inside_a_mode_is_named_and_left(model, batches, mode, name):
    """Part, mode and cure are in the error; the caller's modes are as before."""
    before = all_torch_modes()

    with pytest.raises(RuntimeError, match=f"leak_guard: train/leaky left {name} switched .* iteration 0 of train"):
        next(run_of(model, batches, leaking(mode)))

    assert switched(before) == []


@pytest.mark.parametrize(
    ("switch", "name"),
    [
        (lambda: torch.set_grad_enabled(False), "gradients"),
        (lambda: torch.set_default_dtype(torch.float64), "the default dtype"),
        (lambda: torch.set_default_device("meta"), "the default device"),
        (lambda: torch.use_deterministic_algorithms(True), "deterministic algorithms"),
        (lambda: entered(torch.inference_mode()), "gradients and inference_mode"),
        (lambda: entered(torch.autocast("cpu")), "autocast on the CPU and autocast's nesting"),
    ],
)
def test_what_a_part_switches_by_hand_is_put_back(model, batches, switch, name):
    """An iterator of one's own, which cannot be closed."""
    before = all_torch_modes()

    class stubborn:
        def __init__(self, states=None):
            self.states = states

        def __call__(self, states):
            return stubborn(iter(states))

        def __iter__(self):
            return self

        def __next__(self):
            state = next(self.states)
            self.kept = switch()
            return state

    try:
        with pytest.raises(RuntimeError, match=f"leak_guard: train/stubborn left {name} switched"):
            next(run_of(model, batches, stubborn()))

        assert switched(before) == []
    finally:
        put_back(before)


def test_modes_that_cannot_be_put_back_are_named(model, batches):
    """A function mode entered by hand has no owner that could be asked to leave it."""
    mode, before = Tensors(), all_torch_modes()

    def stack(states):
        yield from (mode.__enter__() and state for state in states)

    with pytest.raises(RuntimeError, match=r"still so, and not to be put back: the default device"):
        next(run_of(model, batches, stack))
    mode.__exit__(None, None, None)

    assert switched(before) == []


def test_put_back_when_the_caller_had_gradients_off():
    """Setting inference_mode switches gradients too; they end up off."""
    with torch.no_grad():
        before = all_torch_modes()
        guard = entered(torch.inference_mode())

        assert switched(before) == ["inference_mode"]
        assert put_back(before) == []
        del guard


def test_the_run_goes_on_with_the_mended_part(model, sgd, batches):
    """`run.replace` by name, then `next` with the same state: nothing is lost."""

    def sound(states):
        for state in states:
            seen.append(state.index)
            yield state

    seen = []
    sound.__name__ = "leaky"
    phase = lt.train(model, batches, lambda model, batch: model(batch)) | leaking(torch.no_grad) | lt.optimize(sgd)
    run = lt.workflow([(phase, 1)], max_epochs=1) | lt.leak_guard()
    with pytest.raises(RuntimeError, match="leak_guard: train/leaky"):
        run.to_end()
    run.replace(sound)
    run.to_end()

    assert (seen, model.w.item()) == ([0, 1, 2], 3.0 - 1 - 2 - 3)


def test_a_part_that_is_put_in_later_is_under_guard(model, batches):
    """In the place of a user's part, or of one of looptools'."""
    for name in ("run/sound", "train/average"):
        run = run_of(model, batches, sound) | sound
        next(run)
        run.replace(name, leaking(torch.no_grad))

        with pytest.raises(RuntimeError, match=f"leak_guard: {name} left gradients switched"):
            next(run)
        assert torch.is_grad_enabled()


def test_parts_in_chains_of_classes_and_partials_are_looked_at(model, batches):
    """Whatever shape a part of one's own has."""

    class instance:
        def __call__(self, states):
            yield from leaking(torch.no_grad)(states)

    def with_option(states, mode):
        yield from leaking(mode)(states)

    for part, name in [
        (lt.chain(sound, leaking(torch.no_grad), name="mine"), "mine.leaky"),
        (instance(), "instance"),
        (functools.partial(with_option, mode=torch.no_grad), "with_option"),
    ]:
        with pytest.raises(RuntimeError, match=f"leak_guard: train/{name} left gradients"):
            next(run_of(model, batches, part))


def test_a_step_that_leaks_is_named(model, batches):
    """`forward` is looptools' own, but what it calls is not."""

    def step(model, batch):
        loss = model(batch)
        torch.set_grad_enabled(False)
        return loss

    run = lt.workflow([(lt.train(model, batches, step), 1)], max_epochs=1) | lt.leak_guard()

    with pytest.raises(RuntimeError, match="leak_guard: train/forward left gradients switched"):
        next(run)
    assert torch.is_grad_enabled()


def test_what_a_part_raises_comes_through_as_it_is(model, batches):
    """The same exception, with the part's own line in its traceback, and modes put back."""

    def fails(states):
        for state in states:
            torch.set_grad_enabled(False)
            raise KeyError("mine")
            yield state

    with pytest.raises(KeyError, match="mine") as caught:
        next(run_of(model, batches, fails))

    assert torch.is_grad_enabled()
    assert any('raise KeyError("mine")' in line for line in traceback.format_tb(caught.value.__traceback__))


def test_guarded_parts_are_closed(model, batches):
    """What stands behind a part's loop runs, and its finally."""
    order = []

    def closes(states):
        try:
            for state in states:
                yield state
            order.append("behind the loop")
        finally:
            order.append("finally")

    run = run_of(model, batches, closes)
    next(run)
    run.close()

    assert order == ["behind the loop", "finally"]


def test_a_part_that_drops_states_works_under_guard(model, batches):
    """What it asks for in its turn is somebody else's work."""

    def odd(states):
        for state in states:
            if state.index % 2:
                yield state

    run = run_of(model, batches, odd)

    assert [(state.epoch, state.index) for state in run] == [(0, 1), (1, 1)]


def test_same_as_by_hand_without_a_read():
    """It changes no bit, and reads no device between passes."""
    case = Case("AdamW", max_norm=1.0, cosine=True)
    run = piped(case) | sound | lt.leak_guard()
    bare = piped(case)
    counts = []
    for one in (run, bare):
        with device_reads() as reads:
            one.to_end()
        counts.append(len(reads))

    assert counts[0] == counts[1]
    assert_same(run.model.state_dict(), by_hand(case))


def test_one_next_is_one_iteration(model):
    """No second batch is fetched."""
    fetched = []

    def source():
        for n in (1.0, 2.0):
            fetched.append(n)
            yield torch.full((2, 1), n)

    phase = lt.train(model, source, lambda model, batch: model(batch)) | lt.average(window=1) | sound
    run = lt.workflow([(phase, lt.iterations(2))], max_iterations=2) | lt.leak_guard()
    next(run)

    assert fetched == [1.0]


def test_it_belongs_onto_the_run(model, batches):
    """Within a phase it would see that phase only."""
    with pytest.raises(TypeError, match="leak_guard: pipe it onto the run"):
        next(iter(lt.train(model, batches, lambda model, batch: model(batch)) | lt.leak_guard()))
