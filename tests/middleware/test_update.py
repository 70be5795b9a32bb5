"""Moves of the optimizer, counted."""

from __future__ import annotations

import pytest
import torch
from loops import Case, assert_same, classify
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
