"""Clamping each element."""

from __future__ import annotations

import pytest
import torch
from loops import classify, device_reads, loader, network
from torch import nn

import looptools as lt


def test_each_element_for_itself(model, sgd, batches):
    """A gradient within the bound stays; one beyond it becomes the bound, with its sign."""
    run = iter(lt.train(model, batches, lambda model, batch: -model(batch)) | lt.optimize(sgd, max_value=1.5))

    assert [model.w.item() for _ in run] == [4.0, 5.5, 7.0]


def test_before_the_norm(model, sgd, batches):
    """With both, the norm is that of the clamped gradients."""
    part = lt.optimize(sgd, max_value=1.5, max_norm=1.0)
    run = iter(lt.train(model, batches[1:], lambda model, batch: model(batch)) | part)

    assert [name.rpartition("/")[2] for name, _ in run.stages()][2:5] == [
        "backward",
        "clip_grad_value",
        "clip_grad_norm",
    ]
    assert run.state.grad_norm == 1.5
    assert model.w.item() == pytest.approx(2.0)


def test_only_where_the_window_closes(model, sgd, batches):
    """Within a window gradients are left alone: what is clamped is their sum."""
    run = iter(
        lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd, accumulate=3, max_value=1)
    )

    assert [next(run).updates and model.w.grad.item() for _ in range(3)] == [False, False, 1.0]


def test_same_as_by_hand_without_a_device_read():
    """To the bit; the length is known, so one `next` fetches one batch."""
    torch.manual_seed(0)
    net, other = network(), network()
    other.load_state_dict(net.state_dict())
    batches, fetched = list(loader(shuffle=False)), []
    torch.manual_seed(1)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    for batch in batches:
        sgd.zero_grad()
        classify(net, batch)["loss"].backward()
        nn.utils.clip_grad_value_(net.parameters(), 0.02)
        sgd.step()

    class Watched(list):
        def __getitem__(self, index):
            fetched.append(index)
            return super().__getitem__(index)

        def __iter__(self):
            return (self[n] for n in range(len(self)))

    torch.manual_seed(1)
    sgd = torch.optim.SGD(other.parameters(), lr=0.1)
    run = iter(lt.train(other, Watched(batches), classify) | lt.optimize(sgd, max_value=0.02))
    with device_reads() as reads:
        next(run)

    assert (fetched, reads) == ([0], [])
    run.to_end()
    for left, right in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


def test_bad_options_are_refused_where_they_are_typed(model, sgd):
    """What is wrong, what was given, what to do."""
    with pytest.raises(ValueError, match="clip_grad_value: max_value must be positive, got -1"):
        lt.optimize(sgd, max_value=-1)
    with pytest.raises(TypeError, match="clip_grad_value: params must be tensors"):
        lt.clip_grad_value([], 1.0)
    with pytest.raises(TypeError, match="clip_grad_norm: params must be tensors, as in model.parameters"):
        lt.clip_grad_norm(model, 1.0)
