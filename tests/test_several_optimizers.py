"""Several optimizers in one pipe, with a loss each (a GAN) or over one loss: the bits of the loop by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from loops import (
    Planted,
    Together,
    assert_same,
    classify,
    device_reads,
    loader,
    network,
    together_by_hand,
    together_piped,
    tripping,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import looptools as lt

BUFFERS = ["running_mean", "running_var", "num_batches_tracked"]


def make():
    """Generator and discriminator with dropout and BatchNorm, their optimizers, and 6 batches of 4."""
    torch.manual_seed(0)
    gan = nn.ModuleDict(
        {
            "G": nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
            "D": nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(8, 1)),
        }
    )
    opt_d = torch.optim.Adam(gan["D"].parameters(), lr=0.02, betas=(0.5, 0.999))
    opt_g = torch.optim.AdamW(gan["G"].parameters(), lr=0.01)
    data = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
    return gan, opt_d, opt_g, DataLoader(TensorDataset(data), 4, shuffle=True)


def judge(logits, real):
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


def d_step(gan, batch):
    fake = gan["G"](torch.randn(len(batch[0]), 2))
    loss = judge(gan["D"](batch[0]), True) + judge(gan["D"](fake.detach()), False)
    return {"loss": loss, "d_loss": loss}


def g_step(gan, batch):
    loss = judge(gan["D"](gan["G"](torch.randn(len(batch[0]), 2))), True)
    return {"loss": loss, "g_loss": loss}


def by_hand(epochs=2, accumulate=1, max_norm=None):
    """What a GAN tutorial writes; with *accumulate*, the discriminator's gradients are kept from G's backward."""
    gan, opt_d, opt_g, loader = make()
    gan.train()
    for _ in range(epochs):
        for index, batch in enumerate(loader):
            if index % accumulate == 0:
                opt_d.zero_grad()
            loss = d_step(gan, batch)["loss"]
            (loss / accumulate if accumulate > 1 else loss).backward()
            if (index + 1) % accumulate == 0:
                if max_norm:
                    nn.utils.clip_grad_norm_(gan["D"].parameters(), max_norm)
                opt_d.step()
            opt_g.zero_grad()
            gan["D"].requires_grad_(False)
            g_step(gan, batch)["loss"].backward()
            gan["D"].requires_grad_(True)
            opt_g.step()
    return gan.state_dict()


def piped(epochs=2, accumulate=1, max_norm=None):
    gan, opt_d, opt_g, loader = make()
    discriminate = lt.train(gan, loader, d_step) | lt.optimize(
        opt_d, accumulate=accumulate, max_norm=max_norm, name="D"
    )
    train = discriminate | lt.forward(g_step) | lt.optimize(opt_g, name="G")
    return lt.workflow([(train, 1)], max_epochs=epochs)


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_in_one_go(max_norm):
    """One update of D and one of G an iteration."""
    run = piped(max_norm=max_norm)

    run.to_end()

    assert_same(run.model.state_dict(), by_hand(max_norm=max_norm))
    assert list(run.progress.updates.values()) == [12, 12]
    assert list(run.optimizer) == ["D.optimizer", "G.optimizer"]


def test_stopped_between_any_two_parts():
    """Left within an iteration, before G's forward too, and gone on with."""
    run = piped(max_norm=0.1)

    names = [name for name, _ in run.stages()]
    for n in itertools.cycle(range(1, 11)):
        for _ in itertools.islice(run.stages(), n):
            pass
        if next(run, None) is None:
            break

    parts = ["batches", "forward", "D.backward", "D.clip_grad_norm", "D.update"]
    assert names == [f"train/{name}" for name in [*parts, "forward#2", "G.backward", "G.update", "average"]]
    assert_same(run.model.state_dict(), by_hand(max_norm=0.1))


@pytest.mark.parametrize("name", ["forward", "D.backward", "D.update", "forward#2", "G.backward", "G.update"])
def test_after_an_exception_at_the_entry_of_a_part(name):
    """Only the failed optimizer's half is redone; a redone forward moves BatchNorm's statistics twice."""
    run = piped()
    slot = next(slot for slot in run.cursor.slots if slot.name == f"train/{name}")
    slot.part = tripping(slot.part, at=lambda state: True)
    failures = 0

    while not run.ended:
        try:
            run.to_end()
        except Planted:
            failures += 1

    assert failures == 12
    assert_same(run.model.state_dict(), by_hand(), but=BUFFERS if "backward" in name else [])


def test_one_optimizer_accumulates_and_the_others_loss_does_not_leak_into_its_window():
    """G's loss goes through D, whose window is open then; only G's parameters get its gradients."""
    run = piped(accumulate=3)

    run.to_end()

    assert_same(run.model.state_dict(), by_hand(accumulate=3))
    assert sorted(run.progress.updates.values()) == [4, 12]


def test_the_last_forwards_loss_is_the_one_that_is_logged():
    """`loss` is G's, in metrics, results and on the state; keys of their own show both."""
    gan, opt_d, opt_g, loader = make()
    train = lt.train(gan, loader, d_step) | lt.optimize(opt_d, name="D") | lt.forward(g_step) | lt.optimize(opt_g)
    run = lt.workflow([(train, 1)], max_epochs=1)

    state = run.before("forward#2")
    first = state.metrics["loss"]
    assert torch.equal(first, state.metrics["d_loss"])
    next(run)
    run.to_end()

    assert torch.equal(state.metrics["loss"], state.metrics["g_loss"])
    assert torch.equal(state.loss.detach(), state.metrics["g_loss"])
    assert torch.equal(first, state.metrics["d_loss"])
    assert run.results["train/loss"] == run.results["train/g_loss"] != run.results["train/d_loss"]


def test_each_optimizer_has_its_own_scaler_or_no_window():
    """A shared scaler that changes its scale would spoil gradients that wait in an open window."""
    gan, opt_d, opt_g, loader = make()
    scaler = torch.amp.GradScaler("cpu")
    train = lt.train(gan, loader, d_step) | lt.optimize(opt_d, scaler=scaler, accumulate=2, name="D")
    train = train | lt.forward(g_step) | lt.optimize(opt_g, scaler=scaler, name="G")

    with pytest.raises(ValueError, match="backward: a GradScaler that several backwards share"):
        next(iter(train))


def infinite(step, planted):
    """The same step, whose loss is infinite in these iterations."""
    return lambda gan, batch, state: {
        "loss": step(gan, batch)["loss"] * (math.inf if state.iteration in planted else 1)
    }


@pytest.mark.parametrize("late", [False, True], ids=["each updates at once", "both losses before both updates"])
def test_a_shared_scaler_changes_its_scale_once_an_iteration(late):
    """torch's recipe, with planted infinities for D, for G and for both: weights, moves and every scale."""
    for_d, for_g = {1, 4, 8}, {2, 8}

    gan, opt_d, opt_g, loader = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    halves = [(opt_d, gan["D"], d_step, for_d), (opt_g, gan["G"], g_step, for_g)]
    expected = []
    gan.train()
    for iteration, batch in enumerate(itertools.chain.from_iterable(loader for _ in range(2))):
        for optimizer, own, step, planted in halves:
            optimizer.zero_grad()
            loss = step(gan, batch)["loss"] * (math.inf if iteration in planted else 1)
            scaler.scale(loss).backward(inputs=list(own.parameters()))
            scaler.unscale_(optimizer)
            if not late:
                scaler.step(optimizer)
        for optimizer in (opt_d, opt_g) if late else ():
            scaler.step(optimizer)
        scaler.update()
        expected.append(scaler.get_scale())
    weights = gan.state_dict()

    gan, opt_d, opt_g, loader = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    fill_d, fill_g = lt.backward(opt_d, scaler=scaler), lt.backward(opt_g, scaler=scaler)
    move_d, move_g = lt.update(opt_d, scaler=scaler), lt.update(opt_g, scaler=scaler)
    second = lt.forward(infinite(g_step, for_g))
    train = lt.train(gan, loader, infinite(d_step, for_d)) | fill_d
    train = train | second | fill_g | move_d | move_g if late else train | move_d | second | fill_g | move_g
    run = lt.workflow([(train, 1)], max_epochs=2)
    scales = [scaler.get_scale() for _ in run]

    assert scales == expected
    assert len(set(scales)) > 3
    assert_same(gan.state_dict(), weights)
    assert [run.progress.updates[optimizer] for optimizer in (opt_d, opt_g)] == [9, 10]


@pytest.mark.parametrize("shared", [True, False, None], ids=["one scaler", "two scalers", "none"])
def test_both_losses_before_both_updates(shared):
    """Each optimizer by its own window and its own scaler: what D skips, G makes."""
    weights = [nn.Parameter(torch.zeros(())) for _ in range(2)]
    opt_d, opt_g = (torch.optim.SGD([weight], lr=1.0) for weight in weights)
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in range(2)] if shared is not None else [None, None]
    first, second = scalers[:1] * 2 if shared else scalers
    d_loss = lambda model, batch, state: weights[0] * (math.inf if state.iteration == 2 and first else 1)  # noqa: E731
    train = lt.train(nn.ParameterList(weights), [1] * 6, d_loss) | lt.backward(opt_d, scaler=first)
    train = train | lt.forward(lambda model, batch: weights[1] * 1) | lt.backward(opt_g, scaler=second)
    run = lt.workflow([(train | lt.update(opt_d, scaler=first) | lt.update(opt_g, scaler=second), 1)], max_epochs=1)

    assert all(state.updates for state in run)
    assert [weight.item() for weight in weights] == [-5.0 if first else -6.0, -6.0]
    assert [run.progress.updates[optimizer] for optimizer in (opt_d, opt_g)] == [5 if first else 6, 6]
    assert first is None or [first.get_scale(), second.get_scale()] == [2.0, 2.0 if shared else 4.0]


@pytest.mark.parametrize("lengths", [(1, 3), (3, 1)])
def test_both_losses_before_both_updates_with_windows_of_their_own(lengths):
    """D moves six times and G twice, or the other way round; nobody clips or moves what is in an open window."""
    weights = [nn.Parameter(torch.zeros(())) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=1.0) for weight in weights]
    train = lt.train(nn.ParameterList(weights), [1.0] * 6, lambda model, batch: weights[0] * 2)
    train = train | lt.backward(optimizers[0], accumulate=lengths[0])
    train = train | lt.forward(lambda model, batch: weights[0].detach() + weights[1] * 2)
    train = train | lt.backward(optimizers[1], accumulate=lengths[1])
    for weight in weights:
        train = train | lt.clip_grad_norm([weight], 0.5) | lt.clip_grad_value([weight], 0.5)
    run = lt.workflow([(train | lt.update(optimizers[0]) | lt.update(optimizers[1]), 1)], max_epochs=1)
    waiting = weights[lengths.index(3)]

    grads = [waiting.grad.item() for _ in run]

    assert [run.progress.updates[optimizer] for optimizer in optimizers] == [6 // length for length in lengths]
    assert grads == pytest.approx([2 / 3, 4 / 3, 0.5] * 2, abs=1e-6)
    assert [weight.item() for weight in weights] == pytest.approx([-0.5 * 6 / length for length in lengths], abs=1e-5)


def test_the_second_loss_does_not_leak_into_the_first_ones_waiting_gradients():
    """G's loss goes through D's weight, whose update is still to come."""
    weights = [nn.Parameter(torch.zeros(())) for _ in range(2)]
    opt_d, opt_g = (torch.optim.SGD([weight], lr=1.0) for weight in weights)
    train = lt.train(nn.ParameterList(weights), [1], lambda model, batch: weights[0] * 1) | lt.backward(opt_d)
    train = train | lt.forward(lambda model, batch: 10 * weights[0] + weights[1]) | lt.backward(opt_g)
    (train | lt.update(opt_d) | lt.update(opt_g)).to_end()

    assert [weight.item() for weight in weights] == [-1, -1]


def test_a_user_that_calls_off_one_update_does_not_call_off_the_next():
    """`state.updates = False` between D's backward and its update is D's affair; G's window is open meanwhile."""
    weights = [nn.Parameter(torch.zeros(())) for _ in range(2)]
    opt_d, opt_g = (torch.optim.SGD([weight], lr=1.0) for weight in weights)

    def call_off(states):
        for state in states:
            state.updates = False
            yield state

    train = lt.train(nn.ParameterList(weights), [1] * 4, lambda model, batch: weights[0] * 1)
    train = train | lt.backward(opt_d) | call_off | lt.update(opt_d)
    train = train | lt.forward(lambda model, batch: weights[1] * 1) | lt.optimize(opt_g, accumulate=2)
    run = lt.workflow([(train, 1)], max_epochs=1)

    assert [state.updates for state in run] == [False, True] * 2
    assert [weight.item() for weight in weights] == [0.0, -2.0]


def test_one_optimizer_with_two_losses_and_a_scaler():
    """Stepped twice an iteration: the scale changes in between, or torch's scaler would refuse."""
    weight = nn.Parameter(torch.zeros(()))
    sgd = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
    step = lambda model, batch: weight * 1  # noqa: E731
    train = lt.train(nn.ParameterList([weight]), [1] * 3, step) | lt.optimize(sgd, scaler=scaler)
    run = lt.workflow([(train | lt.forward(step) | lt.optimize(sgd, scaler=scaler), 1)], max_epochs=1)

    assert [scaler.get_scale() for _ in run] == [4.0, 8.0, 16.0]
    assert weight.item() == -6.0


@pytest.mark.parametrize("before", ["D.update", "G.update"])
def test_a_shared_scaler_is_told_once_of_a_batch_that_was_skipped(before):
    """By whoever opens the next window: it holds for the optimizer whose step was to come."""
    gan, opt_d, opt_g, loader = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    train = lt.train(gan, loader, d_step) | lt.optimize(opt_d, scaler=scaler, name="D")
    train = train | lt.forward(g_step) | lt.optimize(opt_g, scaler=scaler, name="G")
    run = lt.workflow([(train, 1)], max_epochs=1)
    run.before(f"train/{before}")
    run.skip()
    run.to_end()

    assert [run.progress.updates[optimizer] for optimizer in (opt_d, opt_g)] == [6 if before == "G.update" else 5, 5]


def test_a_resumed_gan_ends_with_the_same_bits(tmp_path):
    """Both optimizers are in the checkpoint, by their names."""
    list((piped() | lt.checkpoint(tmp_path)).take(6))
    run = piped() | lt.checkpoint(tmp_path)
    run.resume()

    run.to_end()

    assert_same(run.model.state_dict(), by_hand())


def test_device_reads():
    """None an iteration but the optimizers' own."""
    gan, opt_d, opt_g, loader = make()
    train = lt.train(gan, loader, d_step) | lt.optimize(opt_d, max_norm=1.0, accumulate=2, name="D")
    run = lt.workflow([(train | lt.forward(g_step) | lt.optimize(opt_g, name="G"), 1)], max_epochs=1)
    next(run)
    for optimizer in (opt_d, opt_g):
        optimizer.step = lambda: None  # on the CPU, Adam reads its own step counter

    with device_reads() as reads:
        list(run.take(4))

    assert reads == []


# Over one loss

PLANTED = {1: "matrices", 4: "rest", 5: "both", 9: "matrices", 12: "rest"}
TOGETHER = [
    Together(),
    Together(max_norm=0.5, accumulate=3, cosine=True),
    Together(max_norm=0.5, accumulate=3, cosine=True, across_epochs=True),
    Together(planted={}),
    Together(planted=PLANTED, cosine=True),
    Together(planted=PLANTED, max_norm=0.5, accumulate=2, cosine=True),
    Together(planted=PLANTED, max_norm=0.5, accumulate=3, cosine=True, across_epochs=True),
    pytest.param(
        Together(matrices="Muon", max_norm=0.5, accumulate=2, cosine=True),
        marks=pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon"),
    ),
]
WITH_ALL = TOGETHER[6]


@pytest.mark.parametrize("case", TOGETHER, ids=str)
def test_over_one_loss(case):
    """Windows, clipping of all as one vector, a schedule for each, and a scaler by which each skips its own steps."""
    weights, moved, scales = together_by_hand(case)
    run = together_piped(case)
    scaler = run["train/backward"].scaler
    first, second = run["train/backward"].optimizers
    total = run.total("update", first)

    closed, got = [], []
    for state in run:
        if run["train/backward"].filled == 0:
            closed.append(state.updates)
            got.append(scaler.get_scale() if scaler else 0.0)

    assert_same(run.model.state_dict(), weights)
    assert closed == [any(who) for who in moved]
    assert got == (scales or [0.0] * len(got))
    assert [run.progress.updates[o] for o in (first, second)] == [sum(who) for who in zip(*moved, strict=True)]
    assert total == run.total("update", second) == len(moved)
    if case.planted:
        assert {(True, False), (False, True)} <= set(moved)  # the case has what it is for
        assert len(set(scales)) > 2


@pytest.mark.parametrize("case", [TOGETHER[1], TOGETHER[2], WITH_ALL], ids=str)
def test_over_one_loss_resumed(case, tmp_path):
    """At the end of a pass, with *across_epochs* in an open window: gradients, optimizers, the scale, all counts."""
    run = together_piped(case) | lt.checkpoint(tmp_path)
    list(run.take(7))
    assert run["train/backward"].filled == (1 if case.across_epochs else 0)
    torch.manual_seed(99)

    run = together_piped(case) | lt.checkpoint(tmp_path)
    run.resume()
    run.to_end()

    weights, moved, _ = together_by_hand(case)
    assert_same(run.model.state_dict(), weights)
    assert list(run.optimizer) == ["optimizer", "optimizer#2"]
    assert [run.progress.updates[o] for o in run.optimizer.values()] == [sum(who) for who in zip(*moved, strict=True)]


@pytest.mark.parametrize("name", ["forward", "backward", "clip_grad_norm", "update", "update#2"])
def test_over_one_loss_after_an_exception_at_the_entry_of_a_part(name):
    """What has moved does not move again; what has not moves then, also where the first one's step was skipped."""
    run = together_piped(WITH_ALL)
    slot = next(slot for slot in run.cursor.slots if slot.name == f"train/{name}")
    slot.part = tripping(slot.part, at=lambda state: True)
    failures = 0

    while not run.ended:
        try:
            run.to_end()
        except Planted:
            failures += 1

    assert failures == 14
    assert_same(run.model.state_dict(), together_by_hand(WITH_ALL)[0], but=BUFFERS if name == "backward" else [])


def test_over_one_loss_in_a_plain_pipe(model, batches):
    """Without a run the scale changes once an update, too."""
    bias = nn.Parameter(torch.zeros(()))
    optimizers = [torch.optim.SGD([model.w], lr=1.0), torch.optim.SGD([bias], lr=1.0)]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    losses = (model(batch) + bias * weight for batch, weight in zip(batches, (1.0, float("inf"), 1.0), strict=True))
    states = (lt.State(phase="train", index=n, loss=loss) for n, loss in enumerate(losses))

    pipe = lt.pipe(states, lt.optimize(optimizers, scaler=scaler))
    got = [(state.updates, model.w.item(), bias.item(), scaler.get_scale()) for state in pipe]

    assert got == [(True, 2.0, -1.0, 4.0), (True, 0.0, -1.0, 2.0), (True, -3.0, -2.0, 2.0)]


@pytest.mark.parametrize(("before", "counts"), [("train/update", [13, 13]), ("train/update#2", [14, 13])])
def test_over_one_loss_a_batch_that_is_skipped_before_its_updates(before, counts):
    """The scaler is told, so that the next window can be unscaled; who has moved has moved."""
    run = together_piped(Together(planted={}))
    run.before(before)
    run.skip()
    run.to_end()

    assert [run.progress.updates[optimizer] for optimizer in run.optimizer.values()] == counts


def test_a_frozen_half_is_stepped_as_without_a_scaler():
    """Torch's scaler refuses an optimizer without gradients; `freeze` makes one."""
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=64.0)):
        torch.manual_seed(0)
        model = network()
        half = len(list(model[0].parameters()))
        params = list(model.parameters())
        optimizers = [torch.optim.SGD(part, lr=0.1, momentum=0.9) for part in (params[:half], params[half:])]
        train = lt.train(model, loader(), classify) | lt.freeze("0", until=3) | lt.optimize(optimizers, scaler=scaler)
        run = lt.workflow([(train, 1)], max_epochs=1)
        run.to_end()
        assert list(run.progress.updates.values()) == [7, 7]
        results.append(model.state_dict())

    assert_same(*results)


def test_over_one_loss_device_reads():
    """A scaler asks once an optimizer, as by hand; without one nobody asks."""
    for planted, expected in ((None, []), ({}, ["item"] * 4)):
        run = together_piped(Together(planted=planted, accumulate=2, max_norm=1.0))
        next(run)
        for optimizer in run["train/backward"].optimizers:
            optimizer.step = lambda: None  # on the CPU, AdamW reads its own step counter
        with device_reads() as reads:
            list(run.take(4))

        assert reads == expected


def test_windows_of_two_phases_with_optimizers_in_common():
    """One phase trains both, the other the second alone; each window waits for its own next pass."""

    def make():
        model, optimizers, train, _ = Together().make()
        both = lt.train(model, train, classify, name="both") | lt.optimize(optimizers, accumulate=4, across_epochs=True)
        rest = lt.train(model, train, classify, name="rest") | lt.optimize(optimizers[1], accumulate=3)
        return lt.workflow([(both, 1), (rest, 1)], max_rounds=2), optimizers

    run, (first, second) = make()

    assert run.total("update", first) == 4  # of 14 by 4
    assert run.total("update", second) == 4 + 2 * 3
    run.to_end()
    assert [run.progress.updates[o] for o in (first, second)] == [4, 10]


def test_a_replaced_backward_of_several_goes_on_with_the_open_window(tmp_path):
    """Resumed, so that gradients still lie aside; in another order, even."""
    case = Together(accumulate=4, across_epochs=True)
    list((together_piped(case) | lt.checkpoint(tmp_path)).take(7))
    run = together_piped(case) | lt.checkpoint(tmp_path)
    run.resume()
    first, second = run["train/backward"].optimizers

    run.replace("backward", lt.backward((second, first), accumulate=4, across_epochs=True))
    run.to_end()

    assert_same(run.model.state_dict(), together_by_hand(case)[0])


def test_explain_shows_both(capsys):
    """Their kinds in a list, and an update for each."""
    together_piped(Together()).explain()

    shown = capsys.readouterr().out
    assert "backward  optimizer=[SGD, AdamW]" in shown
    assert "update    optimizer=SGD" in shown
    assert "update#2  optimizer=AdamW" in shown


def test_a_list_of_one_is_that_one(sgd):
    """So a list that is made by a function need not be looked at."""
    assert lt.backward([sgd]).optimizer is sgd
    assert [type(part).__name__ for part in lt.optimize([sgd]).parts] == ["backward", "update"]
    assert lt.backward(sgd).optimizers == (sgd,)


@pytest.mark.parametrize("typed", [lt.optimize, lt.backward])
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda a, b: [a, b, a], ValueError, r"optimizer\[0\] and optimizer\[2\] are the same SGD. Give it once"),
        (
            lambda a, b: [a, torch.optim.Adam([*b.param_groups[0]["params"], *a.param_groups[0]["params"]])],
            ValueError,
            r"optimizer\[0\] \(SGD\) and optimizer\[1\] \(Adam\) share a parameter of shape \(2,\)",
        ),
        (lambda a, b: [], ValueError, "the list of optimizers is empty"),
        (lambda a, b: [a, "adam"], TypeError, r"optimizer\[1\] must be a torch.optim.Optimizer, got 'adam'"),
        (lambda a, b: "adam", TypeError, "optimizer must be a torch.optim.Optimizer, got 'adam'"),
        (
            lambda a, b: [a, torch.optim.LBFGS(b.param_groups[0]["params"])],
            TypeError,
            r"LBFGS evaluates the loss several times.* lt.optimize\(lbfgs\) \| lt.forward\(step\) \| lt.optimize\(",
        ),
    ],
)
def test_what_cannot_share_a_loss_is_refused_where_it_is_typed(typed, given, error, message):
    """The error begins with what was typed."""
    a, b = (torch.optim.SGD([nn.Parameter(torch.zeros(n))], lr=0.1) for n in (2, 3))

    with pytest.raises(error, match=f"^{typed.__name__}: {message}"):
        typed(given(a, b))


def test_an_update_moves_one(sgd):
    """The error says how several are spelt."""
    with pytest.raises(TypeError, match=r"update: it moves one optimizer.*lt.optimize\(\[first, second\]\)"):
        lt.update([sgd, sgd])


def test_optimizers_that_only_a_backward_holds_are_known_too():
    """A part of your own may step them; the run holds and saves them."""
    model = network()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.SGD([*model[1].parameters(), *model[4].parameters()], lr=0.1)

    def step_both(states):
        for state in states:
            first.step()
            second.step()
            yield state

    run = iter(lt.train(model, loader(), classify) | lt.backward([first, second]) | step_both)
    next(run)

    assert run.optimizer == {"optimizer": first, "optimizer#2": second}
