"""The first promise: a pipe gives the same bits as the plain PyTorch loop, however it is iterated."""

from __future__ import annotations

import contextlib
import itertools
import math
import random

import pytest
import torch
from loops import Case, Planted, assert_same, by_hand, piped, tripping

import looptools as lt

CASES = [
    Case(),
    Case(optimizer="AdamW"),
    Case(max_norm=0.5),
    Case(optimizer="AdamW", max_norm=0.5, accumulate=3, cosine=True),  # 7 batches: windows of 3, 3 and a tail of 1
    Case(accumulate=4, cosine=True),
    Case(cosine=True, max_norm=1.0),
    Case(optimizer="AdamW", cosine=True, workers=2),
    Case(optimizer="Adam", max_norm=0.5, norm_type=math.inf),
    Case(max_norm=0.5, norm_type=1),
    Case(optimizer="Adam", max_value=0.02, cosine=True),
    Case(optimizer="AdamW", max_value=0.02, max_norm=0.05, accumulate=2),
    Case(optimizer="AdamW", max_norm=0.5, accumulate=3, cosine=True, across_epochs=True),  # 14 = 4 * 3 + 2
    Case(accumulate=4, across_epochs=True, cosine=True, max_value=0.02),
    Case(accumulate=20, across_epochs=True),  # one window, of all 14
    Case(optimizer="AdamW", autocast=torch.bfloat16, accumulate=2),
]
HARD = CASES[3]
ACROSS = CASES[11]
PARTS = ["train/forward", "train/schedule_lr", "train/backward", "train/clip_grad_norm", "train/update"]
PARTS += ["train/average", "val/forward", "val/average", "run/log"]


def weights(run: lt.Run) -> dict:
    return run.model.state_dict()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_one_go(case):
    """Weights and buffers after `for state in run` are those of the loop by hand."""
    run = piped(case)

    for _ in run:
        pass

    assert_same(weights(run), by_hand(case))
    assert run.progress.iteration == 14


@pytest.mark.parametrize("case", [CASES[0], HARD, CASES[6], ACROSS], ids=str)
def test_after_breaks(case):
    """Leaving the loop and coming back loses nothing and repeats nothing."""
    run = piped(case)

    while not run.ended:
        for number, _ in enumerate(run):
            if number == 2:
                break

    assert_same(weights(run), by_hand(case))


def test_across_take():
    """`take` stops between two iterations, at any of them."""
    run = piped(HARD)

    for n in itertools.cycle([1, 5, 2]):
        if len(list(run.take(n))) < n:
            break

    assert_same(weights(run), by_hand(HARD))


@pytest.mark.parametrize("case", [CASES[0], HARD, ACROSS], ids=str)
def test_every_iteration_through_stages(case):
    """Walking through all parts of all iterations gives the same bits."""
    run = piped(case)

    while not run.ended:
        for _ in run.stages():
            pass

    assert_same(weights(run), by_hand(case))


def test_stages_left_anywhere_and_completed_by_next():
    """An iteration that was begun part by part is completed by `next(run)`, wherever it was left."""
    run = piped(HARD)

    for n in itertools.cycle(range(1, 9)):
        for _ in itertools.islice(run.stages(), n):
            pass
        if next(run, None) is None:
            break

    assert_same(weights(run), by_hand(HARD))


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(
    "case", [Case(cosine=True, max_norm=0.5), HARD, ACROSS], ids=["every-batch", "accumulated", "across-epochs"]
)
def test_after_an_exception_at_the_entry_of_a_part(case, name):
    """An exception on the way into any part, at any iteration, changes no bit of what follows.

    BatchNorm's buffers are left out: a forward that is redone moves them twice, until there are snapshots.
    """
    run = piped(case) | lt.log(line=None)
    part = next(slot for slot in run.cursor.slots if slot.name == name)
    part.part = tripping(part.part, at=lambda state: True)
    failures = 0

    while not run.ended:
        try:
            run.to_end()
        except Planted:
            failures += 1
            assert run.failed.part == name

    assert failures == (14 if name.startswith("train") else 14 if name.startswith("val") else 28)
    assert run.progress.iteration == 14
    buffers = ["running_mean", "running_var", "num_batches_tracked"]
    assert_same(weights(run), by_hand(case), but=buffers if name == "train/backward" else [])


def test_a_step_that_raises_is_redone_with_the_same_dropout():
    """A step that fails after the model has run draws the same numbers again: weights are the same, buffers are not."""
    failed = set()

    def fragile(model, batch, state):
        from loops import classify

        result = classify(model, batch)
        if state.trains and state.iteration not in failed:
            failed.add(state.iteration)
            raise Planted
        return result

    run = piped(HARD, fragile)
    while not run.ended:
        try:
            run.to_end()
        except Planted:
            pass

    assert len(failed) == 14
    assert_same(weights(run), by_hand(HARD), but=["running_mean", "running_var", "num_batches_tracked"])


@pytest.mark.parametrize("across_epochs", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_source_of_unknown_length(accumulate, across_epochs):
    """Without a length the bits are the same; a short last window is scaled up, which costs its last digits."""
    case = Case(max_norm=0.5, accumulate=accumulate, across_epochs=across_epochs, length_known=False)
    run = piped(case)

    run.to_end()

    expected, got = by_hand(case), weights(run)
    if accumulate == 1:
        assert_same(got, expected)
    else:
        for key in expected:
            torch.testing.assert_close(got[key], expected[key], rtol=1e-5, atol=1e-6)


def test_the_averages_are_those_of_the_whole_pass():
    """`results` are means weighted by the size of the batches: the last one has 2 samples, not 4."""
    run = piped(Case(epochs=1))
    rows = {"train": [], "val": []}

    for state in run:
        rows[state.phase].append((float(state.metrics["loss"]), len(state.batch[0])))

    for phase, values in rows.items():
        mean = sum(loss * n for loss, n in values) / sum(n for _, n in values)
        assert run.results[f"{phase}/loss"] == pytest.approx(mean, rel=1e-12)
        assert [n for _, n in values] == [4] * 6 + [2]


@pytest.mark.parametrize("seed", range(8))
def test_any_mix_of_failures_and_ways_to_go_on(seed):
    """Random exceptions in every part, gone on from by next, take, stages, before, retry and sleep: the same bits."""
    rng = random.Random(seed)
    case = Case(
        optimizer=rng.choice(["SGD", "AdamW"]),
        max_norm=rng.choice([None, 0.5]),
        accumulate=rng.choice([1, 2, 3, 4]),
        across_epochs=rng.random() < 0.5,
        max_value=rng.choice([None, 0.02]),
        cosine=rng.random() < 0.5,
    )
    run = piped(case) | lt.log(line=None, every=rng.choice([1, 3, 50]))
    for slot in run.cursor.slots:
        chance = rng.random() * 0.3
        slot.part = tripping(slot.part, at=lambda state, chance=chance: rng.random() < chance)
    failures = 0

    def go_on():
        way = rng.randrange(5)
        if way == 0:
            next(run, None)
        elif way == 1:
            list(itertools.islice(run.stages(), rng.randint(1, 9)))
        elif way == 2:
            with contextlib.suppress(LookupError):
                run.before(rng.choice(["update", "backward", "average"]))
        elif way == 3:
            with run:
                list(run.take(2))
        else:
            list(run.take(rng.randint(1, 5)))

    while not run.ended:
        try:
            go_on()
        except Planted:
            failures += 1
            if rng.random() < 0.2:
                with contextlib.suppress(RuntimeError, Planted):
                    run.retry()

    assert failures > 0
    assert_same(weights(run), by_hand(case), but=["running_mean", "running_var", "num_batches_tracked"])
