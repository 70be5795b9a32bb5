"""A moving average of the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from loops import Case, Planted, assert_same, classify, device_reads
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import looptools as lt

TRAINING = json.loads((Path(__file__).parent.parent / "reference" / "training.json").read_text())
CASES = [case for case in TRAINING["cases"] if case["family"] == "ema" and "resume_after_epoch" not in case]


class Linear(nn.Module):
    """The regression of the figures."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(TRAINING["initial"]["w"], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(TRAINING["initial"]["b"], dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w.T + self.b


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_mmcvs_averages_number_by_number(case):
    """ema = (1 - m) ema + m w with m = min(momentum, (1 + i) / (warm_up + i)), from the initial weights on.

    mmcv's moves every iteration, and its accumulation windows cross epochs: one pass here. 1e-12 relative.
    """
    data, size, config = TRAINING["data"], TRAINING["batch_size"], case["ema"]
    x, y = (torch.tensor(data[key], dtype=torch.float64) for key in "xy")
    batches = [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]
    model = Linear()

    def momentum(average, weight, n):
        i = int(n) - 1
        m = min(config["momentum"], (1 + i) / (config["warm_up"] + i))
        return (1 - m) * average + m * weight

    averaged = AveragedModel(model, avg_fn=momentum)
    averaged.n_averaged.fill_(1)  # begin from the initial weights
    options = {key: value for key, value in case["optimizer"].items() if key != "type"}
    optimizer = getattr(torch.optim, case["optimizer"]["type"])(model.parameters(), **options)
    train = lt.train(model, batches, lambda model, batch: (model(batch[0]) - batch[1]).pow(2).mean())
    train = train | lt.optimize(optimizer, accumulate=case["optimizer_config"].get("cumulative_iters", 1))
    total = case["max_epochs"] * len(batches)
    run = lt.workflow([(train | lt.ema(averaged, by="iteration"), lt.iterations(total))], max_iterations=total)

    rows = [row for row in case["rows"] if row["at"] == "after_train_iter"]
    close = {"rel": 1e-12, "abs": 1e-15}
    for row, _ in zip(rows, run, strict=True):
        for values, here in (("w", model.w), ("ema_w", averaged.module.w)):
            assert here.detach().tolist() == [pytest.approx(line, **close) for line in row[values]]
        assert model.b.detach().tolist() == pytest.approx(row["b"], **close)
        assert averaged.module.b.detach().tolist() == pytest.approx(row["ema_b"], **close)
    assert len(rows) == 14
    assert len(CASES) == 3


HARD = Case(optimizer="AdamW", max_norm=0.5, accumulate=3, epochs=3)


def average(model, use_buffers=False):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)


def by_hand(case, *, every=1, use_buffers=False, poison=()):
    """The plain loop, with the average updated after each update that happened."""
    model, optimizer, train, val = case.make()
    averaged = average(model, use_buffers)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=bool(poison))
    updates, iteration = 0, -1
    for _ in range(case.epochs):
        model.train()
        for index, batch in enumerate(train):
            iteration += 1
            if index % case.accumulate == 0:
                optimizer.zero_grad()
            window = min(case.accumulate, len(train) - index // case.accumulate * case.accumulate)
            loss = classify(model, batch)["loss"] * (float("inf") if iteration in poison else 1.0)
            scaler.scale(loss / window if window > 1 else loss).backward()
            if (index + 1) % case.accumulate == 0 or index + 1 == len(train):
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), case.max_norm or 1e9)
                scaler.step(optimizer)
                scaler.update()
                if iteration not in poison:
                    updates += 1
                    if updates % every == 0:
                        averaged.update_parameters(model)
        averaged.eval()
        with torch.no_grad():
            for batch in val:
                classify(averaged, batch)
    return averaged.state_dict()


def piped(case, *, every=1, use_buffers=False, poison=(), **options):
    model, optimizer, train_loader, val_loader = case.make()
    averaged = average(model, use_buffers)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if poison else None

    def step(model, batch, state):
        result = classify(model, batch)
        return result | {"loss": result["loss"] * (float("inf") if state.iteration in poison else 1.0)}

    train = lt.train(model, train_loader, step)
    train = train | lt.optimize(optimizer, max_norm=case.max_norm or 1e9, accumulate=case.accumulate, scaler=scaler)
    val = lt.validate(averaged, val_loader, classify)
    parts = [(train | lt.ema(averaged, every=every, **options), 1), (val, 1)]
    return lt.workflow(parts, max_epochs=case.epochs), averaged


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_same_as_by_hand(every, use_buffers):
    """Accumulation, AdamW, BatchNorm, and a validation of the average between the passes: to the bit."""
    run, averaged = piped(HARD, every=every, use_buffers=use_buffers)
    run.to_end()

    assert_same(averaged.state_dict(), by_hand(HARD, every=every, use_buffers=use_buffers))
    assert averaged.n_averaged == 9 // every


def test_an_update_that_the_scaler_skipped_does_not_count():
    """Planted infinities: neither averaged nor counted towards `every`."""
    case = Case(optimizer="AdamW")
    run, averaged = piped(case, every=3, poison=(2, 6))
    run.to_end()

    assert_same(averaged.state_dict(), by_hand(case, every=3, poison=(2, 6)))
    assert averaged.n_averaged == 12 // 3


@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_goes_on_to_the_same_bits(tmp_path, every):
    """The average is in the checkpoint by itself, and so is the count towards `every`: a pass has 3 updates."""
    first = piped(HARD, every=every)[0] | lt.checkpoint(tmp_path)
    list(first.take(14))
    torch.manual_seed(99)
    run, averaged = piped(HARD, every=every)
    run = run | lt.checkpoint(tmp_path)
    run.resume()
    assert averaged.n_averaged == 3 // every
    run.to_end()

    assert_same(averaged.state_dict(), by_hand(HARD, every=every))


def test_the_best_checkpoint_holds_the_average(tmp_path):
    """Judged by the validation of the average, under the option's name."""
    run, averaged = piped(Case(epochs=1))
    run = run | lt.checkpoint(tmp_path, best=lt.lowest("val/loss"))
    run.to_end()

    models = torch.load(tmp_path / "best.pt", weights_only=True)["models"]
    assert_same(models["averaged"], averaged.state_dict())


def counts_of(model, sgd, batches, accumulate=1, **options):
    """After each training iteration, how often the average was updated."""
    averaged = AveragedModel(model)
    train = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd, accumulate=accumulate)
    val = lt.validate(averaged, batches, lambda model, batch: model(batch))
    run = lt.workflow([(train | lt.ema(averaged, **options), 1), (val, 1)], max_epochs=2)
    seen = [(state.phase, averaged.n_averaged.tolist()) for state in run]
    for (_, before), (phase, after) in zip(seen, seen[1:], strict=False):
        assert phase == "train" or before == after  # nothing moves in validation
    return [count for phase, count in seen if phase == "train"]


def test_when_it_averages(model, sgd, batches):
    """Every update; every second; from the third on; on every iteration of a window."""
    assert counts_of(model, sgd, batches) == [1, 2, 3, 4, 5, 6]
    assert counts_of(model, sgd, batches, every=2) == [0, 1, 1, 2, 2, 3]
    assert counts_of(model, sgd, batches, start=2) == [0, 0, 1, 2, 3, 4]
    assert counts_of(model, sgd, batches, start=1, every=2) == [0, 0, 1, 1, 2, 2]
    assert counts_of(model, sgd, batches, accumulate=2) == [0, 1, 2, 2, 3, 4]
    assert counts_of(model, sgd, batches, accumulate=2, by="iteration") == [1, 2, 3, 4, 5, 6]
    assert counts_of(model, sgd, batches, start=3, every=2, by="iteration") == [0, 0, 0, 0, 1, 1]


def test_it_takes_the_weights_after_the_update(model, sgd, batches):
    """The first update goes from 3 to 2, and the first average is a copy."""
    averaged = AveragedModel(model)
    train = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd) | lt.ema(averaged)

    for state, expected in zip(train, [2.0, 1.0, -1 / 3], strict=True):
        assert averaged.module.w.detach().tolist() == pytest.approx(expected)
    assert state.last


def test_piped_onto_the_run_it_keeps_to_training(model, sgd, batches):
    """Validation states come by as well."""
    averaged = AveragedModel(model)
    step = lambda model, batch: model(batch)  # noqa: E731
    phases = [lt.train(model, batches, step) | lt.optimize(sgd), lt.validate(averaged, batches, step)]
    run = lt.workflow([(phase, 1) for phase in phases], max_epochs=2)

    (run | lt.ema(averaged, by="iteration")).to_end()

    assert averaged.n_averaged == 6


def test_one_next_is_one_iteration(model, sgd, batches):
    """It fetches no second batch, and stopping early leaves nothing open."""
    averaged, closed = AveragedModel(model), []

    def source():
        try:
            yield from batches
        finally:
            closed.append(True)

    train = lt.train(model, source, lambda model, batch: model(batch)) | lt.optimize(sgd) | lt.ema(averaged)
    run = iter(train)
    run.after("ema")
    assert averaged.n_averaged == 1
    assert run.cursor.passes.sources[id(train)].taken == 1
    run.close()
    assert run["ema"].updates == 1


def test_reads_are_those_of_the_averaged_model(model, sgd, batches):
    """Two of n_averaged, a buffer on the CPU; the part itself reads nothing."""
    averaged = AveragedModel(model)
    run = iter(lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd) | lt.ema(averaged))
    next(run)
    run.before("ema")
    with device_reads() as piped_reads:
        run.after("ema")
    with device_reads() as by_hand_reads:
        averaged.update_parameters(model)

    assert piped_reads == by_hand_reads
    assert averaged.n_averaged.device.type == "cpu"


def test_a_failure_in_the_average_counts_nothing(model, sgd, batches):
    """The next `next` goes on at the part, and the weights are not moved again."""
    trips = [True]

    def fragile(average, weight, n):
        if trips.pop() if trips else False:
            raise Planted
        return weight

    averaged = AveragedModel(model, avg_fn=fragile)
    averaged.n_averaged.fill_(1)
    run = iter(lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd) | lt.ema(averaged))

    with pytest.raises(Planted) as failure:
        next(run)
    assert "some of the averaged weights may have moved already" in "".join(failure.value.__notes__)
    with pytest.raises(RuntimeError, match="retry: this iteration cannot be redone"):
        run.retry()
    next(run)
    assert (model.w, averaged.module.w, run["ema"].updates) == (2.0, 2.0, 1)


def test_without_an_update_it_cannot_be_redone_either(model, sgd, batches):
    """An average that was taken in stays taken in."""
    train = lt.train(model, batches, lambda model, batch: model(batch))
    run = iter(train | lt.ema(AveragedModel(model), by="iteration"))
    run.after("ema")

    with pytest.raises(RuntimeError, match="cannot be redone: the averaged weights have moved"):
        run.retry()


def test_a_decay_that_warms_up(model, sgd, batches):
    """The docstring's formula: a decay of (1 + n) / (10 + n), up to 0.999."""
    averaged = AveragedModel(
        model, avg_fn=lambda ema, weight, n: ema + (weight - ema) * torch.clamp(9 / (10 + n), 0.001)
    )
    averaged.n_averaged.fill_(1)

    (lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd) | lt.ema(averaged)).to_end()

    expected = 3.0
    for n, weight in enumerate([2.0, 0.0, -3.0], 1):
        decay = min(0.999, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight
    assert averaged.module.w.item() == pytest.approx(expected)


class Wrapper(nn.Module):
    """As DistributedDataParallel: the model behind one more name."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return self.module(batch)


def test_the_average_may_be_of_the_model_behind_a_wrapper(model, sgd, batches):
    """Only shapes count, since a wrapper changes names."""
    averaged = AveragedModel(model)
    train = lt.train(Wrapper(model), batches, lambda model, batch: model(batch)) | lt.optimize(sgd)

    (train | lt.ema(averaged)).to_end()

    assert averaged.n_averaged == 3


def test_bad_options(model, sgd, batches):
    """Refused where they are typed, another model when the run is built."""
    train = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)

    with pytest.raises(TypeError, match="ema: averaged must be a torch.optim.swa_utils.AveragedModel, got a Weight"):
        lt.ema(model)
    with pytest.raises(ValueError, match="ema: every must be at least 1, got 0"):
        lt.ema(AveragedModel(model), every=0)
    with pytest.raises(ValueError, match="ema: by must be one of 'update', 'iteration', got 'epoch'"):
        lt.ema(AveragedModel(model), by="epoch")
    other = AveragedModel(nn.BatchNorm1d(1))
    with pytest.raises(ValueError, match=r"another model than the one that train trains: it has 2 parameters and 3 bu"):
        iter(train | lt.ema(other)).explain()
    with pytest.raises(ValueError, match="the model others of as many"):
        iter(train | lt.ema(AveragedModel(nn.Linear(1, 1, bias=False)))).explain()
    averaged = AveragedModel(model)
    itself = lt.train(averaged, batches, lambda model, batch: model(batch))
    with pytest.raises(ValueError, match="ema: train trains the average itself"):
        iter(itself | lt.optimize(torch.optim.SGD(averaged.parameters())) | lt.ema(averaged)).explain()
    val = lt.validate(model, batches, lambda model, batch: model(batch))
    with pytest.raises(ValueError, match="ema: no training goes through it"):
        iter(val | lt.ema(averaged)).explain()
