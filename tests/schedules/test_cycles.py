"""Up and down again."""

from __future__ import annotations

import pytest

import looptools as lt

one_cycle, one_cycle_momentum, cyclic = lt.schedules.one_cycle, lt.schedules.one_cycle_momentum, lt.schedules.cyclic


def test_the_peak_is_the_groups_own_base_unless_it_is_given():
    """Of 10 steps half rise: step 4 is the peak."""
    assert one_cycle(rising=0.5)(4, 10, 0.3) == pytest.approx(0.3)
    assert one_cycle(0.1, rising=0.5)(4, 10, 0.3) == pytest.approx(0.1)


def test_a_cycle_ends_at_its_last_value():
    """Unlike other schedules, it gets there: peak / div / final_div at the last step."""
    assert one_cycle(div=10, final_div=5)(9, 10, 1.0) == pytest.approx(0.02)
    assert one_cycle_momentum()(9, 10, 0.5) == 0.95


def test_a_peak_on_the_first_step_is_no_division_by_zero():
    """With a tenth of 10 steps rising, step 0 is the peak; torch's scheduler fails there."""
    assert one_cycle(rising=0.1)(0, 10, 1.0) == 1.0
    assert one_cycle(rising=0.1)(9, 10, 1.0) == pytest.approx(1 / 25e4)


@pytest.mark.parametrize("make", [one_cycle, one_cycle_momentum])
def test_a_total_of_its_own(make):
    """It goes through its own steps, needs none from the run, and refuses a run that has more."""
    own = make(total=10)

    assert not own.needs_total
    assert make().needs_total
    assert own(4, None, 1.0) == make()(4, 10, 1.0) == own(4, 7, 1.0)
    assert own.bound(None, 10) is own.bound(None, None) is own
    with pytest.raises(ValueError, match=r"its total is 10 steps, but the run has 11. Leave total out"):
        own.bound(None, 11)


def test_cycles_shrink_and_what_is_left_over_begins_another():
    """7 steps in 2 cycles of 3: the third has one step."""
    schedule = cyclic(3.0, 0.0, cycles=2, rising=0.4, anneal="linear", gamma=0.5)

    assert [schedule(done, 7, 1.0) for done in range(7)] == pytest.approx([1, 3, 1.5, 1, 2, 1, 1])


def test_more_cycles_than_steps_are_refused():
    """When the run is built."""
    with pytest.raises(ValueError, match="cyclic: 5 cycles need as many steps, but the run has 4"):
        cyclic(cycles=5).bound(None, 4)


def test_an_extension_that_a_schedule_cannot_do_changes_nothing(model, sgd, batches):
    """Refused, and the run ends where it did."""
    one_cycle = lt.schedules.one_cycle(total=6)
    phase = lt.train(model, batches, lambda model, batch: model(batch)) | lt.schedule_lr(sgd, one_cycle)
    run = lt.workflow([(phase | lt.optimize(sgd), 1)], max_epochs=1)

    with pytest.raises(ValueError, match="one_cycle"):
        run.extend(max_epochs=3)
    assert len(run) == 3
    run.extend(max_epochs=2)

    assert len(list(run)) == 6
