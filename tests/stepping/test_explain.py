"""A run that shows itself."""

from __future__ import annotations

import pytest

import looptools as lt


@pytest.fixture
def run(model, sgd, batches):
    step = lambda model, batch: model(batch)  # noqa: E731
    train = lt.train(model, batches, step) | lt.optimize(sgd, max_norm=0.5)
    return lt.workflow([(train, 1), (lt.validate(model, batches[:1], step), 1)], max_epochs=2) | lt.log(line=None)


def test_only_a_training_phase_is_told_that_nothing_moves_its_weights(run, model, batches, capsys):
    """A validation has nobody to move them."""
    run.explain()
    assert "no part here moves the weights" not in capsys.readouterr().out

    iter(lt.train(model, batches, lambda model, batch: model(batch))).explain()
    assert capsys.readouterr().out.count("no part here moves the weights: lt.optimize(optimizer) would") == 1


TRAIN = ["batches", "forward", "backward", "clip_grad_norm", "update", "average"]


def test_explain_prints_the_resolved_pipe(run, capsys):
    """Scopes, order, names and options, one line a part; nothing of it moves the run."""
    run.explain()

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "workflow: train x 1, val x 1, until 2 epochs (6 iterations)"
    assert [line.split()[1] for line in lines[2:8]] == TRAIN
    assert "max_norm=0.5" in lines[5]
    assert run.progress.iteration == 0


def test_repr_says_where_the_run_is(run):
    """One line says the workflow and the counters, or what failed; another one the pipe."""
    assert repr(run).startswith("<Run: train x 1, val x 1; not begun\n train: forward | backward | clip_grad_norm | ")

    list(run.take(5))

    assert repr(run).startswith(
        "<Run: train x 1, val x 1; 1/2 epochs, 4/6 iterations done; in train: 1/3 batches done\n"
    )
