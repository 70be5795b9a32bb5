"""Losses that are not a number."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from loops import Case, assert_same, by_hand, device_reads
from loops import classify as step
from torch import nn

import looptools as lt

NAN, INF = math.nan, math.inf


def batches_of(*means):
    return [torch.full((2, 1), float(mean)) for mean in means]


def run_of(model, source, *parts, epochs=1):
    phase = lt.train(model, source, lambda model, batch: model(batch))
    for part in parts:
        phase = phase | part
    return lt.workflow([(phase, 1)], max_epochs=epochs)


def test_a_nan_stops_the_run_before_the_weights(model, sgd):
    """The error says which batch it was, and what can be done; the weight has only seen the one before."""
    run = run_of(model, batches_of(1, NAN, 2), lt.nan_guard(), lt.optimize(sgd))

    with pytest.raises(FloatingPointError) as caught:
        run.to_end()

    assert str(caught.value) == (
        "nan_guard: loss is nan (iteration 1, epoch 0, batch 1 of train). Look at run.failed.state.batch. Mend the "
        "step: run.replace(step), then run.retry()."
    )
    assert run.failed.part == "train/nan_guard"
    assert run.failed.state.batch.isnan().all()
    assert model.w.item() == 2.0
    run.skip()
    run.to_end()
    assert model.w.item() == 0.0


def images_with_a_blank():
    """Six batches of images; that at 3 is blank, and dividing by its brightness gives nan."""
    images = torch.rand(6, 4, 9, generator=torch.Generator().manual_seed(1)) + 0.1
    images[3, 2] = 0.0
    return [(batch, torch.arange(4) % 2) for batch in images]


def classify(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images / images.sum(-1, keepdim=True)), labels)


def mended(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images / images.sum(-1, keepdim=True).clamp(min=1e-6)), labels)


mended.__name__ = "classify"


def demo(step, behind_clip=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    phase = lt.train(model, images_with_a_blank(), step) | lt.schedule_lr(optimizer, lt.schedules.cosine())
    if behind_clip:
        clip = lt.clip_grad_norm(model.parameters(), 1.0)
        phase = phase | lt.backward(optimizer) | clip | lt.nan_guard() | lt.update(optimizer)
    else:
        phase = phase | lt.nan_guard() | lt.optimize(optimizer, max_norm=1.0)
    return lt.workflow([(phase, 1)], max_epochs=2)


@pytest.mark.parametrize("behind_clip", [False, True])
def test_mended_and_retried_it_is_as_if_nothing_had_been(behind_clip):
    """The demo: stopped at a blank image, the step mended, the batch redone; the bits of a run that had it mended."""
    whole = demo(mended, behind_clip)
    whole.to_end()
    run = demo(classify, behind_clip)
    with pytest.raises(FloatingPointError, match=r"loss is nan.*\(iteration 3, epoch 0, batch 3 of train\)"):
        run.to_end()
    images = run.failed.state.batch[0]
    assert (images.sum(-1) == 0).tolist() == [False, False, True, False]

    run.replace(mended)
    run.retry()
    run.to_end()

    assert (run.progress.iteration, run.results) == (12, whole.results)
    assert_same(run.model.state_dict(), whole.model.state_dict())


def test_batches_are_dropped_up_to_a_budget(model, sgd):
    """Two with a warning each, the third stops the run; the weight is that of a loop with `continue`."""
    run = run_of(model, batches_of(NAN, INF, 1, NAN, 4), lt.nan_guard(skip=2), lt.optimize(sgd))

    with (
        pytest.warns(UserWarning, match=r"loss is nan \(iteration 0, .* dropped, 1 of at most 2"),
        pytest.warns(UserWarning, match=r"loss is inf \(iteration 1, .* dropped, 2 of at most 2"),
        pytest.raises(FloatingPointError, match=r"iteration 3.*\. Dropped before: 2\. Look at"),
    ):
        run.to_end()

    assert model.w.item() == 3.0 - 1


def test_a_dropped_batch_leaves_averages_alone(model, sgd):
    """The mean of a pass is that of the batches that counted; the iteration is counted, its samples are not."""
    run = run_of(model, batches_of(1, NAN, 2), lt.nan_guard(skip=1), lt.optimize(sgd))

    with pytest.warns(UserWarning, match="nan_guard: loss is nan"):
        results = run.to_end()

    assert results["train/loss"] == (3 * 1 + 2 * 2) / 2
    assert (run.progress.iteration, run.progress.samples) == (3, 4)


def test_the_last_batch_of_a_pass_may_be_dropped(model, sgd):
    """The pass ends all the same, and the next one begins."""
    run = run_of(model, batches_of(1, NAN), lt.nan_guard(skip=2), lt.optimize(sgd), epochs=2)

    with pytest.warns(UserWarning, match="nan_guard: loss is nan"):
        assert [(state.epoch, state.index) for state in run] == [(0, 0), (1, 0)]

    assert [row["loss"] for row in run.history] == [3.0, 2.0]


def behind_clip(model, optimizer, guard, **options):
    scaler = options.get("scaler")
    clip = lt.clip_grad_norm(model.parameters(), 100.0)
    return [lt.backward(optimizer, **options), clip, guard, lt.update(optimizer, scaler=scaler)]


def test_behind_a_clip_the_norm_of_the_gradients_is_looked_at(model, sgd):
    """A finite loss may have gradients that are not: the root of 0 * w."""
    phase = lt.train(model, batches_of(1, 0, 2), lambda model, batch: model(batch).sqrt())
    for part in behind_clip(model, sgd, lt.nan_guard(skip=1)):
        phase = phase | part

    with pytest.warns(UserWarning, match=r"nan_guard: grad_norm is nan \(iteration 1"):
        lt.workflow([(phase, 1)], max_epochs=1).to_end()

    w = torch.tensor(3.0, requires_grad=True)
    for mean in (1.0, 2.0):
        loss = (w * mean).sqrt()
        (grad,) = torch.autograd.grad(loss, w)
        w = (w - grad).detach().requires_grad_()
    assert torch.equal(model.w, w)


@pytest.mark.parametrize(("bad", "weight"), [(0, 3.0 - 2.5 - 4.5), (1, 3.0 - 2.5 - 4.5)])
def test_behind_backward_a_dropped_batch_takes_its_window_with_it(model, sgd, bad, weight):
    """Windows of two: nan in the first or the second batch spoils the window; the next batch opens a new one."""
    means = [1.0, 2.0, 3.0, 4.0, 5.0][1 - bad :]
    means[bad:bad] = [NAN]
    run = run_of(model, batches_of(*means), *behind_clip(model, sgd, lt.nan_guard(skip=1), accumulate=2))

    with pytest.warns(UserWarning, match=f"nan_guard: loss is nan.*iteration {bad}"):
        run.to_end()

    assert model.w.item() == weight
    assert list(run.progress.updates.values()) == [2]


def test_behind_backward_a_batch_that_stops_the_run_leaves_a_clean_window_too(model, sgd):
    """`run.skip()` goes on with a new window; it cannot be redone, and the error says so."""
    run = run_of(model, batches_of(NAN, 2, 3), *behind_clip(model, sgd, lt.nan_guard(), accumulate=2))

    with pytest.raises(FloatingPointError, match="It cannot be redone: its gradients are in the acc"):
        run.to_end()
    run.skip()
    run.to_end()

    assert model.w.item() == 3.0 - 2.5


def scaled_by_hand(model, sgd, scaler, source):
    for batch in source:
        sgd.zero_grad()
        loss = model(batch)
        scaler.scale(loss).backward()
        scaler.unscale_(sgd)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        if loss.isfinite():
            scaler.step(sgd)
        scaler.update()


def test_under_a_scaler_a_nan_loss_is_dropped_and_the_scaler_told(model, sgd):
    """As by hand: the scale halves, and the next batch trains."""
    by_hand, source = type(model)(), batches_of(1, NAN, 2, 3)
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2)]
    scaled_by_hand(by_hand, torch.optim.SGD(by_hand.parameters(), lr=1.0), scalers[0], source)

    run = run_of(model, source, *behind_clip(model, sgd, lt.nan_guard(skip=1), scaler=scalers[1]))
    with pytest.warns(UserWarning, match="nan_guard: loss is nan"):
        run.to_end()

    assert torch.equal(model.w, by_hand.w)
    assert scalers[1].state_dict() == scalers[0].state_dict()
    assert scalers[1].get_scale() == 4.0


def test_under_a_scaler_infinite_gradients_are_its_own_business(model, sgd):
    """A scale that is too large overflows; update skips the step, the scale goes down, the guard keeps still."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    run = run_of(model, batches_of(4, 1, 1), *behind_clip(model, sgd, lt.nan_guard(), scaler=scaler))

    assert [state.updates for state in run] == [False, True, True]


def test_every_looks_at_each_so_many_iterations_only(model, sgd):
    """The third of five is looked at: one read, and a nan at the second is seen there, in the weights."""
    run = run_of(model, batches_of(1, NAN, 1, 1, 1), lt.nan_guard(every=3), lt.optimize(sgd))

    with device_reads() as reads:
        list(run.take(2))
        assert reads == []
        with pytest.raises(FloatingPointError, match="loss is nan .iteration 2"):
            next(run)

    assert reads[0] == "item"


def test_one_device_read_an_iteration(model, sgd, batches):
    """As the loop by hand that asks `loss.isfinite()`; also behind a clip, where it looks at two numbers."""
    for parts, read in (
        ([lt.nan_guard(), lt.optimize(sgd)], "item"),
        (behind_clip(model, sgd, lt.nan_guard()), "tolist"),
    ):
        run = run_of(model, batches, *parts)
        with device_reads() as reads:
            list(run.take(2))
        assert reads == [read] * 2


def test_same_as_by_hand():
    """Without a nan it changes no bit."""
    case = Case("AdamW", max_norm=1.0)
    model, optimizer, data, val = case.make()
    train = lt.train(model, data, step) | lt.nan_guard() | lt.optimize(optimizer, max_norm=1.0)
    run = lt.workflow([(train, 1), (lt.validate(model, val, step) | lt.nan_guard(), 1)], max_epochs=2)
    run.to_end()

    assert run["train/nan_guard"].skipped == 0
    assert_same(model.state_dict(), by_hand(case))


def test_it_acts_before_what_stands_behind_it(model, sgd):
    """A part behind it does not see the dropped batch, one before it does."""
    order = []

    def note(name):
        def part(states):
            for state in states:
                order.append(f"{name} {state.index}")
                yield state

        return part

    run = run_of(model, batches_of(1, NAN, 2), note("before"), lt.nan_guard(skip=1), note("behind"), lt.optimize(sgd))
    with pytest.warns(UserWarning, match="nan_guard"):
        run.to_end()

    assert order == ["before 0", "behind 0", "before 1", "before 2", "behind 2"]


def test_one_next_is_one_iteration(model, sgd, batches):
    """No second batch is fetched."""
    fetched = []

    def source():
        for batch in batches:
            fetched.append(1)
            yield batch

    run = lt.workflow(
        [(lt.train(model, source, lambda m, b: m(b)) | lt.nan_guard() | lt.optimize(sgd), lt.iterations(3))],
        max_epochs=1,
    )
    next(run)

    assert len(fetched) == 1


def test_the_budget_is_saved_and_resumed(model, sgd, tmp_path):
    """One was dropped before, so that the next one stops the run; and it stays with a part that takes its place."""

    def make():
        parts = [lt.nan_guard(skip=1), lt.optimize(sgd)]
        return run_of(model, batches_of(1, NAN), *parts, epochs=2) | lt.checkpoint(tmp_path)

    with pytest.warns(UserWarning, match="1 of at most 1"), pytest.raises(FloatingPointError):
        make().to_end()
    run = make()
    assert run.resume() is not None

    with pytest.raises(FloatingPointError, match="Dropped before: 1"):
        run.to_end()
    run.replace("nan_guard", lt.nan_guard(skip=2))
    with pytest.warns(UserWarning, match="2 of at most 2"):
        run.to_end()


def test_in_a_validation(model):
    """Behind its forward; a step without a loss gives nothing to look at."""
    phase = lt.validate(model, batches_of(1, NAN), lambda model, batch: model(batch)) | lt.nan_guard(skip=1)
    with pytest.warns(UserWarning, match="batch 1 of val"):
        assert len(list(phase)) == 1
    phase = lt.validate(model, batches_of(1, NAN), lambda model, batch: {"mean": batch.mean()}) | lt.nan_guard()
    assert len(list(phase)) == 2


def test_a_gan_forgets_the_window_of_its_own_backward_only():
    """The generator's loss is nan; the discriminator's open window of two is left alone."""
    d, g = (nn.Parameter(torch.tensor(0.0)) for _ in range(2))
    both = nn.ParameterList([d, g])
    opt_d, opt_g = (torch.optim.SGD([weight], lr=1.0) for weight in (d, g))
    phase = (
        lt.train(both, [1.0, NAN, 3.0, 5.0], lambda both, batch: both[0] * 1.0)
        | lt.optimize(opt_d, accumulate=2, name="D")
        | lt.forward(lambda both, batch: both[1] * batch)
        | lt.backward(opt_g)
        | lt.nan_guard(skip=1)
        | lt.update(opt_g)
    )

    with pytest.warns(UserWarning, match="nan_guard: loss is nan"):
        lt.workflow([(phase, 1)], max_epochs=1).to_end()

    assert (d.item(), g.item()) == (-2.0, -1.0 - 3.0 - 5.0)


def test_a_wrong_place_is_refused(model, sgd, batches):
    """Behind update, or behind whole phases, it would come too late."""
    with pytest.raises(ValueError, match="nan_guard: it stands behind update"):
        next(run_of(model, batches, lt.optimize(sgd), lt.nan_guard()))
    with pytest.raises(TypeError, match="nan_guard: pipe it onto a phase"):
        next(run_of(model, batches, lt.optimize(sgd)) | lt.nan_guard())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"skip": -1}, "nan_guard: skip must be at least 0, got -1"), ({"every": 0}, "nan_guard: every must be at least")],
)
def test_bad_options(options, message):
    """Refused where they are typed."""
    with pytest.raises(ValueError, match=message):
        lt.nan_guard(**options)


def test_stopping_early_closes_it(model, batches):
    """`close` leaves no generator."""
    run = run_of(model, batches, lt.nan_guard())
    next(run)
    run.close()

    assert all(slot.stream is None for slot in run.cursor.slots)


def test_a_guard_that_takes_the_place_of_one_behind_backward(model, sgd):
    """It looks at gradients, too."""
    run = iter(
        lt.train(model, batches_of(1, 5, 1), nan_gradients(bad=5)) | lt.optimize(sgd, between=lt.nan_guard(skip=1))
    )
    next(run)
    run.replace("nan_guard", lt.nan_guard())

    with pytest.raises(FloatingPointError, match="grad_norm is nan .iteration 1"):
        next(run)


def nan_gradients(bad):
    """A finite loss whose gradient is nan at the batch of mean *bad*: that of sqrt at 0."""

    def step(model, batch):
        zero = (model.w - model.w.detach()).abs()
        return model(batch) + (torch.sqrt(zero) if batch.mean() == bad else 0)

    return step


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_looked_at_behind_backward(model, sgd, accumulate):
    """A finite loss can have gradients that are not: the culprit is named, and no weight has seen it."""
    guarded = lt.optimize(sgd, between=lt.nan_guard(), accumulate=accumulate)
    run = iter(lt.train(model, batches_of(1, 5, 1), nan_gradients(bad=5)) | guarded)

    with pytest.raises(FloatingPointError, match=r"grad_norm is nan \(iteration 1, epoch 0, batch 1 of train\)"):
        run.to_end()

    assert model.w.isfinite()
    run.skip()
    run.to_end()
    assert model.w.isfinite()


def test_a_loss_that_is_nan_since_the_weights_are_is_told_so(model, sgd):
    """Before backward the guard sees nan gradients an iteration late; it says that, and what to do."""
    run = iter(lt.train(model, batches_of(1, 5, 1), nan_gradients(bad=5)) | lt.nan_guard() | lt.optimize(sgd))

    with pytest.raises(FloatingPointError, match=r"iteration 2.*weights are not finite already.*between=lt.nan_guard"):
        run.to_end()


def test_behind_a_closure_it_is_too_late(model):
    """LBFGS has moved the weights by then."""
    lbfgs = torch.optim.LBFGS(model.parameters())
    phase = lt.train(model, batches_of(1), lambda model, batch: model(batch))

    with pytest.raises(ValueError, match="nan_guard: it stands behind update"):
        next(iter(phase | lt.optimize(lbfgs) | lt.nan_guard()))
