"""Noise on gradients."""

from __future__ import annotations

import math

import pytest
import torch
from loops import Case, assert_same, classify, device_reads

import looptools as lt


def by_hand(case, epochs=2, eta=0.3, gamma=0.55, poison=()):
    """The plain loop, with eq. 1 of Neelakantan et al. 2015."""
    model, optimizer, train, _ = case.make()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    updates, index = 0, -1
    model.train()
    for _ in range(epochs):
        for batch in train:
            index += 1
            optimizer.zero_grad()
            scaler.scale(classify(model, batch)["loss"] * (float("inf") if index in poison else 1.0)).backward()
            scaler.unscale_(optimizer)
            for parameter in model.parameters():
                noise = torch.randn_like(parameter.grad)
                parameter.grad.add_(noise, alpha=math.sqrt(eta / (1 + updates) ** gamma))
            scaler.step(optimizer)
            scaler.update()
            updates += index not in poison
    return model.state_dict()


def piped(case, epochs=2, poison=(), **options):
    model, optimizer, train, _ = case.make()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    def step(model, batch, state):
        return classify(model, batch)["loss"] * (float("inf") if state.iteration in poison else 1.0)

    phase = lt.train(model, train, step) | lt.backward(optimizer, scaler=scaler)
    phase = phase | lt.grad_noise(model.parameters(), **options) | lt.update(optimizer, scaler=scaler)
    return lt.workflow([(phase, 1)], max_epochs=epochs)


@pytest.mark.parametrize("poison", [(), (2, 5)], ids=["", "with skipped updates"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_same_as_by_hand(optimizer, poison):
    """To the bit; t counts updates, so one that the scaler skipped does not count."""
    case = Case(optimizer=optimizer)
    run = piped(case, poison=poison)
    run.to_end()

    assert_same(run.model.state_dict(), by_hand(case, poison=poison))


def test_a_resumed_run_goes_on_with_the_same_noise(tmp_path):
    """The number of updates and the generators are saved."""
    first = piped(Case(), epochs=3) | lt.checkpoint(tmp_path)
    list(first.take(9))
    torch.manual_seed(99)
    run = piped(Case(), epochs=3) | lt.checkpoint(tmp_path)
    run.resume()
    run.to_end()

    assert_same(run.model.state_dict(), by_hand(Case(), epochs=3))


def test_only_where_the_optimizer_moves(model, sgd, batches):
    """Within an accumulation window gradients are left alone; the update has eta's variance."""
    train = lt.train(model, batches[:2], lambda model, batch: model(batch))
    run = iter(train | lt.backward(sgd, accumulate=2) | lt.grad_noise([model.w], 4.0, 1.0) | lt.update(sgd))

    next(run)
    assert model.w.grad == 0.5
    torch.manual_seed(3)
    run.after("grad_noise")
    torch.manual_seed(3)
    assert model.w.grad == 1.5 + 2.0 * torch.randn(())


def test_parameters_without_a_gradient_are_passed_over(model, sgd, batches):
    """They draw no number either."""
    idle = torch.nn.Parameter(torch.ones(2))
    sgd.add_param_group({"params": [idle]})
    both = torch.nn.ModuleList([model, torch.nn.ParameterList([idle])])
    train = lt.train(both, batches, lambda both, batch: both[0](batch))
    run = iter(train | lt.backward(sgd) | lt.grad_noise([idle, model.w], eta=1.0) | lt.update(sgd))

    torch.manual_seed(0)
    next(run)

    torch.manual_seed(0)
    assert model.w.grad == 1.0 + torch.randn(())
    assert idle.grad is None


def test_the_device_is_not_read():
    """The deviation is worked out on the host, from counters."""
    run = piped(Case())
    run.before("grad_noise")
    with device_reads() as reads:
        run.after("grad_noise")

    assert reads == []


def test_bad_options(model, sgd, batches):
    """Refused where they are typed; parameters that nobody moves, when the run is built."""
    with pytest.raises(TypeError, match="grad_noise: params must be tensors"):
        lt.grad_noise([])
    with pytest.raises(ValueError, match="grad_noise: eta must be positive, got 0. For gradients without noise"):
        lt.grad_noise(model.parameters(), 0)
    with pytest.raises(ValueError, match="grad_noise: gamma must not be negative, got -1"):
        lt.grad_noise(model.parameters(), gamma=-1)
    with pytest.raises(RuntimeError, match="these states belong to no run"):
        next(lt.pipe([lt.State(phase="train", updates=True)], lt.grad_noise(model.parameters())))
    other = torch.nn.Parameter(torch.ones(()))
    train = lt.train(model, batches, lambda model, batch: model(batch)) | lt.backward(sgd) | lt.grad_noise(other)
    with pytest.raises(ValueError, match="grad_noise: no optimizer of the run holds these parameters"):
        next(iter(train | lt.update(sgd)))


def test_over_several_optimizers():
    """Those that hold the parameters count, not who moves others; the second update has 1 / (1 + 1) ** 2 of eta."""
    weights = [torch.nn.Parameter(torch.zeros(())) for _ in range(3)]
    optimizers = [torch.optim.SGD([weight], lr=1.0) for weight in weights]
    noise = lt.grad_noise(weights[:2], eta=1.0, gamma=2.0)
    step = lambda model, batch: weights[0] * 1 + weights[1] * 2  # noqa: E731
    train = lt.train(torch.nn.ParameterList(weights), [1] * 3, step) | lt.optimize(optimizers[:2], between=noise)
    other = lt.forward(lambda model, batch: weights[2] * 1)
    run = iter(train | other | lt.optimize(optimizers[2], name="other") | other | lt.optimize(optimizers[2]))
    next(run)

    run.before("grad_noise")
    torch.manual_seed(3)
    run.after("grad_noise")
    torch.manual_seed(3)
    assert [weight.grad for weight in weights[:2]] == [mean + 0.5 * torch.randn(()) for mean in (1.0, 2.0)]


def test_params_that_cannot_be_iterated():
    """The same words as for clip_grad_norm."""
    with pytest.raises(TypeError, match="grad_noise: params must be tensors, as in model.parameters.., got 3"):
        lt.grad_noise(3)
