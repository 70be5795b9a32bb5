"""What the machine of `test_machine.py` has found, each by itself."""

from __future__ import annotations

import contextlib
import copy
import itertools
import signal
from typing import Any

import pytest
import torch
from loops import Planted
from plainly import Bench, Case, Trips, built, by_hand, differences, facts_of, step_of

import looptools as lt
from looptools.generators import generators_within


@pytest.fixture(autouse=True)
def _pythons_own_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def made(**options: Any) -> tuple[lt.Run, Bench, Trips]:
    trips = Trips()
    return *built(Case(**options), trips), trips


def whole(n: int | None = None, **options: Any) -> dict[str, Any]:
    """What is there after *n* states, or at the end, if nothing happens."""
    run, bench, _ = made(**options)
    list(itertools.islice(iter(lambda: next(run, None), None), n))
    return facts_of(run, bench)


def to_end(run: lt.Run, bench: Bench) -> dict[str, Any]:
    run.to_end()
    return facts_of(run, bench)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_look_ahead_that_fails_is_undone(accumulate):
    """It is fetched with the same random numbers; where backward looked ahead, the forward is not done twice."""
    options = {"accumulate": accumulate, "length_known": False, "draws": True}
    run, bench, trips = made(**options)
    next(run)
    trips.arm("loader", "raise", 2)
    with pytest.raises(Planted):
        run.to_end()

    assert differences(to_end(run, bench), whole(**options)) == []


def test_a_look_ahead_that_fails_as_a_part_drops_its_state():
    """The part gets the state once more: those behind it are not told of a pass's end that is none."""
    options = {"drops": "early", "length_known": False, "snapshots": None}
    run, bench, trips = made(**options)
    list(run.take(8))  # the next state but one is dropped
    trips.arm("loader", "raise", 1)
    with pytest.raises(Planted):
        run.to_end()

    assert differences(to_end(run, bench), whole(**options)) == []


def test_a_dropped_state_that_is_rolled_back_is_not_dropped_yet():
    """Done once more, it goes through the parts in front of the one that drops it."""
    options = {"drops": "late", "validates": False}
    run, bench, trips = made(**options)
    list(run.take(2))
    trips.arm("sink", "press twice")
    with pytest.raises(KeyboardInterrupt):
        next(run)
    assert run.failed.state.iteration == 2

    assert differences(to_end(run, bench), whole(**options)) == []


def test_a_dropped_state_is_not_handed_out_by_skip():
    """Nor is it if only its boundary was left to do."""
    run, _, _ = made(drops="late", validates=False)
    list(run.take(2))
    list(itertools.islice(run.stages(), 11))
    run.skip()

    assert next(run).iteration == 3


@pytest.mark.parametrize("snapshots", [(3, 4, True), None])
def test_skip_behind_backward_with_a_scaler(snapshots):
    """The scaler waits for no step any more, also where the run has slept meanwhile."""
    run, bench, _ = made(scaler=True, snapshots=snapshots)
    run.before("update")
    with run:
        pass
    run.skip()

    assert next(run).updates
    assert bench.scaler.get_scale() == 64.0 * (1 if snapshots else 2)


def test_random_numbers_that_were_drawn_within_an_iteration_are_undone_with_it():
    """Dropout draws what it draws if nobody has come in between."""
    run, bench, _ = made()
    run.before("forward")
    torch.rand(3)
    run.before("update")

    run.retry()

    assert differences(facts_of(run, bench), whole(1)) == []


def test_what_was_skipped_stays_skipped():
    """Going back beyond it, it is not computed again, wherever it was left."""
    run, bench, _ = made(snapshots=(50, 4, True))
    next(run)
    run.before("forward")
    run.skip()
    was = copy.deepcopy(facts_of(run, bench))
    next(run)

    run.back(1)

    assert differences(facts_of(run, bench), was) == []
    assert next(run).iteration == 2


@pytest.mark.parametrize("go", [lambda run: run.back(0), lambda run: run.replay(2)])
def test_going_back_to_where_it_stands_does_nothing(go):
    """What was skipped or changed by hand since is not computed away."""
    run, bench, _ = made()
    next(run)
    run.before("forward")
    run.skip()
    by_hand(bench, "weight", 0.5)
    was = copy.deepcopy(facts_of(run, bench))

    go(run)

    assert differences(facts_of(run, bench), was) == []


def test_what_is_changed_by_hand_where_it_has_gone_back_to():
    """Behind it a snapshot is taken, though no state was handed out since."""
    run, bench, _ = made(snapshots=(50, 4, True))
    list(run.take(2))
    run.back(2)
    by_hand(bench, "weight", 0.5)
    next(run)
    was = copy.deepcopy(facts_of(run, bench))
    next(run)

    run.back(1)

    assert differences(facts_of(run, bench), was) == []


def test_parts_of_today_work_after_going_back():
    """Not the generators of those that were there when the snapshot was taken."""
    run, bench, trips = made(snapshots=None)
    next(run)
    run.replace("train/forward", step_of(1, trips))
    next(run)
    want = facts_of(run, bench)
    run, bench, trips = made(snapshots=(50, 4, True))
    list(run.take(2))
    run.replace("train/forward", step_of(1, trips))

    run.back(1)

    next(run)
    assert differences(facts_of(run, bench), want) == []


def test_replay_behind_a_pass_whose_last_state_was_dropped():
    """It stands before the iteration, not behind it."""
    run, _, _ = made(drops="late", validates=False, snapshots=(50, 4, True))
    list(run.take(4))

    run.replay(3)

    assert next(run).iteration == 3


def test_back_from_between_backward_and_update_with_a_scaler():
    """Its gradients are not unscaled twice."""
    run, bench, _ = made(scaler=True)
    next(run)
    run.before("update")

    run.back(0)

    assert differences(to_end(run, bench), whole(scaler=True)) == []


def test_a_last_batch_that_fails_draws_its_order_once():
    """A sampler with its own generator begins the next permutation when it gives the last indices."""
    options = {"own_generator": True, "snapshots": None}
    run, bench, trips = made(**options)
    list(run.take(2))
    trips.arm("loader", "raise")
    with pytest.raises(Planted):
        run.to_end()

    assert differences(to_end(run, bench), whole(**options)) == []


@pytest.mark.parametrize("snapshots", [(3, 4, True), None])
def test_a_batch_that_is_passed_over_has_drawn_its_order(snapshots):
    """As in a loop by hand, the next passes are in the order in which they would have been."""
    options = {"own_generator": True, "snapshots": snapshots, "validates": False}
    run, _, trips = made(**options)
    list(run.take(2))
    trips.arm("loader", "raise")
    with contextlib.suppress(Planted):
        next(run)
    run.skip()
    want, _, _ = made(**options)
    list(want.take(3))

    assert torch.equal(next(run).batch[0], next(want).batch[0])


def test_next_on_a_finished_run_leaves_the_handler_before():
    """Nobody would put it back."""
    run, _, _ = made()
    run.to_end()
    assert next(run, None) is None

    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_looking_for_generators_looks_at_no_next_batch():
    """A part may hold a state, whose `last` is not known yet."""
    run, bench, _ = made(length_known=False, draws=True)
    state = run.before("forward")
    before = torch.get_rng_state()

    generators_within([state])

    assert torch.equal(torch.get_rng_state(), before)
    assert not run.cursor.passes.source.has_ahead
    assert bench.case.draws
