"""Means of a pass."""

from __future__ import annotations

import pytest

import looptools as lt


def phase_of(model, batches, *parts):
    phase = lt.train(model, batches, lambda model, batch: model(batch))
    for part in parts:
        phase = phase | part
    return phase


@pytest.mark.filterwarnings("ignore:train. nobody calls backward, so nothing is trained:UserWarning")
def test_average_over_a_window_takes_the_place_of_the_one_over_the_pass(model, batches):
    """`average(window=n)`: results are the means of the last n iterations."""
    run = lt.workflow([(phase_of(model, batches, lt.average(window=2)), 1)], max_epochs=1)

    assert run.to_end() == {"train/loss": (3 * 2 + 3 * 3) / 2}
    assert [slot.name for slot in run.cursor.slots] == ["train/forward", "train/average"]


def test_a_pass_whose_states_are_all_dropped_is_said(model, batches):
    """Else a filter that lets nothing through would train nothing in silence."""

    def nothing(states):
        for state in states:
            if state.index < 0:
                yield state

    with pytest.warns(UserWarning, match="val: every state of this pass was dropped"):
        (lt.validate(model, batches, lambda model, batch: model(batch)) | nothing).to_end()
