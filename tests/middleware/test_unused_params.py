"""Reports of parameters that do not learn."""

from __future__ import annotations

import warnings

import pytest
import torch
from loops import device_reads
from torch import nn

import looptools as lt


def parts(**idle):
    """A module whose step uses `used`, and of the others what the batch names."""
    return nn.ModuleDict({"used": nn.Linear(1, 1, bias=False), **idle})


def step(model, batch):
    return sum(model[name](torch.ones(1, 1)).sum() for name in ("used", *batch))


def run_of(model, batches, *, epochs=1, accumulate=1, params=None, **options):
    sgd = torch.optim.SGD(model.parameters() if params is None else params, lr=0.1)
    phase = lt.train(model, batches, step) | lt.backward(sgd, accumulate=accumulate)
    phase = phase | lt.unused_params(model, **options) | lt.update(sgd)
    return lt.workflow([(phase, 1)], max_epochs=epochs)


def told(action):
    with warnings.catch_warnings(record=True, action="always") as found:
        action()
    return [str(warning.message) for warning in found]


def test_what_the_loss_does_not_reach_is_named():
    """With the iteration, and what to do; the frozen and the reached are not."""
    model = parts(idle=nn.Linear(1, 1), frozen=nn.Linear(1, 1).requires_grad_(False))

    messages = told(run_of(model, [[]] * 3).to_end)

    assert messages == [
        "unused_params: in iteration 0 of train the loss did not reach 2 parameters: idle.weight, idle.bias. Use them "
        "in the step, or freeze them: lt.freeze(...), or requires_grad_(False)."
    ]


def test_once_for_each_set_of_names():
    """The first iteration of every pass is looked at; what was told is not told again."""
    model = parts(a=nn.Linear(1, 1, bias=False), b=nn.Linear(1, 1, bias=False))
    sets = iter([[["a"]], [["b"], ["a"]], [["a"]], [["a", "b"]]])
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    phase = lt.train(model, lambda: next(sets), step) | lt.backward(sgd) | lt.unused_params(model) | lt.update(sgd)

    messages = told(lt.workflow([(phase, 1)], max_epochs=4).to_end)

    assert [message.partition(": ")[2].partition(". ")[0] for message in messages] == [
        "in iteration 0 of train the loss did not reach 1 parameter: b.weight",
        "in iteration 1 of train the loss did not reach 1 parameter: a.weight",
    ]


def test_every_says_how_often():
    """Every 2 iterations: the second is looked at, the first is not."""
    model = parts(a=nn.Linear(1, 1, bias=False))

    assert told(run_of(model, [[], ["a"], [], ["a"]], every=2).to_end) == []
    assert len(told(run_of(model, [["a"], []], every=2).to_end)) == 1


def test_a_first_iteration_that_is_skipped_is_not_the_one():
    """The first that comes here is looked at, also in a later pass."""
    model = parts(a=nn.Linear(1, 1, bias=False))
    run = run_of(model, [["a"], []], epochs=2)
    list(run.take(2))
    run.before("backward")
    run.skip()

    assert "in iteration 3 of train" in told(run.to_end)[0]


def test_within_a_window_what_an_earlier_batch_reached_counts():
    """Gradients of a window add up."""
    model = parts(a=nn.Linear(1, 1, bias=False))

    assert told(run_of(model, [["a"], []], accumulate=2, every=2).to_end) == []


def test_what_no_optimizer_holds_is_named():
    """It requires gradients, and nobody moves it."""
    model = parts(a=nn.Linear(1, 1, bias=False))

    messages = told(run_of(model, [["a"]], params=model["used"].parameters()).to_end)

    assert len(messages) == 1
    assert "no optimizer of the run holds 1 parameter: a.weight. Give them to one" in messages[0]


def test_in_front_of_backward_it_says_where_it_belongs():
    """There nothing has a gradient."""
    model = parts()
    states = [lt.State(phase="train", first=True)]

    with pytest.warns(UserWarning, match="None of them has a gradient: is this part piped behind backward"):
        list(lt.unused_params(model)(states))


def test_it_changes_nothing(model, sgd, batches):
    """Same bits, nothing on the state, nothing read, no batch ahead; many names are cut short."""
    fetched = []

    def source():
        for batch in batches:
            fetched.append(batch)
            yield batch

    train = lt.train(model, source, lambda model, batch: model(batch))
    run = iter(train | lt.backward(sgd) | lt.unused_params(model) | lt.update(sgd))
    run.before("unused_params")
    before = repr(run.state)
    with device_reads() as reads:
        run.after("unused_params")

    assert repr(run.state) == before
    assert reads == []
    assert len(fetched) == 1
    assert [float(next(run).model.w.detach()) for _ in batches] == [2.0, 0.0, -3.0]
    many = parts(idle=nn.ModuleList([nn.Linear(1, 1) for _ in range(6)]))
    assert "12 parameters: idle.0.weight" in told(run_of(many, [[]]).to_end)[0]
    with pytest.raises(TypeError, match="unused_params: model must be a torch.nn.Module"):
        lt.unused_params(model.parameters())
    with pytest.raises(TypeError, match="every must be a number of iterations"):
        lt.unused_params(model, every="epoch")
