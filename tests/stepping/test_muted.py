"""What is muted hears of nothing; what was changed stands in the run's history."""

from __future__ import annotations

import attrs
import pytest
import torch

import looptools as lt


@pytest.fixture
def told():
    return []


@pytest.fixture
def run(model, sgd, batches, told):
    """Two epochs of three batches, each with a validation on one; a part of the run says what it is told."""

    class Tells:
        def on_start(self, run):
            told.append("start")

        def on_end(self, run):
            told.append("end")

        def on_results(self, state):
            told.append("results")

        def __call__(self, states):
            yield from states

    step = lambda model, batch: model(batch)  # noqa: E731
    train = lt.train(model, batches, step) | lt.optimize(sgd)
    return lt.workflow([(train, 1), (lt.validate(model, batches[:1], step), 1)], max_epochs=2) | Tells()


def test_a_muted_part_is_not_told_of_the_runs_beginning_results_and_end(run, told, batches, model):
    """Else a muted checkpoint would take its folder, and save in the end."""
    run.mute("Tells")
    next(run)
    run.to_end()

    assert told == []


def test_a_part_that_hears_late_is_told_that_the_run_has_begun(run, told):
    """Once."""
    run.mute("Tells")
    next(run)
    run.mute("Tells", False)
    run.mute("Tells")
    run.mute("Tells", False)
    run.to_end()

    assert told == ["start", "end"]


def test_a_muted_part_hears_nothing_of_a_validation_on_demand(run, told):
    """Its results go to the others."""
    next(run)
    run.mute("Tells")
    list(run.take(2))

    run.validate(run.cursor.passes.agenda.phases[1])

    assert told == ["start"]


def test_a_muted_parts_generator_ends_with_its_pass(run):
    """What stands behind its loop runs then."""
    closed = []

    @attrs.define(eq=False)
    class ends:
        def __call__(self, states):
            yield from states
            closed.append(True)

    run.insert(ends(), before="train/average")
    next(run)
    run.mute("ends")
    list(run.take(2))
    assert closed == []

    next(run)

    assert closed == [True]


def test_a_freeze_that_is_removed_gives_back_what_it_held(sgd):
    """In the middle of a pass as well."""
    model = torch.nn.Linear(1, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    train = lt.train(model, [torch.ones(1, 1)] * 3, lambda model, batch: model(batch).mean()) | lt.freeze("bias")
    run = lt.workflow([(train | lt.optimize(sgd), 1)], max_epochs=1)
    next(run)
    assert not model.bias.requires_grad

    run.remove("freeze")

    assert model.bias.requires_grad


def test_a_checkpoint_that_was_removed_is_inserted_again(run, tmp_path):
    """Its folder is the run's own."""
    run = run | lt.checkpoint(tmp_path, every=1)
    list(run.take(2))
    run.remove("checkpoint")
    next(run)

    run.insert(lt.checkpoint(tmp_path, every=1), after="Tells")
    next(run)

    assert run.cursor.run_slots[-1].name == "run/checkpoint"


def test_the_history_says_in_which_passes_the_run_was_changed(run, tmp_path):
    """Each change once, in the row of the pass that it was made in or before; also after a resume."""
    run.insert(lt.timer(), before="Tells")
    list(run.take(2))
    run.mute("timer")
    list(run.take(4))
    run.mute("timer", False)
    file = run.save(tmp_path)
    run.to_end()

    told = [row.get("changes") for row in run.history]
    assert told == [["insert run/timer", "mute run/timer"], None, ["unmute run/timer"], None]
    assert "changes" not in run._repr_html_()
    again = lt.workflow(run._agenda.entries and [(e.phase, e.passes) for e in run._agenda.entries], max_epochs=2)
    with pytest.warns(UserWarning, match="run/timer .inserted by hand"):
        again.resume(file, accept="pipe")
    again.to_end()
    assert [row.get("changes") for row in again.history] == told
