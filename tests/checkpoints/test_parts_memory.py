"""What parts remember, of whatever kind they are."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import torch
from loops import Case, piped

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
