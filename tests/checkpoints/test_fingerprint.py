"""What must be as it was, what may be accepted, and what is only said."""

from __future__ import annotations

import warnings

import attrs
import pytest
import torch
from loops import Case, assert_same, by_hand, classify, network, piped
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import looptools as lt


def training(*, samples=24, batch=4, seed=0, max_norm=None, entries=1, optimizer=torch.optim.SGD, width=8, epochs=2):
    """A small run; each argument is something that a fingerprint looks at."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))
    data = TensorDataset(torch.ones(samples, 3), torch.zeros(samples, dtype=torch.long))
    phase = lt.train(model, DataLoader(data, batch, shuffle=True), classify)
    phase = phase | lt.optimize(optimizer(model.parameters(), lr=0.1), max_norm=max_norm)
    return lt.workflow([(phase, entries)], max_epochs=epochs)


def saved(folder, iterations=3, **options):
    """The folder with a checkpoint of such a run, after so many iterations."""
    run = training(**options)
    list(run.take(iterations))
    run.save(folder)
    return folder


@pytest.mark.parametrize(
    ("other", "word", "text"),
    [
        ({"samples": 32}, "data", "train: samples 24 saved, 32 here"),
        ({"batch": 2}, "batch_size", "train: batch size 4 saved, 2 here"),
        ({"seed": 1}, "seed", "the seed: 0 saved, 1 here"),
        ({"max_norm": 1.0}, "pipe", "the pipe: here only train/clip_grad_norm"),
        ({"entries": 2}, "pipe", "the workflow: saved train x 1; here train x 2"),
        ({"optimizer": torch.optim.Adam}, "pipe", "optimizer: saved SGD, here Adam"),
    ],
)
def test_each_difference_is_refused_or_accepted_by_its_word(tmp_path, other, word, text):
    """The error names it with the word that accepts it; with the word the run goes on."""
    saved(tmp_path)

    with pytest.raises(RuntimeError, match="Nothing was changed") as caught:
        training(**other).resume(tmp_path)
    assert f'- {text}  (accept="{word}")' in str(caught.value)
    run = training(**other)
    with warnings.catch_warnings(action="ignore"):  # that the optimizer is another one is said besides
        run.resume(tmp_path, accept=word)
    assert run.progress.iteration == 3
    run.to_end()
    assert run.progress.epoch == 2


def test_all_differences_are_listed_at_once(tmp_path):
    """One error; and accepting some is not accepting all."""
    saved(tmp_path)
    run = training(samples=32, seed=1, max_norm=1.0)

    with pytest.raises(RuntimeError) as caught:
        run.resume(tmp_path, accept=("data", "seed"))
    assert "the pipe" in str(caught.value)
    assert "seed" not in str(caught.value).partition("differ in:")[2].partition("Go on")[0]
    assert run.resume(tmp_path, accept=["data", "seed", "pipe"]) is not None


def test_another_shape_cannot_be_accepted(tmp_path):
    """Nothing is changed; the cure is to take the weights alone."""
    saved(tmp_path)
    run = training(width=9)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}

    with pytest.raises(RuntimeError, match=r"0.weight has shape \(8, 3\) in the file, \(9, 3\) here") as caught:
        run.resume(tmp_path, accept="pipe")
    assert "lt.load_weights" in str(caught.value)
    assert "accept=" not in str(caught.value).rpartition("\n")[2]
    assert_same(run.model.state_dict(), before)
    assert run.progress.iteration == 0


def test_a_word_that_is_none_is_an_error(tmp_path):
    """The known ones are listed."""
    with pytest.raises(ValueError, match="accept knows data, batch_size, world_size, seed, pipe; got 'everything'"):
        training().resume(tmp_path, accept="everything")


def test_another_world_size_is_refused(tmp_path, monkeypatch):
    """As torch.distributed says it."""
    saved(tmp_path)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)

    with pytest.raises(RuntimeError, match=r'the world size: 1 saved, 4 here  \(accept="world_size"\)'):
        training().resume(tmp_path)
    training().resume(tmp_path, accept="world_size")


def test_parts_that_only_look_come_and_go(tmp_path):
    """Logs, timers and checkpoints change no training: the run ends with the same bits."""
    case = Case(optimizer="AdamW", accumulate=2)
    first = piped(case) | lt.timer() | lt.checkpoint(tmp_path, every=2)
    list(first.take(5))
    first.close()

    run = piped(case) | lt.memory() | lt.log(tmp_path, line=None) | lt.checkpoint(tmp_path)
    run.resume()
    run.to_end()

    assert_same(run.model.state_dict(), by_hand(case))


def test_with_another_batch_size_the_same_samples_are_done(tmp_path):
    """Twelve samples were seen; batches of two go on with the seventh."""
    saved(tmp_path)
    run = training(batch=2)
    run.resume(tmp_path, accept="batch_size")

    state = next(run)

    assert (state.index, state.iteration) == (6, 3)
    assert len(list(run)) == 5 + 12


def test_a_pass_that_is_longer_than_the_data_cannot_be_gone_on_with(tmp_path):
    """Even if the data are accepted."""
    saved(tmp_path, iterations=5)

    with pytest.raises(RuntimeError, match="5 batches of the pass of train were done, it has 3 here"):
        training(samples=12).resume(tmp_path, accept="data")


def test_a_new_part_begins_afresh_and_the_others_go_on(tmp_path):
    """By name: what both have keeps its memory."""

    @attrs.define(eq=False)
    class counts:
        seen: int = attrs.field(default=0, init=False)

        def __call__(self, states):
            for state in states:
                self.seen += 1
                yield state

    run = training() | counts()
    list(run.take(4))
    run.save(tmp_path)
    run = training(max_norm=1.0) | counts() | counts()
    run.resume(tmp_path, accept="pipe")

    assert (run["run/counts"].seen, run["run/counts#2"].seen) == (4, 0)


def test_options_and_horizons_are_only_said(tmp_path):
    """With a warning that lists them; the run goes on with what is here."""

    def make(power, epochs):
        model = network()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        data = [(torch.ones(2, 3), torch.zeros(2, dtype=torch.long))] * 3
        phase = lt.train(model, data, classify) | lt.schedule_lr(sgd, lt.schedules.poly(power)) | lt.optimize(sgd)
        return lt.workflow([(phase, 1)], max_epochs=epochs)

    run = make(1.0, 2)
    next(run)
    run.save(tmp_path)

    with pytest.warns(UserWarning, match="resume: since the checkpoint was saved, this has changed") as told:
        make(2.0, 3).resume(tmp_path)
    (text,) = [str(warning.message) for warning in told]
    assert "train/schedule_lr: (optimizer=SGD, schedule=poly(" in text
    assert "max_epochs: 2 saved, 3 here" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(1.0, 2).resume(tmp_path)


def test_the_optimizers_own_options_are_the_saved_ones_and_that_is_said(tmp_path):
    """A changed weight decay or learning rate would be lost in silence."""

    def make(lr, decay):
        model = network()
        adam = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
        data = [(torch.ones(2, 3), torch.zeros(2, dtype=torch.long))] * 3
        phase = lt.train(model, data, classify) | lt.schedule_lr(adam, lt.schedules.cosine()) | lt.optimize(adam)
        return lt.workflow([(phase, 1)], max_epochs=2)

    run = make(0.1, 0.01)
    list(run.take(2))
    run.save(tmp_path)
    run = make(0.2, 0.5)

    with pytest.warns(UserWarning, match="since the checkpoint was saved") as told:
        run.resume(tmp_path)
    text = str(told[0].message)
    assert "optimizer: lr 0.1 saved, 0.2 here; the saved one holds, until you set it" in text
    assert "optimizer: weight_decay 0.01 saved, 0.5 here" in text
    assert run.optimizer.param_groups[0]["weight_decay"] == 0.01


def test_fewer_samples_in_larger_batches(tmp_path):
    """The place is translated before it is compared with what there is."""
    saved(tmp_path, iterations=5)  # 20 samples

    with pytest.raises(RuntimeError, match="2 batches of the pass of train were done, it has 2 here") as caught:
        training(samples=16, batch=8).resume(tmp_path, accept=["data", "batch_size"])
    assert "accept=" not in str(caught.value)


def test_parameters_in_another_order_are_found(tmp_path):
    """Their states would go to the wrong ones; of equal shapes nobody would notice."""

    def make(backwards):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        parameters = list(model.parameters())
        adam = torch.optim.Adam(parameters[::-1] if backwards else parameters)
        step = lambda model, batch: model(batch).sum()  # noqa: E731
        return lt.workflow([(lt.train(model, [torch.ones(1, 2)] * 2, step) | lt.optimize(adam), 1)], max_epochs=2)

    run = make(False)
    next(run)
    run.save(tmp_path)

    with pytest.raises(RuntimeError, match=r"or their order: saved model.0.weight, here model.1.bias"):
        make(True).resume(tmp_path)


def test_a_file_of_the_first_format_is_still_gone_on_from(tmp_path):
    """It has no fingerprint and no pass under way."""
    run = piped(Case(epochs=2))
    list(run.take(14))
    file = run.save(tmp_path)
    tree = torch.load(file, weights_only=True)
    new = ("pass", "fingerprint", "lookers", "options", "workflow", "bounds", "kinds", "parameters")
    old = {key: value for key, value in tree.items() if key not in new}
    torch.save({**old, "format": 1}, tmp_path / "old.pt")

    run = piped(Case(epochs=2))
    run.resume(tmp_path / "old.pt")
    run.to_end()

    assert_same(run.model.state_dict(), by_hand(Case(epochs=2)))


def test_a_process_that_was_never_seeded_has_no_seed(tmp_path, monkeypatch):
    """Torch draws one of its own then, another one each time; that is no difference."""
    monkeypatch.setattr(torch, "initial_seed", lambda: 2**40)
    run = training()
    next(run)
    run.save(tmp_path)
    monkeypatch.setattr(torch, "initial_seed", lambda: 2**41)

    assert training().resume(tmp_path) is not None
