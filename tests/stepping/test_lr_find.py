"""Learning rates tried out, and everything put back."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

import pytest
import torch
from loops import assert_same, classify, network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import looptools as lt


class TriesOut:
    """A run of dropout, BatchNorm, Adam, a shuffling loader with its own generator, and a schedule."""

    def __init__(self, accumulate: int = 1, scaler: bool = False, workers: int = 0) -> None:
        torch.manual_seed(0)
        self.generator = torch.Generator().manual_seed(5)
        images, labels = torch.randn(26, 3), torch.randint(0, 2, (26,))
        data, options = TensorDataset(images, labels), {"num_workers": workers, "persistent_workers": workers > 0}
        loader: Any = DataLoader(data, 4, shuffle=True, generator=self.generator, **options)
        self.model = network()
        self.adam = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3) if scaler else None
        train = (
            lt.train(self.model, loader, classify)
            | lt.schedule_lr(self.adam, lt.schedules.cosine(), warmup=3)
            | lt.optimize(self.adam, max_norm=1.0, accumulate=accumulate, scaler=self.scaler)
        )
        self.run = lt.workflow([(train, 1), (lt.validate(self.model, loader, classify), 1)], max_epochs=2)

    def facts(self) -> dict[str, Any]:
        """Everything that the next iteration depends on, in tensors and plain values."""
        tensors = dict(self.model.state_dict())
        tensors |= {f"grad {n}": p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        tensors |= {f"adam {n} {k}": v for n, kept in self.adam.state_dict()["state"].items() for k, v in kept.items()}
        tensors |= {"generator": self.generator.get_state(), "torch": torch.get_rng_state()}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.adam.param_groups]
        scale = None if self.scaler is None else self.scaler.state_dict()
        flags = [module.training for module in self.model.modules()]
        progress = {k: v for k, v in vars_of(self.run.progress).items() if k not in ("seconds", "updates")}
        plain = [groups, scale, flags, progress, list(self.run.progress.updates.values())]
        return {"tensors": {key: value.clone() for key, value in tensors.items()}, "plain": plain}


def vars_of(progress: lt.Progress) -> dict[str, Any]:
    return {name: getattr(progress, name) for name in ("epoch", "iteration", "round", "samples", "seconds", "updates")}


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"scaler": True}], ids=str)
@pytest.mark.parametrize("done", [0, 3, 7, 10, 15])
def test_the_run_is_left_as_it_was(done, options):
    """Before the run, within a pass, a window or a validation: all comes back, and the end is the same to the bit."""
    tried, other = TriesOut(**options), TriesOut(**options)
    torch.manual_seed(1)
    list(other.run.take(done))
    rng = torch.get_rng_state()
    other.run.to_end()
    torch.manual_seed(1)
    list(tried.run.take(done))
    before = tried.facts()

    found = lt.lr_find(tried.run, iterations=25)

    after = tried.facts()
    assert_same(after["tensors"], before["tensors"])
    assert after["plain"] == before["plain"]
    assert torch.equal(torch.get_rng_state(), rng)
    assert len(found.losses) > 10
    tried.run.to_end()
    assert_same(tried.facts()["tensors"], other.facts()["tensors"])
    assert tried.run.results == other.run.results


@pytest.mark.skipif(sys.platform == "win32", reason="spawned workers would import this module")
@pytest.mark.parametrize("done", [3, 10, 17])
def test_workers_that_the_loader_keeps_are_kept(done):
    """The pass that is under way goes on with the workers it has, in the order that it has."""
    tried, other = TriesOut(workers=1), TriesOut(workers=1)
    torch.manual_seed(1)
    other.run.to_end()
    torch.manual_seed(1)
    list(tried.run.take(done))
    generator = tried.facts()["tensors"]["generator"]

    lt.lr_find(tried.run, iterations=10)

    assert torch.equal(tried.generator.get_state(), generator)
    tried.run.to_end()
    assert_same(tried.facts()["tensors"], other.facts()["tensors"])


def test_losses_are_those_of_a_loop_by_hand():
    """Each iteration has a larger learning rate; groups keep their ratio."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    batches = [torch.randn(4, 2) for _ in range(3)]
    groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.02}]
    sgd = torch.optim.SGD(groups)
    step = lambda model, batch: (model(batch) - 1).pow(2).mean()  # noqa: E731
    run = lt.workflow([(lt.train(model, batches, step) | lt.optimize(sgd), 1)], max_epochs=1)

    found = lt.lr_find(run, low=1e-3, high=1e-1, iterations=11, stop_at=math.inf)

    expected = []
    for n in range(11):
        sgd.param_groups[0]["lr"] = 1e-3 * 100 ** (n / 10)
        sgd.param_groups[1]["lr"] = 1e-3 * 100 ** (n / 10) / 5
        loss = step(model, batches[n % 3])
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        expected.append(loss.item())
    assert found.losses == expected
    assert found.lrs == pytest.approx([1e-3 * 100 ** (n / 10) for n in range(11)])


@pytest.fixture
def run():
    """Minimizes (w - 1)²: gradient descent diverges from a learning rate of 1 on."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1, bias=False)
    train = lt.train(model, [torch.ones(4, 1)] * 3, lambda model, batch: (model(batch) - 1).pow(2).mean())
    return lt.workflow([(train | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1)), 1)], max_epochs=1)


def test_suggestion_lies_where_the_loss_falls(run):
    """Below the learning rate from which the loss rises, and above those at which nothing happens."""
    found = lt.lr_find(run)

    assert 1e-3 < found.suggestion < 0.5
    assert found.diverged
    assert len(found.losses) < 100
    assert found.lrs[-1] < 10
    assert repr(found).startswith(f"lr_find: suggestion {found.suggestion:.3g}, where the loss falls most steeply (")
    assert f'optimizer.param_groups[0]["lr"] = {found.suggestion:.3g}' in repr(found)


def test_without_a_descent_there_is_no_suggestion(run):
    """Learning rates too small to matter are answered with what to do."""
    found = lt.lr_find(run, high=1e-6, iterations=20)

    assert found.suggestion is None
    assert repr(found).startswith("lr_find: no suggestion: the loss hardly fell, for all its noise; try other")


def test_a_loss_that_is_not_finite_ends_the_sweep(model, sgd, batches):
    """It moves nothing and meets no other part, so that a guard behind it keeps still."""
    seen = []

    def guard(states):
        for state in states:
            seen.append(state.loss.isfinite())
            yield state

    broken = iter(range(100))
    step = lambda model, batch: model(batch) * (math.nan if next(broken) == 4 else 1)  # noqa: E731
    run = lt.workflow([(lt.train(model, batches, step) | guard | lt.optimize(sgd), 1)], max_epochs=1)

    found = lt.lr_find(run)

    assert len(found.losses) == 5
    assert len(found.smoothed) == 4
    assert all(seen)
    assert found.reason == "the loss was not finite after 4 iterations; try a lower low="
    assert model.w == 3


def test_still_falling_at_the_end_is_said(run):
    """The steepest place may lie behind *high*."""
    found = lt.lr_find(run, high=0.05)

    assert found.suggestion is not None
    assert "Mind: the loss was still falling where the sweep ended; try a higher high=." in repr(found)


def test_only_the_parts_that_train_take_part(model, sgd, batches, capsys):
    """Schedules, run-scope parts and what reports are left out; a phase may be given as it is."""
    seen = []

    def note(states):
        for state in states:
            seen.append(sgd.param_groups[0]["lr"])
            yield state

    train = lt.train(model, batches, lambda model, batch: model(batch)) | note
    train = train | lt.schedule_lr(sgd, lt.schedules.cosine()) | lt.optimize(sgd)
    run = lt.workflow([(train, 1)], max_epochs=1) | lt.log(every=1)

    found = lt.lr_find(train, low=0.001, high=0.1, iterations=10)
    lt.lr_find(run, low=0.001, high=0.1, iterations=10)

    assert seen == [*found.lrs] * 2
    assert capsys.readouterr().out == ""
    assert (run | note) is not run  # it is not built by this


def test_a_gan_is_asked_which_optimizer():
    """The sweep stands before the parts of the optimizer it belongs to, and watches the loss that these get."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"D": nn.Linear(1, 1), "G": nn.Linear(1, 1)})
    d, g = (torch.optim.SGD(model[name].parameters(), lr=0.01) for name in "DG")
    batches = [torch.ones(2, 1)]
    train = (
        lt.train(model, batches, lambda model, batch: model["D"](batch).pow(2).mean())
        | lt.optimize(d, name="D")
        | lt.forward(lambda model, batch: 100 + model["G"](batch).pow(2).mean())
        | lt.optimize(g, name="G")
    )
    run = lt.workflow([(train, 1)], max_epochs=1)

    with pytest.raises(ValueError, match=r"the run has 2 optimizers \(SGD, SGD\). Say whose"):
        lt.lr_find(run)
    assert lt.lr_find(run, g, iterations=10).losses[0] > 100
    assert lt.lr_find(run, d, iterations=10).losses[0] < 100
    assert [o.param_groups[0]["lr"] for o in (d, g)] == [0.01, 0.01]


def test_an_optimizer_that_no_part_holds_is_put_back_too(model, batches):
    """Where a part of the user's own moves the weights, it is named."""
    adam = torch.optim.Adam(model.parameters(), lr=0.1)

    def own(states):
        for state in states:
            adam.zero_grad()
            state.loss.backward()
            adam.step()
            yield state

    run = lt.workflow([(lt.train(model, batches, lambda model, batch: model(batch)) | own, 1)], max_epochs=1)

    with pytest.raises(ValueError, match="no part moves the weights. Say whose learning rate to try"):
        lt.lr_find(run)
    assert lt.lr_find(run, adam, iterations=10).lrs[0] == 1e-7
    assert adam.state_dict()["state"] == {}
    assert adam.param_groups[0]["lr"] == 0.1
    assert model.w == 3


def test_an_exception_in_the_step_puts_everything_back(model, sgd, batches):
    """What the user's code raises comes through; the weights are what they were."""
    broken = iter([1, 1, 0])
    step = lambda model, batch: model(batch) / next(broken) if next(broken) else 1 / 0  # noqa: E731
    run = lt.workflow([(lt.train(model, batches, step) | lt.optimize(sgd), 1)], max_epochs=1)

    with pytest.raises(ZeroDivisionError):
        lt.lr_find(run, low=1.0)

    assert model.w == 3
    assert model.w.grad is None
    assert sgd.param_groups[0]["lr"] == 1.0


def test_with_an_iteration_open_it_is_refused(run):
    """The batch that is open would be lost."""
    run.after("backward")

    with pytest.raises(RuntimeError, match=r"lr_find: an iteration is open. Finish it first: next\(run\)."):
        lt.lr_find(run)
    next(run)
    lt.lr_find(run, iterations=10)


def test_buffers_that_a_layer_assigns_anew_come_back(batches):
    """Not every layer writes into its buffer."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(3.0))
            self.register_buffer("n", torch.tensor(0))

        def forward(self, batch):
            self.n = self.n + 1
            return self.w * batch.mean()

    model = Counts()
    train = lt.train(model, batches, lambda model, batch: model(batch))
    run = lt.workflow([(train | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1)), 1)], max_epochs=1)

    lt.lr_find(run, iterations=10)

    assert model.n == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0.0}, "low must be above 0 and below high, got low=0.0, high=10.0"),
        ({"low": 1.0, "high": 0.1}, "low must be above 0 and below high, got low=1.0, high=0.1"),
        ({"iterations": 5}, "iterations must be at least 10, got 5"),
        ({"smooth": 1.0}, "smooth must be from 0"),
        ({"stop_at": 1.0}, "stop_at must be above 1, got 1.0"),
    ],
)
def test_bad_options_are_refused(run, options, message):
    """Before anything is computed."""
    with pytest.raises(ValueError, match=f"^lr_find: {message}"):
        lt.lr_find(run, **options)


def test_sources_and_runs_that_cannot_be_tried(model, sgd, batches):
    """A one-shot source would be used up; a run without training has nothing to try."""
    step = lambda model, batch: model(batch)  # noqa: E731
    with pytest.raises(RuntimeError, match="lr_find: the source of train can be walked through only once; lr_find"):
        lt.lr_find(lt.train(model, iter(batches), step) | lt.optimize(sgd))
    with pytest.raises(ValueError, match="lr_find: the run has no training phase"):
        lt.lr_find(lt.validate(model, batches, step))
    with pytest.raises(TypeError, match="lr_find: give a run or a training phase, got Linear"):
        lt.lr_find(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="lr_find: optimizer must be a torch.optim.Optimizer"):
        lt.lr_find(lt.train(model, batches, step) | lt.optimize(sgd), 0.1)


def test_plot_is_a_figure(run, tmp_path):
    """It is drawn without pyplot, and saved where asked."""
    found = lt.lr_find(run)
    figure = found.plot(tmp_path / "new" / "lr.png")

    assert (tmp_path / "new" / "lr.png").read_bytes().startswith(b"\x89PNG")
    assert figure.axes[0].get_xscale() == "log"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert figure._repr_png_().startswith(b"\x89PNG")


def test_groups_keep_the_ratio_of_their_bases_within_a_schedule():
    """In mid-run the learning rates in force may stand in another ratio: one group's schedule has come to 0."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.02}]
    sgd = torch.optim.SGD(groups)
    seen = []

    def note(states):
        for state in states:
            seen.append([group["lr"] for group in sgd.param_groups])
            yield state

    step = lambda model, batch: (model(batch) - 1).pow(2).mean()  # noqa: E731
    train = lt.train(model, [torch.randn(4, 2)] * 4, step)
    train = train | lt.schedule_lr(sgd, [lt.schedules.cosine(), lt.schedules.constant()]) | note | lt.optimize(sgd)
    run = lt.workflow([(train, 1)], max_epochs=1)
    list(run.take(3))
    assert seen[-1][1] / seen[-1][0] == pytest.approx(0.2 / 0.5)
    seen.clear()

    found = lt.lr_find(run, low=1e-3, high=1e-1, iterations=10)

    assert seen == [[lr, pytest.approx(lr / 5)] for lr in found.lrs]


def test_what_was_replaced_is_swept(model, sgd, batches):
    """The mended step's loss, and the memory of the part that took another one's place."""
    train = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)
    run = lt.workflow([(train, 1)], max_epochs=2)
    next(run)

    run.replace("train/forward", lambda model, batch: 100 + model(batch))

    assert lt.lr_find(run, iterations=10).losses[0] > 90
