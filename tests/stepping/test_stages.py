"""Into an iteration, part by part."""

from __future__ import annotations

import pytest
import torch

import looptools as lt


@pytest.fixture
def run(model, sgd, batches):
    step = lambda model, batch: model(batch)  # noqa: E731
    train = lt.train(model, batches, step) | lt.optimize(sgd, max_norm=0.5)
    return lt.workflow([(train, 1), (lt.validate(model, batches[:1], step), 1)], max_epochs=2) | lt.log(line=None)


TRAIN = ["batches", "forward", "backward", "clip_grad_norm", "update", "average"]


def test_stages_yields_after_each_part(run, model):
    """Names are full and in order; the weights move at `update`, and not before."""
    seen = [(name, model.w.item()) for name, state in run.stages()]

    assert [name for name, _ in seen] == [*(f"train/{name}" for name in TRAIN), "run/log"]
    assert [weight for _, weight in seen] == pytest.approx([3.0] * 4 + [2.5] * 3)


def test_stages_goes_on_in_the_open_iteration(run):
    """Left with `break`, the next `stages` walks through the rest."""
    for name, _ in run.stages():
        if name == "train/backward":
            break

    assert [name for name, _ in run.stages()] == ["train/clip_grad_norm", "train/update", "train/average", "run/log"]
    assert next(run).iteration == 1


def test_after_and_before_stop_there_and_next_completes(run, model):
    """Gradients can be looked at and changed before the optimizer moves."""
    state = run.after("backward")
    assert (state.iteration, model.w.grad.item(), model.w.item()) == (0, 1.0, 3.0)

    assert run.before("update") is state
    model.w.grad.fill_(0.25)
    assert next(run) is state
    assert model.w.item() == 2.75

    assert run.before("train/forward").iteration == 1
    assert run.after("val/forward").phase == "val"


def test_short_names_are_resolved_in_the_pass_under_way(run):
    """`forward` stands in both phases, and means the next one to run."""
    phases = [run.after("forward").phase for _ in range(5)]

    assert phases == ["train"] * 3 + ["val", "train"]


def test_a_short_name_that_matches_twice_in_a_pass_is_an_error():
    """In a GAN's pipe `backward` stands twice; the error lists both full names."""
    gan = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(gan.parameters(), lr=0.1)
    step = lambda model, batch: model(batch).mean()  # noqa: E731
    phase = lt.train(gan, [torch.ones(1, 1)], step) | lt.optimize(optimizer, name="D") | lt.forward(step)
    run = lt.workflow([(phase | lt.optimize(optimizer, name="G"), 1)], max_epochs=1)

    with pytest.raises(LookupError, match=r"'backward' matches train/D.backward, train/G.backward. Give the full name"):
        run.after("backward")
    assert run.after("D.backward").updates
    assert run.after("train/G.backward").updates


def test_a_name_that_nothing_has_is_an_error_at_once(run):
    """All names are listed."""
    with pytest.raises(LookupError, match=r"after: there is no part 'clip'. There are: train/batches, .*run/log"):
        run.after("clip")
    with pytest.raises(LookupError, match="there is no part 'batches'"):
        run.before("batches")
    with pytest.raises(LookupError, match="there is no part"):
        run["clip"]


def test_after_says_when_the_run_ends_first(run):
    """A LookupError, once no further pass has that part."""
    run.to_end()

    with pytest.raises(LookupError, match="the run ended before 'backward' came again"):
        run.after("backward")
