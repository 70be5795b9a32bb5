"""No mode of torch or of a model is left switched where the user can see it."""

from __future__ import annotations

import pytest
import torch
from loops import Case, Planted, Trips, piped
from torch.utils.checkpoint import checkpoint

import looptools as lt


def modes():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_device(),
        torch.get_default_dtype(),
    )


def whole_run(step=None):
    model, optimizer, train, val = Case(cosine=True).make()
    from loops import classify

    train = lt.train(model, train, step or classify, autocast="bfloat16") | lt.schedule_lr(
        optimizer, lt.schedules.cosine()
    )
    train = train | lt.optimize(optimizer, max_norm=1.0, accumulate=2)
    val = lt.validate(model, val, step or classify, autocast="bfloat16")
    return lt.workflow([(train, 1), (val, 1)], max_epochs=1) | lt.log(every=1, line=None)


def test_modes_are_the_same_after_every_next_and_every_part():
    """Grad mode, autocast, inference mode, default device and dtype; by `next`, by `stages`, after break and close."""
    run, before = whole_run(), modes()

    for number, _ in enumerate(run):
        assert modes() == before
        if number == 2:
            break
    assert modes() == before
    for _ in range(6):
        for _ in run.stages():
            assert modes() == before
    run.close()
    assert modes() == before


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_modes_that_the_caller_switched_are_left_as_they_are(outer):
    """A run that is iterated within the caller's own mode does not switch it."""
    model = torch.nn.Linear(1, 1)
    val = lt.validate(model, [torch.ones(1, 1)] * 2, lambda model, batch: {"x": model(batch).mean()})
    run = lt.workflow([(val, 1)], max_rounds=1)

    with outer():
        before = modes()
        next(run)
        assert modes() == before
    next(run)
    assert modes() == (True, False, False, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", ["train/forward", "train/update", "train/average", "val/forward", "run/log"])
def test_modes_are_the_same_after_an_exception(name):
    """Whatever part raises."""
    run, before = whole_run(), modes()
    slot = next(slot for slot in run.cursor.slots if slot.name == name)
    slot.part = Trips(slot.part, at=lambda state: state.last)

    with pytest.raises(Planted):
        run.to_end()

    assert modes() == before


def test_modes_are_the_same_after_a_step_that_raises():
    """In the middle of no_grad and autocast."""

    def step(model, batch):
        raise Planted

    before = modes()
    for make in (lt.train, lt.validate):
        run = lt.workflow([(make(None, [1], step, autocast=torch.bfloat16), 1)], max_rounds=1)
        with pytest.raises(Planted):
            next(run)
        assert modes() == before


def test_train_and_eval_mode_follow_the_phase_and_frozen_modules_stay_frozen():
    """After a train state the model is in train mode, after a val state in eval mode; what is frozen stays."""
    model, optimizer, train, val = Case().make()
    model[1].eval()
    frozen = model[1].running_mean.clone()
    step = lambda model, batch: model(batch[0]).mean()  # noqa: E731
    phases = [(lt.train(model, train, step) | lt.optimize(optimizer), 1), (lt.validate(model, val, step), 1)]

    for state in lt.workflow(phases, max_epochs=2):
        assert (model.training, model[0].training, model[1].training) == (state.trains, state.trains, False)

    assert torch.equal(model[1].running_mean, frozen)


@pytest.mark.filterwarnings("ignore:train. nobody calls backward, so nothing is trained:UserWarning")
def test_a_model_that_fits_already_is_not_touched(monkeypatch):
    """`model.train()` costs time and forgets frozen parts, so it is called at a change of phase only."""
    calls = []
    model = torch.nn.Linear(1, 1)
    monkeypatch.setattr(
        torch.nn.Linear, "train", lambda self, mode=True: calls.append(mode) or torch.nn.Module.train(self, mode)
    )
    step = lambda model, batch: model(batch).mean()  # noqa: E731
    phases = [(make(model, [torch.ones(1, 1)] * 5, step), 1) for make in (lt.train, lt.validate)]

    lt.workflow(phases, max_epochs=2).to_end()

    assert calls == [False, True, False]


def test_models_with_activation_checkpointing_train():
    """A recomputation in backward sees the mode of the forward, and the same dropout: equal to the loop by hand."""

    class Recomputes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    data = [torch.randn(4, 3, generator=torch.Generator().manual_seed(n)) for n in range(5)]

    def make():
        torch.manual_seed(0)
        model = Recomputes()
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    model, sgd = make()
    for batch in data:
        sgd.zero_grad()
        model(batch).pow(2).mean().backward()
        sgd.step()
    by_hand = model.state_dict()
    model, sgd = make()
    lt.workflow([(lt.train(model, data, lambda m, b: m(b).pow(2).mean()) | lt.optimize(sgd), 1)], max_epochs=1).to_end()

    assert all(torch.equal(value, by_hand[key]) for key, value in model.state_dict().items())


def test_a_source_that_leaks_a_mode_is_named():
    """A rollout generator that yields within no_grad would train without gradients: an error, and gradients are on."""

    def rollouts():
        with torch.no_grad():
            while True:
                yield torch.ones(1)

    run = lt.workflow([(lt.train(None, rollouts(), lambda m, b: {"x": b}), lt.iterations(3))], max_epochs=1)

    with pytest.raises(RuntimeError, match="train: its source left gradients, inference_mode or autocast"):
        next(run)
    assert torch.is_grad_enabled()


def test_autocast_is_around_the_step_alone():
    """Within the step matrix products are bf16; backward runs outside, as in torch's own recipe."""
    seen = []

    def step(model, batch):
        seen.append(torch.is_autocast_enabled("cpu"))
        loss = model(batch).mean()
        loss.register_hook(lambda grad: seen.append(torch.is_autocast_enabled("cpu")))
        return loss.float()

    model = torch.nn.Linear(2, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    next(iter(lt.train(model, [torch.ones(1, 2)], step, autocast=torch.bfloat16) | lt.optimize(sgd)))

    assert seen == [True, False]
    with pytest.raises(TypeError, match="autocast must be a dtype"):
        lt.train(model, [1], step, autocast="fast")


def test_piped_is_used():
    """The plain case of the other tests trains at all."""
    assert piped(Case()).to_end()["train/accuracy"] > 0


@pytest.mark.filterwarnings("ignore:train. nobody calls backward, so nothing is trained:UserWarning")
def test_a_part_of_a_model_that_is_validated_by_itself_comes_back_to_train_mode():
    """`validate(model.inner)` switches the inner model only; the next training pass finds it switched back."""
    inner = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout(), torch.nn.BatchNorm1d(1))
    inner[2].eval()
    outer = torch.nn.Sequential(inner)
    step = lambda model, batch: model(batch).mean()  # noqa: E731
    phases = [lt.train(outer, [torch.ones(2, 1)], step), lt.validate(inner, [torch.ones(2, 1)], step)]

    seen = [
        (outer.training, inner.training, inner[1].training, inner[2].training)
        for _ in lt.workflow([(phase, 1) for phase in phases], max_epochs=2)
    ]

    assert seen == [(True, True, True, False), (True, False, False, False)] * 2


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu"), torch.no_grad])
def test_every_leaked_mode_is_named_and_left(mode):
    """A generator that is closed leaves its `with`; the caller's modes are as before."""

    def leaking():
        with mode():
            yield torch.ones(1)

    before = modes()
    run = lt.workflow([(lt.train(None, leaking, lambda m, b: {"x": b}), 1)], max_epochs=1)

    with pytest.raises(RuntimeError, match="its source left gradients, inference_mode or autocast switched"):
        next(run)
    assert modes() == before
