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


def test_explain_prints_the_resolved_pipe(run, capsys):
    """Scopes, order, names and options, one line a part; nothing of it moves the run."""
    run.explain()

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "workflow: train x 1, val x 1, until 2 epochs (6 iterations)"
    assert [line.split()[1] for line in lines[2:8]] == TRAIN
    assert "max_norm=0.5" in lines[5]
    assert run.progress.iteration == 0


def test_repr_says_where_the_run_is(run):
    """One line: the workflow and the counters, or what failed."""
    assert repr(run) == "<Run: train x 1, val x 1; not begun>"

    list(run.take(5))

    assert repr(run) == "<Run: train x 1, val x 1; 1/2 epochs, 4/6 iterations done>"


def test_rehearse_puts_everything_back(tmp_path):
    """Weights, buffers, gradients, optimizer, modes, generators and folders are as before."""
    from loops import Case, piped

    run = (
        piped(Case(optimizer="AdamW", cosine=True)) | lt.log(tmp_path / "a", line=None) | lt.checkpoint(tmp_path / "a")
    )
    model, optimizer = run.model, run.optimizer or run.cursor and run.optimizer
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    generators = torch.get_rng_state()

    results = run.rehearse(2)

    assert set(results) == {"train/loss", "train/accuracy", "val/loss", "val/accuracy"}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert (optimizer.state_dict()["state"], "initial_lr" in optimizer.param_groups[0]) == ({}, False)
    assert (model.training, model[1].training) == (True, False)
    assert torch.equal(torch.get_rng_state(), generators)
    assert list((tmp_path / "a").iterdir()) == []
    assert run.progress.iteration == 0
    assert len(list(run)) == 28


def test_rehearse_refuses_to_use_up_a_generator(batches):
    """A one-shot source would be spent."""
    run = lt.workflow([(lt.train(None, iter(batches), lambda model, batch: batch), 1)], max_epochs=1)

    with pytest.raises(RuntimeError, match="the source of train can be walked through only once"):
        run.rehearse()
