"""Moves of the optimizer, counted."""

from __future__ import annotations

import pytest
import torch
from loops import Case, assert_same, classify, device_reads
from torch import nn

import looptools as lt


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


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("where", ["loss", "gradients"])
def test_a_skipped_update_holds_back_whatever_counts_updates(accumulate, where):
    """Weights, the scale's growth and backoff, and a schedule by updates: those of the loop by hand, to the bit.

    An infinity in a window skips the update of the whole window.
    """
    planted = {1, 6, 7, 9}  # iterations of 14

    def make():
        model, optimizer, train, _ = Case(optimizer="AdamW").make()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        return model, optimizer, train, scaler

    def step(model, batch, n):
        loss = classify(model, batch)["loss"]
        if n in planted and where == "loss":
            loss = loss * float("inf")
        elif n in planted:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    model, optimizer, train, scaler = make()
    model.train()
    expected, updates = [], 0
    total = 2 * -(-7 // accumulate)
    for epoch in range(2):
        for index, batch in enumerate(train):
            lr = 0.01 * (1 - updates / total)
            optimizer.param_groups[0]["lr"] = lr
            if index % accumulate == 0:
                optimizer.zero_grad()
            window = min(accumulate, 7 - index // accumulate * accumulate)
            loss = step(model, batch, 7 * epoch + index)
            scaler.scale(loss / window if window > 1 else loss).backward()
            moved = False
            if (index + 1) % accumulate == 0 or index == 6:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                moved = all(p.grad.isfinite().all() for p in model.parameters())
                scaler.step(optimizer)
                scaler.update()
                updates += moved
            expected.append((lr, moved, scaler.get_scale()))
    weights = model.state_dict()

    model, optimizer, train, scaler = make()
    phase = lt.train(model, train, lambda model, batch, state: step(model, batch, state.iteration))
    phase = phase | lt.schedule_lr(optimizer, lt.schedules.poly())
    phase = phase | lt.optimize(optimizer, max_norm=0.5, accumulate=accumulate, scaler=scaler)
    run = lt.workflow([(phase, 1)], max_epochs=2)
    got = [(state.lr, state.updates, scaler.get_scale()) for state in run]

    assert [row[1:] for row in got] == [row[1:] for row in expected]
    assert [row[0] for row in got] == pytest.approx([row[0] for row in expected], rel=1e-15)
    assert_same(model.state_dict(), weights)
    assert run.progress.updates[optimizer] == updates < total
    assert len({scale for *_, scale in got}) > 2  # it grew, and it backed off


def test_a_scaler_reads_what_the_loop_by_hand_reads():
    """Once an update, to decide whether it steps."""

    def step(model, batch):
        return classify(model, batch)["loss"]

    model, optimizer, train, _ = Case().make()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run = iter(lt.train(model, list(train), step) | lt.optimize(optimizer, max_norm=1.0, accumulate=2, scaler=scaler))
    next(run)
    with device_reads() as reads:
        list(run.take(4))

    assert reads == ["item"] * 2


def test_a_window_with_a_scaler_is_resumed(tmp_path):
    """The pending gradients are scaled; the scale they have comes back with them."""

    def make():
        model, optimizer, train, _ = Case(optimizer="AdamW").make()
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        part = lt.optimize(optimizer, max_norm=0.5, accumulate=4, across_epochs=True, scaler=scaler)
        return lt.workflow([(lt.train(model, train, classify) | part, 1)], max_epochs=3)

    straight = make()
    straight.to_end()
    list((make() | lt.checkpoint(tmp_path)).take(14))
    run = make() | lt.checkpoint(tmp_path)
    run.resume()
    run.to_end()

    assert_same(run.model.state_dict(), straight.model.state_dict())


@pytest.mark.parametrize("planted", [(), (2,)])
def test_a_pass_whose_last_state_is_dropped_before_the_update_is_resumed(planted, tmp_path):
    """The scale changes before the checkpoint at the pass's end, not when the next window opens."""

    def make():
        model, optimizer, train, _ = Case().make()
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)

        def drop(states):
            for state in states:
                if not (state.last and state.epoch == 0):
                    yield state

        def step(model, batch, state):
            return classify(model, batch)["loss"] * (float("inf") if state.iteration == 6 and planted else 1.0)

        phase = lt.train(model, train, step) | lt.backward(optimizer, scaler=scaler) | drop
        return lt.workflow([(phase | lt.update(optimizer, scaler=scaler), 1)], max_epochs=2), scaler

    straight, scaler = make()
    straight.to_end()
    list((make()[0] | lt.checkpoint(tmp_path)).take(7))
    run, resumed = make()
    run = run | lt.checkpoint(tmp_path)
    run.resume()
    run.to_end()

    assert resumed.state_dict() == scaler.state_dict()
    assert_same(run.model.state_dict(), straight.model.state_dict())


def test_an_iteration_whose_gradients_are_unscaled_cannot_be_retried():
    """torch's scaler unscales once an update; `next` makes the update."""
    model, optimizer, train, _ = Case().make()
    scaler = torch.amp.GradScaler("cpu")
    run = iter(lt.train(model, train, classify) | lt.optimize(optimizer, scaler=scaler))
    run.after("backward")

    with pytest.raises(
        RuntimeError, match="retry: this iteration cannot be redone: its gradients are unscaled already"
    ):
        run.retry()
    assert next(run).iteration == 0
    assert run.progress.updates[optimizer] == 1
