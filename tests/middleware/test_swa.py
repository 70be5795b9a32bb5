"""An equal average of the weights that a training passes through."""

from __future__ import annotations

import pytest
import torch
from loops import Case, assert_same, classify
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, SequentialLR
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

import looptools as lt

CASE = Case(optimizer="AdamW", epochs=5)


def schedule(optimizer):
    """Cosine for two epochs, then SWALR."""
    return SequentialLR(optimizer, [CosineAnnealingLR(optimizer, 2), SWALR(optimizer, 0.02, anneal_epochs=2)], [2])


def by_hand(start=2, every=1):
    """The loop of torch's manual, with BatchNorm renewed and the average judged after each epoch."""
    model, optimizer, train, val = CASE.make()
    averaged, scheduler = AveragedModel(model), schedule(optimizer)
    for epoch in range(1, CASE.epochs + 1):
        model.train()
        for batch in train:
            optimizer.zero_grad()
            classify(model, batch)["loss"].backward()
            optimizer.step()
        scheduler.step()
        if epoch >= start and (epoch - start) % every == 0:
            averaged.update_parameters(model)
        update_bn(train, averaged)
        averaged.eval()
        with torch.no_grad():
            losses = [(classify(averaged, batch)["loss"], len(batch[0])) for batch in val]
    return averaged.state_dict(), sum(loss * n for loss, n in losses) / 26


def piped(start=2, every=1):
    model, optimizer, train_loader, val_loader = CASE.make()
    averaged = AveragedModel(model)
    train = lt.train(model, train_loader, classify) | lt.schedule_lr(optimizer, schedule(optimizer), by="epoch")
    train = train | lt.optimize(optimizer) | lt.swa(averaged, start=lt.epochs(start), every=lt.epochs(every))
    refresh, val = lambda run: update_bn(train_loader, averaged), lt.validate(averaged, val_loader, classify)
    return lt.workflow([(train, 1), (refresh, 1), (val, 1)], max_epochs=CASE.epochs), averaged


@pytest.mark.parametrize(("start", "every"), [(2, 1), (3, 2)])
def test_same_as_by_hand(start, every):
    """With SWALR, BatchNorm's renewal as an entry of the workflow, and the average judged: to the bit."""
    run, averaged = piped(start, every)
    run.to_end()

    weights, loss = by_hand(start, every)
    assert_same(averaged.state_dict(), weights)
    assert run.results["val/loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert averaged.n_averaged == (4 if every == 1 else 2)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("epochs", [1, 3])
def test_a_resumed_run_goes_on_to_the_same_bits(tmp_path, epochs, every):
    """Stopped before the average begins, or after; `every` is counted from the first one all along."""
    first = piped(every=every)[0] | lt.checkpoint(tmp_path)
    list(first.take(14 * epochs))
    torch.manual_seed(99)
    run, averaged = piped(every=every)
    run = run | lt.checkpoint(tmp_path)
    run.resume()
    assert averaged.n_averaged == (0 if epochs == 1 else 3 - every)
    run.to_end()

    assert_same(averaged.state_dict(), by_hand(every=every)[0])


def counts_of(model, sgd, source, epochs=3, **options):
    averaged = AveragedModel(model)
    train = lt.train(model, source, lambda model, batch: model(batch)) | lt.optimize(sgd)
    val = lt.validate(averaged, [torch.ones(1)], lambda model, batch: model(batch))
    run = lt.workflow([(train | lt.swa(averaged, **options), 1), (val, 1)], max_epochs=epochs)
    return [averaged.n_averaged.tolist() for state in run if state.trains or averaged.n_averaged < 0]


def test_when_it_averages(model, sgd, batches):
    """At the ends of epochs once start is reached; within them if asked; validation moves nothing."""
    assert counts_of(model, sgd, batches, start=lt.epochs(2)) == [0, 0, 0, 0, 0, 1, 1, 1, 2]
    assert counts_of(model, sgd, lambda: iter(batches), start=lt.epochs(2)) == [0, 0, 0, 0, 0, 1, 1, 1, 2]
    assert counts_of(model, sgd, batches, start=4) == [0, 0, 0, 0, 0, 1, 1, 1, 2]
    assert counts_of(model, sgd, batches, start=4, every=2) == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert counts_of(model, sgd, batches, start=1, every=lt.epochs(2)) == [0, 0, 1, 1, 1, 1, 1, 1, 2]
    assert counts_of(model, sgd, batches, start=3, every=2) == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert counts_of(model, sgd, batches, start=lt.epochs(2), every=2) == [0, 0, 0, 0, 0, 1, 1, 2, 2]
    assert counts_of(model, sgd, batches, start=1, every=lambda state: state.index == 1) == [0, 1, 1, 1, 2, 2, 2, 3, 3]


def test_it_takes_the_weights_at_the_end_of_the_epoch(model, sgd, batches):
    """The weight goes 3, 2, 0, -3, and in the second epoch to -9."""
    averaged = AveragedModel(model)
    train = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)
    run = lt.workflow([(train | lt.swa(averaged, start=lt.epochs(1)), 1)], max_epochs=2)

    seen = [averaged.module.w.detach().tolist() for state in run]

    assert seen == [3.0, 3.0, -3.0, -3.0, -3.0, -6.0]


def test_a_pass_whose_last_batch_is_skipped_ends_all_the_same(model, sgd, batches):
    """The weights are there, and it is the end of the epoch."""
    averaged = AveragedModel(model)
    train = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)
    run = lt.workflow([(train | lt.swa(averaged, start=lt.epochs(1)), 1)], max_epochs=1)
    list(run.take(2))
    run.before("backward")
    run.skip()

    assert averaged.module.w == 0.0
    assert averaged.n_averaged == 1


def test_a_skipped_iteration_is_not_averaged(model, sgd, batches):
    """Where iterations are counted, the end of the pass is nothing special."""
    averaged = AveragedModel(model)
    train = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)
    run = lt.workflow([(train | lt.swa(averaged, start=3, every=1), 1)], max_epochs=2)
    list(run.take(2))
    run.before("backward")
    run.skip()

    assert averaged.n_averaged == 0
    next(run)
    assert averaged.n_averaged == 1


def test_one_next_is_one_iteration(model, sgd, batches):
    """A generator's second batch is not fetched before the average reads `last`, and only in an epoch that counts."""
    taken = []

    def source():
        for batch in batches:
            taken.append(batch)
            yield batch

    averaged = AveragedModel(model)
    train = lt.train(model, source, lambda model, batch: model(batch)) | lt.optimize(sgd)
    run = iter(train | lt.swa(averaged, start=lt.epochs(2)))
    run.after("swa")
    assert len(taken) == 1
    run.close()


def test_bad_options(model, sgd, batches):
    """Refused where they are typed, another model when the run is built."""
    averaged = AveragedModel(model)

    with pytest.raises(TypeError, match="swa: averaged must be a torch.optim.swa_utils.AveragedModel"):
        lt.swa(model, start=1)
    for start in (lt.seconds(3), "2", 1.5, True):
        with pytest.raises(TypeError, match=r"swa: start must be lt.epochs\(n\) or a number of training iterations"):
            lt.swa(averaged, start=start)
    with pytest.raises(ValueError, match="iterations: n must be at least 1, got 0"):
        lt.swa(averaged, start=0)
    with pytest.raises(ValueError, match=r"swa: a round can end in validation.*every=lt.epochs\(2\)"):
        lt.swa(averaged, start=1, every=lt.rounds(2))
    train = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)
    with pytest.raises(ValueError, match="swa: averaged was made of another model"):
        iter(train | lt.swa(AveragedModel(nn.Linear(1, 1)), start=1)).explain()
