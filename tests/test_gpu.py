"""The same promises on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from loops import Planted, Trips, assert_same, classify, device_reads, loader, network
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import looptools as lt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def make(**options):
    torch.manual_seed(0)
    model = network().cuda()
    return model, torch.optim.AdamW(model.parameters(), lr=0.01), loader()


def by_hand(autocast=False):
    model, optimizer, data = make()
    scaler = torch.amp.GradScaler("cuda", enabled=autocast)
    model.train()
    for _ in range(2):
        for batch in data:
            images, labels = (tensor.cuda() for tensor in batch)
            with torch.autocast("cuda", torch.float16, enabled=autocast):
                loss = classify(model, (images, labels))["loss"]
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
    return model.state_dict()


def piped(autocast=False):
    model, optimizer, data = make()
    scaler = torch.amp.GradScaler("cuda") if autocast else None
    phase = lt.train(model, data, classify, device="model", autocast=torch.float16 if autocast else None)
    return lt.workflow([(phase | lt.optimize(optimizer, max_norm=1.0, scaler=scaler), 1)], max_epochs=2)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "fp16"])
def test_same_bits_as_by_hand(autocast):
    """Dropout draws from the device's generator; batches are moved by `device="model"`."""
    run = piped(autocast)

    run.to_end()

    assert_same(run.model.state_dict(), by_hand(autocast))


@pytest.mark.parametrize("name", ["train/forward", "train/backward", "train/update"])
def test_going_on_after_an_exception_draws_the_same_dropout(name):
    """The device's generator is set back for a forward that is redone."""
    run = piped()
    slot = next(slot for slot in run.cursor.slots if slot.name == name)
    slot.part = Trips(slot.part, at=lambda state: True)

    while not run.ended:
        try:
            run.to_end()
        except Planted:
            pass

    buffers = ["running_mean", "running_var", "num_batches_tracked"]
    assert_same(run.model.state_dict(), by_hand(), but=buffers)


def test_resume_sets_the_devices_generator(tmp_path):
    """A run resumed in the middle ends with the uninterrupted bits."""
    first = piped() | lt.checkpoint(tmp_path)
    list(first.take(7))
    torch.cuda.manual_seed(99)
    run = piped() | lt.checkpoint(tmp_path)
    run.resume()
    run.to_end()

    assert_same(run.model.state_dict(), by_hand())


def test_the_device_is_read_once_a_row():
    """Between the rows of the log nothing waits for the device."""
    model, optimizer, data = make()
    batches = [tuple(tensor.cuda() for tensor in batch) for batch in data]
    phase = lt.train(model, batches, classify) | lt.optimize(optimizer, max_norm=1.0)
    run = lt.workflow([(phase, 1)], max_epochs=1) | lt.log(every=3, line=lambda line: reads.append("row"))
    next(run)

    with device_reads("cuda") as reads:
        list(run.take(6))

    assert reads == ["tolist", "row"] * 3


def test_tokens_are_counted_on_the_device():
    """Weighted accumulation, weight norms and a peak of memory read nothing between two rows."""
    model, optimizer, data = make()
    batches = [tuple(tensor.cuda() for tensor in batch) for batch in data]
    phase = lt.train(model, batches, classify)
    phase = phase | lt.backward(optimizer, accumulate=2, weigh=lambda state: (state.batch[1] >= 0).sum())
    phase = phase | lt.watch(model, every=2) | lt.update(optimizer)
    run = lt.workflow([(phase, 1)], max_epochs=2) | lt.timer() | lt.memory(every=1)
    next(run)

    with device_reads("cuda") as reads:
        state = list(run.take(5))[-1]

    assert reads == []
    assert state.metrics["weight_norm/0.weight"].device.type == "cuda"
    assert state.gauges["memory_mb"] > 0


def test_a_nan_guard_reads_the_device_once_an_iteration():
    """As the loop by hand that looks at its loss."""
    model, optimizer, data = make()
    phase = lt.train(model, data, classify, device="model") | lt.nan_guard() | lt.optimize(optimizer)
    run = iter(phase)
    next(run)

    with device_reads("cuda") as reads:
        list(run.take(4))

    assert reads == ["item"] * 4


def test_an_average_on_the_device_equals_the_one_by_hand():
    """EMA behind fp32 updates, bit for bit."""

    def averages(by_hand):
        model, optimizer, data = make()
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        if not by_hand:
            phase = lt.train(model, data, classify, device="model") | lt.optimize(optimizer) | lt.ema(averaged)
            phase.to_end()
            return averaged.state_dict()
        model.train()
        for batch in data:
            optimizer.zero_grad()
            classify(model, tuple(tensor.cuda() for tensor in batch))["loss"].backward()
            optimizer.step()
            averaged.update_parameters(model)
        return averaged.state_dict()

    assert_same(averages(by_hand=False), averages(by_hand=True))


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("iterations", [3, 7, 10])
def test_saved_within_a_pass_and_resumed_on_the_device(tmp_path, iterations, background):
    """The device's generators come back, gradients and weights go back to their device; to the same bits."""
    straight = piped(autocast=True)
    straight.to_end()
    first = piped(autocast=True) | lt.checkpoint(tmp_path, every=1, background=background)
    list(first.take(iterations))
    first.close()
    run = piped(autocast=True) | lt.checkpoint(tmp_path, every=1)
    run.resume()
    run.to_end()

    assert_same(run.model.state_dict(), straight.model.state_dict())


def test_a_background_save_waits_for_the_device_once(tmp_path):
    """One synchronisation for all copies, into pinned memory; nothing is read by `.item()` or the like."""
    run = piped() | lt.checkpoint(tmp_path, every=2, background=True)
    list(run.take(2))
    with device_reads() as reads:
        list(run.take(4))
    run.close()

    assert reads == []


def kept(autocast=False):
    run = piped(autocast)
    run._snapshots = lt.snapshots(every=3, keep=4)
    return run


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "fp16"])
def test_back_and_forward_again_on_the_device(autocast):
    """From pinned memory to the device, its generator and the scaler included."""
    run = kept(autocast)
    for n in (2, 5):
        list(run.take(6))
        run.back(n)

    run.to_end()

    assert_same(run.model.state_dict(), by_hand(autocast))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "fp16"])
def test_retry_after_the_update_on_the_device(autocast):
    """The copy of the iteration's beginning is put back in place."""
    run = kept(autocast)
    list(run.take(2))
    run.after("update")

    run.retry()
    run.to_end()

    assert_same(run.model.state_dict(), by_hand(autocast))


def test_snapshots_do_not_wait_for_the_device():
    """What is copied at the beginning of each iteration stays there; only a snapshot itself is waited for."""
    run = kept()
    run._snapshots = lt.snapshots(every=50)
    next(run)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with device_reads("cuda") as reads:
            list(run.take(3))
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert reads == []


def test_a_crash_is_reopened_on_the_device(tmp_path):
    """The batch is where it was, and the loss comes out the same."""
    run = piped() | lt.flight_recorder(tmp_path)
    slot = next(slot for slot in run.cursor.slots if slot.name == "train/update")
    slot.part = Trips(slot.part, lambda state: state.iteration == 4)
    with pytest.raises(Planted):
        run.to_end()
    loss = run.failed.state.loss.detach().clone()

    again = lt.reopen(tmp_path, piped())

    assert again.state.batch[0].is_cuda
    assert torch.equal(again.after("forward").loss.detach(), loss)


def test_a_ledger_counts_waits_for_the_device():
    """Of the device's tensors only."""
    run = piped()

    def asks(states):
        for state in states:
            float(state.loss.detach())
            yield state

    run.insert(asks, after="forward")
    ledger = run.ledger
    list(run.take(3))

    assert {row.part: row.reads for row in ledger.rows}["train/asks"] == 3
