"""Swapping parts and steps."""

from __future__ import annotations

import pytest

import looptools as lt


@pytest.fixture
def run(model, sgd, batches):
    step = lambda model, batch: model(batch)  # noqa: E731
    train = lt.train(model, batches, step) | lt.optimize(sgd, max_norm=0.5)
    return lt.workflow([(train, 1), (lt.validate(model, batches[:1], step), 1)], max_epochs=2) | lt.log(line=None)


def test_replace_swaps_a_part_in_mid_iteration(run, sgd, model):
    """A part swapped before its turn acts in this very iteration."""
    run.after("backward")

    run.replace("clip_grad_norm", lt.clip_grad_norm(model.parameters(), 0.125))
    next(run)

    assert model.w.item() == pytest.approx(3 - 0.125)
    assert run["clip_grad_norm"].max_norm == 0.125


def test_replace_keeps_the_memory_of_a_part_of_the_same_class(model, sgd, batches):
    """Swapping `backward` in an open window keeps what is in it."""
    train = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd, accumulate=3)
    run = lt.workflow([(train, 1)], max_epochs=1)
    next(run)

    run.replace("backward", lt.backward(sgd, accumulate=3))
    run.to_end()

    assert model.w.item() == 3 - (1 + 2 + 3) / 3


def test_replace_by_name_needs_something_of_that_name(run):
    """The error lists the steps there are."""

    def classify(model, batch):
        return model(batch)

    with pytest.raises(LookupError, match=r"no step or part is called 'classify'. Steps are lambda"):
        run.replace(classify)
    with pytest.raises(TypeError, match="replace: give a name and a part, or a function"):
        run.replace(3)


def test_replace_by_name_swaps_a_plain_generator(model, batches):
    """A part that was redefined in a cell takes the place of the old one."""

    def mark(states):
        for state in states:
            state.metrics["mark"] = 1
            yield state

    run = lt.workflow([(lt.train(model, batches, lambda model, batch: model(batch)) | mark, 1)], max_epochs=1)
    first = next(run).metrics["mark"]

    def mark(states):
        for state in states:
            state.metrics["mark"] = 2
            yield state

    run.replace(mark)

    assert (first, next(run).metrics["mark"]) == (1, 2)


def test_a_step_is_swapped_by_the_old_ones_name(model, sgd, batches):
    """The mended step may be called otherwise."""

    def lm(model, batch):
        return model(batch)

    def lm_mended(model, batch):
        return 2 * model(batch)

    run = iter(lt.train(model, batches, lm) | lt.optimize(sgd))
    with pytest.raises(LookupError, match=r"Steps are lm; give the old name first: run.replace\('lm', lm_mended\)"):
        run.replace(lm_mended)

    run.replace("lm", lm_mended)

    assert next(run).loss.item() == 6.0


def test_what_waits_for_the_boundary_is_done_by_the_new_part(model, sgd, batches, tmp_path):
    """A checkpoint with a wrong key is named, and mended by another one; the same boundary then saves."""
    phase = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)
    run = lt.workflow([(phase, 1)], max_epochs=1) | lt.checkpoint(tmp_path, best=lt.lowest("train/los"))
    with pytest.raises(LookupError, match="no part writes"):
        run.to_end()
    assert run.failed.part == "run/checkpoint"

    run.replace("checkpoint", lt.checkpoint(tmp_path, best=lt.lowest("train/loss")))
    run.to_end()

    assert (tmp_path / "best.pt").exists()
    assert run.best["train/loss"]["iteration"] == 3
