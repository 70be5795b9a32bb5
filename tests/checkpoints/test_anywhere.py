"""Saved at any iteration and resumed by new objects: the states that follow, and the weights, are the same bits."""

from __future__ import annotations

import attrs
import pytest
import torch
from loops import Case, assert_same, classify, loader, network, piped
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import looptools as lt


def plain(value):
    """Something that can be compared."""
    if isinstance(value, torch.Tensor):
        return value.detach().tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


TIMES = ("seconds", "data_time", "iter_time", "samples_per_s", "eta", "memory_mb")


def facts(state):
    """All that a state tells, but for the time."""
    names = ("phase", "epoch", "index", "iteration", "first", "last", "round_last", "lr", "num_samples", "updates")
    told = {name: getattr(state, name) for name in names}
    values = {"loss": state.loss, "norm": state.grad_norm, "metrics": dict(state.metrics), "gauges": dict(state.gauges)}
    values = plain(values)
    for group in ("metrics", "gauges"):
        values[group] = {key: value for key, value in values[group].items() if key not in TIMES}
    return {**told, **values, "batch": plain(state.batch)}


def without_time(rows):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def check_resumes_anywhere(make, folder, positions=None):
    """*make* gives a run; it is saved after each of *positions* iterations, and resumed in a new one each time."""
    straight = make()
    states = [facts(state) for state in straight]
    files = {}
    first = make()
    for number in range(len(states) + 1):
        if positions is None or number in positions:
            files[number] = first.save(folder / str(number))
        if number < len(states):
            assert facts(next(first)) == states[number]  # saving changes nothing
    for number, file in files.items():
        run = make()
        torch.rand(7)  # the generators stand elsewhere
        assert run.resume(file.parent) == file
        assert [facts(state) for state in iter(run.__next__, None)] == states[number:] if number < len(states) else True
        run.to_end()
        assert_same(run.model.state_dict(), straight.model.state_dict())
        assert without_time(run.history) == without_time(straight.history), number
        assert {k: v for k, v in run.results.items() if k.partition("/")[2] not in TIMES} == {
            k: v for k, v in straight.results.items() if k.partition("/")[2] not in TIMES
        }


@pytest.mark.parametrize(
    "case",
    [
        Case(optimizer="AdamW", max_norm=0.5, accumulate=3, cosine=True),
        Case(accumulate=4, across_epochs=True, cosine=True, epochs=3),
        Case(optimizer="Adam", length_known=False, accumulate=2),
        Case(autocast=torch.bfloat16, max_value=0.1),
    ],
    ids=["hard", "across-epochs", "unknown-length", "bf16"],
)
def test_at_every_iteration(tmp_path, case):
    """Inside an epoch, in an accumulation window, at the last batch, in the middle of validation, at the very end."""
    check_resumes_anywhere(lambda: piped(case), tmp_path)


def test_with_workers(tmp_path):
    """The order comes back; tensors in a TensorDataset are no random transforms."""
    check_resumes_anywhere(lambda: piped(Case(workers=2)), tmp_path, positions={3, 7, 10, 14})


def test_the_training_source_in_mid_walk(tmp_path):
    """With entries of lt.iterations(5) passes begin and end within the loader's walk."""

    def make():
        model, optimizer, train, val = Case(cosine=True).make()
        phase = lt.train(model, train, classify) | lt.schedule_lr(optimizer, lt.schedules.poly())
        phase = phase | lt.optimize(optimizer, accumulate=2)
        return lt.workflow([(phase, lt.iterations(5)), (lt.validate(model, val, classify), 1)], max_iterations=13)

    check_resumes_anywhere(make, tmp_path)


@attrs.define(eq=False)
class every_other:
    """A part of one's own with memory, which drops every third state."""

    seen: int = attrs.field(default=0, init=False)

    def __call__(self, states):
        for state in states:
            self.seen += 1
            if self.seen % 3:
                yield state


def test_with_parts_of_all_kinds(tmp_path):
    """EMA, measure, freeze, a scaler, a window's average, early_stop, plateau, a part that drops states."""

    def make():
        torch.manual_seed(0)
        model = network()
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
        spread = lambda logits: logits.std()  # noqa: E731
        step = lambda model, batch: {**classify(model, batch), "logits": model(batch[0])}  # noqa: E731
        train = (
            lt.train(model, loader(), step)
            | every_other()
            | lt.freeze("0", until=lt.iterations(4))
            | lt.schedule_lr(optimizer, lt.schedules.plateau(lt.lowest("val/loss"), patience=0))
            | lt.optimize(optimizer, scaler=scaler, accumulate=2, max_norm=0.1)
            | lt.ema(averaged)
            | lt.measure({"spread": spread}, lambda state: state.outputs["logits"])
            | lt.average(window=3)
        )
        val = lt.validate(averaged, loader(shuffle=False), step)
        val = val | lt.measure({"spread": spread}, lambda state: state.outputs["logits"])
        run = lt.workflow([(train, 1), (val, 1)], max_epochs=3) | lt.early_stop(lt.lowest("val/loss"), patience=2)
        return run | lt.timer()

    check_resumes_anywhere(make, tmp_path, positions={1, 2, 3, 4, 6, 8, 11, 12, 15, 19, 23, 28, 30})


def test_a_gan(tmp_path):
    """Two optimizers, two forwards in one iteration, windows of different lengths."""

    def make():
        torch.manual_seed(0)
        gan = nn.ModuleDict({"g": nn.Linear(2, 3), "d": nn.Linear(3, 1)})
        opt_d, opt_g = (torch.optim.Adam(gan[name].parameters(), lr=0.01) for name in "dg")
        fake = lambda gan, batch: gan["g"](torch.randn(len(batch[0]), 2))  # noqa: E731
        d_step = lambda gan, b: {"loss": gan["d"](fake(gan, b).detach()).mean() - gan["d"](b[0]).mean()}  # noqa: E731
        g_step = lambda gan, b: {"loss": -gan["d"](fake(gan, b)).mean()}  # noqa: E731
        train = lt.train(gan, loader(), d_step) | lt.optimize(opt_d, name="D", accumulate=2)
        train = train | lt.forward(g_step) | lt.optimize(opt_g, name="G", accumulate=3)
        return lt.workflow([(train, 1)], max_epochs=2)

    check_resumes_anywhere(make, tmp_path)


def test_torchs_scheduler_and_lbfgs(tmp_path):
    """What torch holds comes back with its own state_dict."""

    def make():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        train = lt.train(model, loader(), classify) | lt.schedule_lr(optimizer, scheduler) | lt.optimize(optimizer)
        return lt.workflow([(train, 1)], max_epochs=2)

    check_resumes_anywhere(make, tmp_path)


def test_a_run_scope_part_and_a_predicate(tmp_path):
    """Parts of the run go on as well, and what is due every so many samples is due where it was."""

    def make():
        run = piped(Case(optimizer="AdamW")) | every_other()
        return run | lt.stop_after(lt.samples(45))

    check_resumes_anywhere(make, tmp_path)


def test_the_checkpoint_part_saves_every_so_many_iterations(tmp_path):
    """With a log beside it, whose file is that of the uninterrupted run, but for the time."""
    import json

    def make(folder):
        case = Case(optimizer="AdamW", accumulate=2)
        return piped(case) | lt.log(folder, every=2, line=None) | lt.checkpoint(folder, every=3)

    def rows(folder):
        lines = (folder / "log.jsonl").read_text().splitlines()
        return without_time(json.loads(line) for line in lines)

    straight = make(tmp_path / "straight")
    straight.to_end()
    for stop in range(3, 29):
        folder = tmp_path / str(stop)
        first = make(folder)
        list(first.take(stop))
        first.close()
        run = make(folder)
        run.resume()
        run.to_end()
        assert_same(run.model.state_dict(), straight.model.state_dict())
        assert rows(folder) == rows(tmp_path / "straight"), stop
