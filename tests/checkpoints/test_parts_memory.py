"""What parts remember, of whatever kind they are."""

from __future__ import annotations

import gc
import weakref
from collections import deque

import attrs
import numpy as np
import pytest
import torch
from loops import Case, assert_same, classify, loader, network, piped
from torch import nn

import looptools as lt


class counts:
    """A plain class: nobody says which of its attributes are options."""

    def __init__(self, step, name="seen"):
        self.step = step
        self.function = print
        self.seen = 0
        self.shapes = {"all": []}
        self.last = None
        self._cache = object()

    def __call__(self, states):
        for state in states:
            self.seen += self.step
            self.shapes["all"].append(len(state.batch[0]))
            self.last = state.batch[0][0]
            yield state


def test_a_plain_class_remembers_what_has_changed(tmp_path):
    """Options that did not change are those of the new run."""
    run = piped(Case()) | counts(2)
    list(run.take(3))
    run.save(tmp_path)
    last = run["counts"].last
    run = piped(Case()) | counts(5)
    run.resume(tmp_path)

    part = run["counts"]
    assert (part.step, part.seen, part.shapes) == (5, 6, {"all": [4, 4, 4]})
    assert torch.equal(part.last, last)


@pytest.mark.parametrize("value", [deque([1]), np.ones(2)], ids=["deque", "array"])
def test_what_cannot_be_saved_is_named_when_it_has_changed(tmp_path, value):
    """Part and attribute; before it changes there is nothing to save."""

    class grows:
        def __init__(self):
            self.values = value

        def __call__(self, states):
            for state in states:
                if state.index == 1:
                    self.values[0] += 1
                yield state

    run = piped(Case()) | grows()
    next(run)
    run.save(tmp_path)
    next(run)

    with pytest.raises(TypeError, match="checkpoint/parts/run/grows/values is a .* begin the field's name with _"):
        run.save(tmp_path)
    assert len(list(tmp_path.glob("*.pt"))) == 1


def test_a_generators_local_variables_begin_anew_and_that_is_said(tmp_path):
    """By name, of those that are changed within the loop."""

    def spikes(states):
        count, limit, found = 0, 3.0, []
        for state in states:
            count += 1  # noqa: SIM113 (a user's way)
            if state.loss is not None and state.loss > limit:
                found.append(count)
            yield state

    def harmless(states):
        limit = 3.0
        for state in states:
            double = 2 * limit
            state.metrics["double"] = double
            yield state

    run = piped(Case()) | spikes | harmless
    next(run)
    run.save(tmp_path)

    with pytest.warns(UserWarning, match=r"run/spikes \(count, found\) begins anew") as told:
        (piped(Case()) | spikes | harmless).resume(tmp_path)
    assert len(told) == 1


def test_a_generator_of_a_phase_begins_anew_each_pass_in_any_case(tmp_path):
    """So at the end of a pass nothing is lost, and nothing is said."""

    def counts(states):
        count = 0
        for state in states:
            count += 1  # noqa: SIM113 (a user's way)
            yield state

    phase = lt.validate(None, [1.0, 2.0], lambda model, batch: {"x": batch}) | counts
    run = lt.workflow([(phase, 1)], max_rounds=2)
    list(run.take(2))
    run.save(tmp_path / "border")
    next(run)
    run.save(tmp_path / "within")

    lt.workflow([(phase, 1)], max_rounds=2).resume(tmp_path / "border")
    with pytest.warns(UserWarning, match=r"val/counts \(count\) begins anew"):
        lt.workflow([(phase, 1)], max_rounds=2).resume(tmp_path / "within")


def test_what_steps_models_and_options_remember(tmp_path):
    """A callable object as step, a plain attribute of a module, an option that an attrs part changes itself."""

    class Step:
        def __init__(self):
            self.calls = 0

        def __call__(self, model, batch):
            self.calls += 1
            return classify(model, batch)

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.seen = network(), 0

        def forward(self, x):
            self.seen += 1
            return self.inner(x)

    @attrs.define(eq=False)
    class grows:
        n: int = 0

        def __call__(self, states):
            for state in states:
                self.n += 1
                yield state

    def make():
        torch.manual_seed(0)
        return lt.workflow([(lt.validate(Counts(), loader(), Step()) | grows(), 1)], max_rounds=2)

    run = make()
    list(run.take(3))
    run.save(tmp_path)
    run = make()
    run.resume(tmp_path)

    assert (run["forward"].step.calls, run.model.seen, run["grows"].n) == (3, 3, 3)


def test_an_object_that_is_changed_in_place_is_named(tmp_path):
    """It could not be loaded safely; silence would lose it."""

    class Meter:
        n = 0

    class counts:
        def __init__(self):
            self.meter = Meter()

        def __call__(self, states):
            for state in states:
                self.meter.n += 1
                yield state

    run = piped(Case()) | counts()
    next(run)

    with pytest.raises(TypeError, match="checkpoint/parts/run/counts/meter is a .*Meter"):
        run.save(tmp_path)


@pytest.mark.parametrize("where", ["step", "model", "part"])
def test_random_generators_of_the_users_own(tmp_path, where):
    """In a closure, on the model or on a part: they go on with their numbers."""

    class Noise(nn.Module):
        def __init__(self, generator):
            super().__init__()
            self.generator = generator

    class noisy:
        def __init__(self, generator):
            self.generator = generator

        def __call__(self, states):
            for state in states:
                state.metrics["part"] = self.generator.random()
                yield state

    def make():
        own = np.random.default_rng(0)
        model = Noise(own if where == "model" else None)
        draw = {"step": lambda: float(own.random()), "model": lambda: float(model.generator.random())}
        step = lambda model, batch: {"x": draw.get(where, lambda: 0.0)()}  # noqa: E731
        phase = lt.validate(model, [1.0] * 4, step)
        return lt.workflow([(phase | noisy(own) if where == "part" else phase, 1)], max_rounds=2)

    expected = [dict(state.metrics) for state in make()]
    run = make()
    list(run.take(3))
    run.save(tmp_path)
    run = make()
    run.resume(tmp_path)

    assert [dict(state.metrics) for state in run] == expected[3:]


def test_what_torch_itself_would_lose(tmp_path):
    """Buffers that are not persistent, and an optimizer's state in another dtype than its parameters'."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
            self.register_buffer("n", torch.zeros(()), persistent=False)

        def forward(self, x):
            self.n += 1
            return self.w * x * self.n

    def make():
        model = Counts()
        nadam = torch.optim.NAdam(model.parameters(), lr=0.1)
        phase = lt.train(model, [1.0, 2.0] * 3, lambda model, batch: model(batch)) | lt.optimize(nadam)
        return lt.workflow([(phase, 1)], max_epochs=1)

    straight = make()
    straight.to_end()
    run = make()
    list(run.take(4))
    run.save(tmp_path)
    run = make()
    run.resume(tmp_path)
    run.to_end()

    assert run.model.n == straight.model.n == 6
    assert torch.equal(run.model.w, straight.model.w)


def test_a_layer_that_was_thawed_by_a_function_of_the_workflow_stays_so(tmp_path):
    """The function ran before the save, and does not run again; a warning says that flags were set."""

    def make():
        torch.manual_seed(0)
        model = network()
        model[0].requires_grad_(False)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        phase = lt.train(model, loader(), classify) | lt.optimize(sgd)
        thaw = lambda run: model[0].requires_grad_(True)  # noqa: E731
        return lt.workflow([(phase, 1), (thaw, 1), (phase, 1)], max_rounds=1, max_epochs=2)

    straight = make()
    straight.to_end()
    run = make()
    list(run.take(9))
    run.save(tmp_path)
    run = make()
    with pytest.warns(UserWarning, match="requires_grad of 2 parameters of model was another one when it was saved"):
        run.resume(tmp_path)
    run.to_end()

    assert_same(run.model.state_dict(), straight.model.state_dict())


def test_a_part_that_holds_its_run_does_not_keep_it_alive():
    """What is noted of parts when a run is built goes with the run."""

    class holds:
        def __call__(self, states):
            for state in states:
                self._run = state.run
                yield state

    run = piped(Case()) | holds()
    next(run)
    gone = weakref.ref(run)
    run.close()
    del run
    gc.collect()

    assert gone() is None


def test_a_part_is_told_of_the_pass_before_its_memory_comes_back(tmp_path):
    """What it makes ready there is ready, and what it begins anew there is not lost."""

    @attrs.define(eq=False)
    class counts:
        seen: int = attrs.field(default=0, init=False)
        _ready: bool = attrs.field(default=False, init=False)

        def on_pass(self, run):
            self.seen, self._ready = 0, True

        def __call__(self, states):
            for state in states:
                assert self._ready
                self.seen += 1
                yield state

    run = piped(Case()) | counts()
    list(run.take(3))
    run.save(tmp_path)
    run = piped(Case()) | counts()
    run.resume(tmp_path)
    next(run)

    assert run["counts"].seen == 4
