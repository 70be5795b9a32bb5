"""schedule_lr, backward, clip_grad_norm, update."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from loops import Case, assert_same, classify
from torch import nn

import looptools as lt


def lrs(run):
    return [round(state.lr, 6) for state in run if state.trains]


def phase_of(model, batches, *parts):
    phase = lt.train(model, batches, lambda model, batch: model(batch))
    for part in parts:
        phase = phase | part
    return phase


def test_grad_norm_is_measured_before_clipping(model, sgd, batches):
    """The update obeys max_norm, and grad_norm reports what was clipped."""
    state = next(iter(phase_of(model, batches[1:], lt.optimize(sgd, max_norm=1.0))))

    assert state.grad_norm == 2.0
    assert model.w.item() == pytest.approx(2.0)


def test_gradients_stay_to_be_looked_at(model, sgd, batches):
    """They are zeroed when the next window opens, not after the update."""
    run = iter(phase_of(model, batches, lt.optimize(sgd, accumulate=2)))

    assert [(next(run).updates, model.w.grad.item()) for _ in range(3)] == [(False, 0.5), (True, 1.5), (True, 3.0)]


def test_accumulation_has_a_correct_tail(model, sgd, batches):
    """Three batches by two: the mean of the first two, then the third alone."""
    run = lt.workflow([(phase_of(model, batches, lt.optimize(sgd, accumulate=2)), 1)], max_epochs=2)

    weights = [(state.updates, model.w.item()) for state in run]

    assert weights == [(False, 3.0), (True, 1.5), (True, -1.5)] + [(False, -1.5), (True, -3.0), (True, -6.0)]
    assert list(run.progress.updates.values()) == [4]


def test_a_skipped_batch_leaves_the_window_one_short(model, sgd, batches):
    """Its share is made up for: the window's gradient is the mean of what came."""

    def fails(states):
        for state in states:
            if state.index == 2:
                raise ValueError
            yield state

    phase = phase_of(model, batches, fails, lt.optimize(sgd, accumulate=3))
    run = lt.workflow([(phase.on(batches + batches), 1)], max_epochs=1)
    with pytest.raises(ValueError):
        run.to_end()
    run.skip()
    next(run)

    assert model.w.item() == pytest.approx(3 - (1 + 2 + 1) / 3)


def test_schedules_count_updates_over_all_phases(model, sgd, batches):
    """Two training phases and accumulation: the horizon is the number of updates of the whole run."""
    one = phase_of(model, batches, lt.schedule_lr(sgd, lt.schedules.poly()), lt.optimize(sgd, accumulate=2))
    two = phase_of(model, batches[:1], lt.schedule_lr(sgd, lt.schedules.poly()), lt.optimize(sgd))
    run = lt.workflow([(one, 1), (two, 1)], max_epochs=4)

    assert run.total("update", sgd) == 6
    assert lrs(run) == [round(1 - done / 6, 6) for done in (0, 0, 1, 2, 3, 3, 4, 5)]


@pytest.mark.parametrize(("by", "expected"), [("iteration", [0, 1, 2, 3, 4, 5]), ("epoch", [0, 0, 0, 1, 1, 1])])
def test_schedules_by_iteration_or_epoch(model, sgd, batches, by, expected):
    """`by` says what done and total count."""
    total = max(expected) + 1
    phase = phase_of(model, batches, lt.schedule_lr(sgd, lt.schedules.poly(), by=by), lt.optimize(sgd))

    assert lrs(lt.workflow([(phase, 1)], max_epochs=2)) == [round(1 - done / total, 6) for done in expected]


def test_a_plain_function_is_a_schedule(model, sgd, batches):
    """(done, total, base) -> value."""
    phase = phase_of(model, batches, lt.schedule_lr(sgd, lambda done, total, base: base / (1 + done)), lt.optimize(sgd))

    assert lrs(phase) == [1.0, 0.5, round(1 / 3, 6)]


def test_without_a_horizon_a_schedule_is_refused_when_the_run_is_built(model, sgd, batches):
    """The cure is in the error, and works; a schedule that needs no horizon is fine."""
    phase = phase_of(model, lambda: iter(batches), lt.schedule_lr(sgd, lt.schedules.cosine()), lt.optimize(sgd))
    with pytest.raises(
        ValueError, match=r"cosine.* needs to know how many updates .* Bound the run with max_iterations="
    ):
        next(lt.workflow([(phase, 1)], max_epochs=2))

    assert len(lrs(lt.workflow([(phase, 1)], max_iterations=5))) == 5
    assert len(lrs(lt.workflow([(phase, lt.iterations(4))], max_epochs=2))) == 8
    free = phase_of(model, lambda: iter(batches), lt.schedule_lr(sgd, lt.schedules.multistep([2])), lt.optimize(sgd))
    assert len(lrs(lt.workflow([(free, 1)], max_epochs=2))) == 6


def test_a_learning_rate_changed_by_hand_rescales_what_follows(model, sgd, batches):
    """Said once; the schedule goes on from there."""
    phase = phase_of(model, batches, lt.schedule_lr(sgd, lt.schedules.poly()), lt.optimize(sgd))
    run = lt.workflow([(phase, 1)], max_epochs=2)
    list(run.take(2))
    sgd.param_groups[0]["lr"] /= 10

    with pytest.warns(
        UserWarning, match="was changed by hand from 0.833333 to 0.0833333; what follows is scaled by 0.1"
    ):
        third = next(run).lr
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lrs(run) == [0.05, 0.033333, 0.016667]
    assert third == pytest.approx((1 - 2 / 6) / 10)


def test_a_fresh_run_begins_from_the_base_value_again(model, sgd, batches):
    """Re-running a cell starts the schedule afresh; a value set by hand in between is the new base."""
    phase = phase_of(model, batches, lt.schedule_lr(sgd, lt.schedules.poly()), lt.optimize(sgd))

    assert lrs(phase) == lrs(phase) == [1.0, 0.666667, 0.333333]
    sgd.param_groups[0]["lr"] = 0.3
    assert lrs(phase) == [0.3, 0.2, 0.1]


def test_a_hands_value_over_a_zero_holds_for_that_iteration(model, sgd, batches):
    """There is nothing to scale."""
    phase = phase_of(model, batches, lt.schedule_lr(sgd, lambda done, total, base: float(done == 2)), lt.optimize(sgd))
    run = iter(phase)
    next(run)
    sgd.param_groups[0]["lr"] = 0.25

    assert lrs(run) == [0.25, 1.0]


@pytest.mark.parametrize(
    "make",
    [
        lambda sgd: torch.optim.lr_scheduler.StepLR(sgd, 2, gamma=0.1),
        lambda sgd: torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 14),
        lambda sgd: torch.optim.lr_scheduler.OneCycleLR(sgd, 0.1, total_steps=20),
        lambda sgd: torch.optim.lr_scheduler.SequentialLR(
            sgd,
            [torch.optim.lr_scheduler.LinearLR(sgd, 0.1), torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9)],
            milestones=[4],
        ),
    ],
    ids=["step", "cosine", "onecycle", "sequential"],
)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # torch's own SequentialLR
def test_torchs_own_schedulers_go_in_as_they_are(make):
    """Stepped after each update: the bits of the loop by hand."""

    def both():
        model, optimizer, train, _ = Case().make()
        return model, optimizer, train, make(optimizer)

    model, optimizer, train, scheduler = both()
    model.train()
    for _ in range(2):
        for batch in train:
            optimizer.zero_grad()
            classify(model, batch)["loss"].backward()
            optimizer.step()
            scheduler.step()
    by_hand = model.state_dict()

    model, optimizer, train, scheduler = both()
    phase = lt.train(model, train, classify) | lt.schedule_lr(optimizer, scheduler) | lt.optimize(optimizer)
    lt.workflow([(phase, 1)], max_epochs=2).to_end()

    assert_same(model.state_dict(), by_hand)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_fp16s_scaler_with_skipped_updates(clip):
    """Planted infinities: the same bits as torch's recipe by hand, and a skipped update is not counted."""

    def step(model, batch, state=None, n=None):
        index = n if state is None else state.iteration
        loss = classify(model, batch)["loss"]
        return loss * torch.tensor(float("inf") if index in (2, 5) else 1.0)

    def both():
        model, optimizer, train, _ = Case(optimizer="AdamW").make()
        return model, optimizer, train, torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)

    model, optimizer, train, scaler = both()
    model.train()
    for n, batch in enumerate(train):
        optimizer.zero_grad()
        scaler.scale(step(model, batch, n=n)).backward()
        scaler.unscale_(optimizer)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
    by_hand, scale = model.state_dict(), scaler.get_scale()

    model, optimizer, train, scaler = both()
    phase = lt.train(model, train, lambda model, batch, state: step(model, batch, state))
    run = lt.workflow([(phase | lt.optimize(optimizer, max_norm=clip, scaler=scaler), 1)], max_epochs=1)
    moved = [state.updates for state in run]

    assert_same(model.state_dict(), by_hand)
    assert scaler.get_scale() == scale
    assert [n for n, updates in enumerate(moved) if not updates] == [2, 5]
    assert run.progress.updates[optimizer] == 5


def test_a_loss_without_a_graph_is_named(model, sgd, batches):
    """Detached, or computed in validation."""
    with pytest.raises(RuntimeError, match="the loss of iteration 0 of train has no graph. Was it detached"):
        next(iter(lt.train(model, batches, lambda model, batch: model(batch).detach()) | lt.optimize(sgd)))
    with pytest.raises(RuntimeError, match="A validation phase has none; leave optimize out of it"):
        next(iter(lt.validate(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda sgd, w: lt.optimize(w), TypeError, "optimize: optimizer must be a torch.optim.Optimizer"),
        (
            lambda sgd, w: lt.optimize(sgd, max_norm=-1.0),
            ValueError,
            "clip_grad_norm: max_norm must be positive, got -1.0",
        ),
        (
            lambda sgd, w: lt.optimize(sgd, max_norm="1"),
            TypeError,
            "clip_grad_norm: max_norm must be a number, got '1'",
        ),
        (lambda sgd, w: lt.optimize(sgd, accumulate=0), ValueError, "backward: accumulate must be at least 1, got 0"),
        (lambda sgd, w: lt.optimize(sgd, accumulate=1.5), TypeError, "backward: accumulate must be a whole number"),
        (lambda sgd, w: lt.clip_grad_norm([], 1.0), TypeError, "clip_grad_norm: params must be tensors"),
        (lambda sgd, w: lt.update(torch.optim.LBFGS([w])), TypeError, "LBFGS evaluates the loss several times"),
        (lambda sgd, w: lt.schedule_lr(sgd, 0.1), TypeError, "schedule_lr: schedule must be one of lt.schedules"),
        (lambda sgd, w: lt.schedule_lr(sgd, lt.schedules.cosine), TypeError, "needs its options first"),
        (
            lambda sgd, w: lt.schedule_lr(sgd, lt.schedules.cosine(), by="step"),
            ValueError,
            "by must be one of 'update'",
        ),
        (lambda sgd, w: lt.schedule_lr(sgd, lt.schedules.cosine(), warmup=-1), ValueError, "count must be at least 0"),
        (
            lambda sgd, w: lt.schedule_lr(sgd, torch.optim.lr_scheduler.StepLR(torch.optim.SGD([w], lr=1), 1)),
            ValueError,
            "was made for another optimizer",
        ),
        (
            lambda sgd, w: lt.schedule_lr(sgd, torch.optim.lr_scheduler.ReduceLROnPlateau(sgd)),
            TypeError,
            "ReduceLROnPlateau waits for a metric",
        ),
        (lambda sgd, w: lt.schedules.multistep([3, 2]), ValueError, "milestones must be positive and increasing"),
        (lambda sgd, w: lt.schedules.cosine(0.1, end_ratio=0.1), ValueError, "give end or end_ratio, got both"),
        (lambda sgd, w: lt.average(window=0), ValueError, "average: window must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused_where_they_are_typed(model, sgd, make, error, message):
    """What is wrong, what was given, what to do."""
    with pytest.raises(error, match=message):
        make(sgd, model.w)


def test_average_over_a_window_takes_the_place_of_the_one_over_the_pass(model, batches):
    """`average(window=n)`: results are the means of the last n iterations."""
    run = lt.workflow([(phase_of(model, batches, lt.average(window=2)), 1)], max_epochs=1)

    assert run.to_end() == {"train/loss": (3 * 2 + 3 * 3) / 2}
    assert [slot.name for slot in run.cursor.slots] == ["train/forward", "train/average"]


def test_norm_types(model, sgd, batches):
    """Any order; inf for the largest element."""
    pair = nn.ParameterList([nn.Parameter(torch.zeros(2))])
    optimizer = torch.optim.SGD(pair.parameters(), lr=1.0)
    step = lambda model, batch: (model[0] * torch.tensor([3.0, 4.0])).sum()  # noqa: E731

    for norm_type, norm in [(2.0, 5.0), (1.0, 7.0), (math.inf, 4.0)]:
        part = lt.optimize(optimizer, max_norm=100.0, norm_type=norm_type)
        assert next(iter(lt.train(pair, [1], step) | part)).grad_norm.item() == pytest.approx(norm)
