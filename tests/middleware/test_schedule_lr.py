"""Learning rates, iteration by iteration."""

from __future__ import annotations

import warnings

import pytest
import torch
from loops import Case, assert_same, classify

import looptools as lt


def lrs(run):
    return [round(state.lr, 6) for state in run if state.trains]


def phase_of(model, batches, *parts):
    phase = lt.train(model, batches, lambda model, batch: model(batch))
    for part in parts:
        phase = phase | part
    return phase


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


def test_two_changes_by_hand_go_together(model, sgd, batches):
    """The second rescales what the first has rescaled; a fresh run knows of neither."""
    phase = phase_of(model, batches, lt.schedule_lr(sgd, lt.schedules.constant()), lt.optimize(sgd))
    run = iter(phase)
    for factor in (0.5, 0.25):
        next(run)
        sgd.param_groups[0]["lr"] *= factor
        with pytest.warns(UserWarning, match="was changed by hand"):
            run.before("update")
    next(run)

    assert run.state.lr == 0.125
    run.to_end()
    assert lrs(phase) == [1.0, 1.0, 1.0]


def test_a_change_by_hand_survives_a_resume(tmp_path):
    """Its factor is in the checkpoint, with the optimizer."""

    def make():
        model, optimizer, train, _ = Case().make()
        phase = lt.train(model, train, classify) | lt.schedule_lr(optimizer, lt.schedules.poly())
        return lt.workflow([(phase | lt.optimize(optimizer), 1)], max_epochs=2)

    def begun(run):
        next(run)
        run.optimizer.param_groups[0]["lr"] /= 10
        with pytest.warns(UserWarning, match="was changed by hand"):
            list(run.take(6))
        return run

    straight = begun(make())
    begun(make() | lt.checkpoint(tmp_path))
    run = make() | lt.checkpoint(tmp_path)
    run.resume()
    rates = lrs(run)

    assert rates == lrs(straight)
    assert rates[0] == pytest.approx(0.05 * run.optimizer.param_groups[0]["initial_lr"])


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
    by_hand, at_the_end = model.state_dict(), (scheduler.last_epoch, optimizer.param_groups[0]["lr"])

    model, optimizer, train, scheduler = both()
    phase = lt.train(model, train, classify) | lt.schedule_lr(optimizer, scheduler) | lt.optimize(optimizer)
    lt.workflow([(phase, 1)], max_epochs=2).to_end()

    assert_same(model.state_dict(), by_hand)
    assert (scheduler.last_epoch, optimizer.param_groups[0]["lr"]) == at_the_end


def test_a_torch_scheduler_catches_up(model, sgd, batches):
    """Three updates of a phase that is not scheduled; an extension goes on, a rehearsal leaves no trace."""
    scheduler = torch.optim.lr_scheduler.StepLR(sgd, 1, gamma=0.5)
    plain = phase_of(model, batches, lt.optimize(sgd))
    scheduled = lt.train(model, batches[:1], lambda model, batch: model(batch), name="last")
    scheduled = scheduled | lt.schedule_lr(sgd, scheduler) | lt.optimize(sgd)
    run = lt.workflow([(plain, 1), (scheduled, 1)], max_epochs=2)
    run.rehearse()
    assert scheduler.last_epoch == 0

    assert [state.lr for state in run if state.phase == "last"] == [0.125]
    assert scheduler.last_epoch == 4
    run.extend(max_epochs=4)
    assert [state.lr for state in run if state.phase == "last"] == [0.5**7]
    assert scheduler.last_epoch == 8


def test_each_optimizers_learning_rate_is_shown(model, batches):
    """The first is state.lr, the second a gauge; both are in the rows of a log."""
    model.other = torch.nn.Parameter(torch.ones(()))
    first, second = torch.optim.SGD([model.w], lr=1.0), torch.optim.SGD([model.other], lr=0.1)
    phase = lt.train(model, batches, lambda model, batch: model(batch) * model.other)
    phase = phase | lt.schedule_lr(first, lt.schedules.poly()) | lt.schedule_lr(second, lt.schedules.constant())
    run = iter(phase | lt.optimize([first, second]))

    seen = [(round(state.lr, 3), state.gauges["lr#2"]) for state in run]

    assert seen == [(1.0, 0.1), (0.667, 0.1), (0.333, 0.1)]


def test_a_function_of_one_argument_is_refused_where_it_is_typed(sgd):
    """As torch's LambdaLR takes one; and it is the value that is asked for, not a factor."""
    with pytest.raises(TypeError, match=r"schedule_lr: lambda must take \(done, total, base\) and return the value"):
        lt.schedule_lr(sgd, lambda epoch: 0.1)
