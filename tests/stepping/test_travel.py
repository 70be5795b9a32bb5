"""Back and replay: what was is there again, to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from loops import Case, assert_same, classify, loader, network, piped
from torch import nn

import looptools as lt
from looptools.generators import get_generators

SNAPSHOTS = lt.snapshots(every=3, keep=4)


def built(snapshots: lt.snapshots | None = SNAPSHOTS, **options: Any) -> tuple[lt.Run, nn.Module]:
    """Dropout, BatchNorm, AdamW, a schedule, windows of two, validation."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train = lt.train(model, options.get("source") or loader(), options.get("step", classify))
    train = train | lt.schedule_lr(optimizer, lt.schedules.cosine(), warmup=3)
    train = train | lt.optimize(optimizer, max_norm=1.0, accumulate=2)
    val = lt.validate(model, loader(shuffle=False), classify)
    return lt.workflow([(train, 1), (val, 1)], max_epochs=3, snapshots=snapshots), model


def everything(run: lt.Run, model: nn.Module) -> dict[str, Any]:
    """Copies of weights, optimizer, results, generators, counters."""
    len(run)  # builds it
    found: dict[str, Any] = {f"model {k}": v.clone() for k, v in model.state_dict().items()}
    for key, state in run.optimizer.state_dict()["state"].items():
        found |= {f"optimizer {key} {name}": value.clone() for name, value in state.items()}
    found |= {f"result {key}": torch.tensor(value, dtype=torch.float64) for key, value in run.results.items()}
    generators = get_generators()
    found["torch"], found["numpy"] = generators["torch"], torch.tensor(generators["numpy"][1])
    progress = run.progress
    counts = [progress.epoch, progress.iteration, progress.round, progress.samples, *progress.updates.values()]
    found["progress"] = torch.tensor([*counts, len(run.history)])
    found["lr"] = torch.tensor([group["lr"] for group in run.optimizer.param_groups], dtype=torch.float64)
    return found


def states(run: lt.Run, n: int) -> list[tuple[Any, ...]]:
    return [(s.phase, s.epoch, s.iteration, s.index, float(s.metrics["loss"]), s.replayed) for s in run.take(n)]


@pytest.mark.parametrize("done", [1, 4, 7, 8, 12, 14, 15, 22, 30, 42])
def test_back_from_everywhere_and_forward_again(done):
    """At every distance that snapshots reach, what was there is there, and the same states come again."""
    plain, model = built(None)
    was, seen = [everything(plain, model)], []
    for _ in range(done):
        seen += states(plain, 1)
        was.append(everything(plain, model))
    run, mine = built()
    list(run.take(done))
    reach = run.snapshots.reach
    assert reach >= min(done, 9)

    for n in range(reach + 1):
        run.back(n)

        assert_same(everything(run, mine), was[done - n])
        assert states(run, n) == seen[done - n :]
        assert_same(everything(run, mine), was[done])


@pytest.mark.parametrize("iteration", [12, 13, 14, 15, 20])
def test_replay_stands_before_that_iteration(iteration):
    """Behind the validation, where one comes before it; going on, the run ends with the same bits."""
    whole, want = built(None)
    whole.to_end()
    run, model = built(lt.snapshots(every=3, keep=20))
    run.to_end()

    run.replay(iteration)

    state = next(run)
    assert (state.phase, state.iteration, state.replayed) == ("train", iteration, False)
    run.to_end()
    assert_same(dict(model.state_dict()), dict(want.state_dict()))


def test_back_drops_what_is_open():
    """Counted from the last complete iteration: an open one is undone in any case."""
    run, model = built()
    list(run.take(4))
    was = everything(run, model)
    run.after("backward")

    run.back(0)

    assert_same(everything(run, model), was)
    assert next(run).iteration == 4


@pytest.mark.parametrize(
    "case",
    [
        Case(optimizer="SGD", cosine=True, accumulate=3, across_epochs=True),
        Case(optimizer="AdamW", max_norm=0.5, length_known=False),
        Case(optimizer="AdamW", autocast=torch.bfloat16),
        Case(optimizer="SGD", workers=2),
    ],
)
def test_each_kind_of_pipe(case):
    """Windows across passes, unknown length, autocast, workers."""
    whole = piped(case)
    whole.to_end()
    run = piped(case)
    run._snapshots = SNAPSHOTS
    for n in (2, 5):
        list(run.take(6))
        run.back(n)

    run.to_end()
    run.back(3)
    run.to_end()

    assert_same(dict(run.model.state_dict()), dict(whole.model.state_dict()))
    assert run.results == whole.results


def test_ema_scaler_and_parts_of_ones_own():
    """Their memory goes back with the rest: an attrs class, a plain one, a step with a counter, a buffer made anew."""

    @attrs.define
    class counts:
        seen: int = attrs.field(default=0, init=False)

        def __call__(self, states):
            for state in states:
                self.seen += 1
                yield state

    class Plain:
        def __init__(self):
            self.losses = []

        def __call__(self, states):
            for state in states:
                self.losses.append(float(state.loss.detach()))
                yield state

    class Step:
        def __init__(self):
            self.calls = 0

        def __call__(self, model, batch):
            self.calls += 1
            return classify(model, batch)

    def make(snapshots):
        torch.manual_seed(0)
        model, step = network(), Step()
        averaged = torch.optim.swa_utils.AveragedModel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        phase = lt.train(model, loader(), step) | counts() | Plain() | lt.optimize(optimizer, scaler=scaler)
        run = lt.workflow([(phase | lt.ema(averaged), 1)], max_epochs=2, snapshots=snapshots)
        return run, averaged, step, scaler

    whole, want, *_ = make(None)
    whole.to_end()
    run, averaged, step, scaler = make(lt.snapshots(every=4))
    list(run.take(9))
    run.back(3)

    assert (run["counts"].seen, len(run["Plain"].losses), step.calls) == (6, 6, 6)
    assert scaler.get_scale() == 64.0 * 2**3
    run.to_end()
    assert_same(dict(averaged.state_dict()), dict(want.state_dict()))
    assert run["Plain"].losses == whole["Plain"].losses


def test_log_files_hold_each_row_once(tmp_path):
    """What was written of the undone iterations makes way for what comes now; nothing is written on the way back."""

    def rows(folder):
        found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if key != "seconds"} for row in found]

    lines: list[str] = []
    for name in ("whole", "back"):
        run, _ = built(lt.snapshots(every=4, keep=9) if name == "back" else None)
        run = run | lt.log(tmp_path / name, every=2, line=lines.append, tensorboard=False)
        list(run.take(17))
        if name == "back":
            count = len(lines)
            run.back(6)
            assert len(lines) == count
        run.to_end()

    assert rows(tmp_path / "back") == rows(tmp_path / "whole")


def test_checkpoints_go_on_counting(tmp_path):
    """What is saved after going back is the newest, and resumed to the same bits."""
    whole, want = built(None)
    whole.to_end()
    run, _ = built()
    run = run | lt.checkpoint(tmp_path, every=2, keep=None, best=lt.highest("val/accuracy"))
    list(run.take(8))
    run.back(3)
    list(run.take(2))
    run.close()

    again, model = built(None)
    again = again | lt.checkpoint(tmp_path, every=2, keep=None, best=lt.highest("val/accuracy"))
    file = again.resume()

    assert file is not None
    assert "iteration_000006" in file.name
    again.to_end()
    assert_same(dict(model.state_dict()), dict(want.state_dict()))


def test_the_past_stays_as_it_was_when_the_pipe_is_mended():
    """Between snapshots the old step is computed again, from there on the new one goes."""

    def double(model, batch):
        return 2 * classify(model, batch)["loss"]

    run, model = built(lt.snapshots(every=3, keep=9))
    was = []
    for _ in range(8):
        was.append(everything(run, model))
        next(run)
    run.replace("classify", double)
    list(run.take(2))

    run.back(6)

    assert_same(everything(run, model), was[4])
    assert run["train/forward"].step is double


def test_what_is_changed_by_hand_is_kept():
    """Weights and lr changed between two iterations, or within one, are not lost by computing again."""
    run, model = built(lt.snapshots(every=50, keep=9))
    list(run.take(2))
    with torch.no_grad():
        model[0].weight.mul_(2)
    list(run.take(2))
    run.optimizer.param_groups[0]["weight_decay"] = 0.5
    list(run.take(1))
    run.after("backward")
    model[0].weight.grad.mul_(3)
    next(run)
    list(run.take(2))
    was = everything(run, model)

    for n in (1, 2):  # beyond them lies the iteration that was changed half way, which comes again unchanged
        run.back(n)
        list(run.take(n))
        assert_same(everything(run, model), was)
    assert run.snapshots.iterations == [0, 2, 4, 6]


def test_random_numbers_drawn_in_between_are_drawn_again():
    """Those that the user's own loop has drawn are in the past, too."""
    run, model = built(lt.snapshots(every=50))
    was = []
    for _ in range(6):
        was.append(everything(run, model))
        next(run)
        torch.rand(3)

    run.back(2)

    assert torch.equal(everything(run, model)["model 0.weight"], was[4]["model 0.weight"])


def test_a_finished_run_can_go_back():
    """It goes on, and ends once more."""
    run, _ = built()
    run.to_end()
    assert run.ended

    run.back(2)

    assert not run.ended
    assert len(list(run.take(9))) == 2
    assert run.ended


def test_parts_that_drop_states():
    """Iterations are counted as next counts them."""

    def every_other(states):
        for state in states:
            if state.index % 2 == 0 or not state.trains:
                yield state

    run, model = built(lt.snapshots(every=3, keep=9))
    run._middlewares = (every_other,)
    was = []
    for _ in range(9):
        was.append(everything(run, model))
        next(run)

    for n in (1, 4, 7):
        run.back(n)
        assert_same(everything(run, model), was[9 - n])
        list(run.take(n))


def test_off_by_default():
    """Back says how to switch it on."""
    run, _ = built(None)
    next(run)

    with pytest.raises(RuntimeError, match=r"back: this run keeps no snapshots. .*snapshots=lt.snapshots\("):
        run.back(1)
    with pytest.raises(RuntimeError, match="replay: this run keeps no snapshots"):
        run.replay(0)
    assert run.snapshots is None


@pytest.mark.parametrize(
    ("go", "error", "match"),
    [
        (lambda run: run.back(20), LookupError, "back: 20 iterations are too many; the oldest snapshot is"),
        (lambda run: run.back(-1), ValueError, "back: n"),
        (lambda run: run.back(1.5), TypeError, "back: n"),
        (lambda run: run.replay(0), LookupError, "replay: iteration 0 is too far back; the oldest snapshot"),
        (lambda run: run.replay(900), LookupError, r"still to come; .* run.until\(iteration=900\)"),
    ],
)
def test_bad_requests_change_nothing(go: Callable[[lt.Run], Any], error, match):
    """Refused where they are typed."""
    run, model = built(lt.snapshots(every=2, keep=2))
    list(run.take(9))
    was = everything(run, model)

    with pytest.raises(error, match=match):
        go(run)

    assert_same(everything(run, model), was)


@pytest.mark.parametrize("options", [{"every": 0}, {"keep": 0}, {"keep": 1.5}, {"rollback": 2}])
def test_bad_options(options):
    """Refused where they are typed."""
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        lt.snapshots(**options)


@pytest.mark.parametrize("given", [50, True, lt.snapshots])
def test_workflow_wants_snapshots(given):
    """A number would be easy to type."""
    with pytest.raises(TypeError, match=r"workflow: snapshots must be lt.snapshots\(every=50, keep=4\)"):
        lt.workflow([(lt.train(nn.Linear(1, 1), [1], classify), 1)], max_epochs=1, snapshots=given)


def test_the_ring_is_bounded_and_shown():
    """Never more than keep=; the repr says where they are and how much they take."""
    run, _ = built(lt.snapshots(every=2, keep=3))
    sizes = []
    for _ in range(20):
        next(run)
        sizes.append(run.snapshots.bytes)

    assert len(run.snapshots) == 3
    assert max(sizes[6:]) <= 1.02 * sizes[6]
    assert repr(run.snapshots).startswith("<snapshots: 3 of at most 3, before iterations ")
    assert f"up to n = {run.snapshots.reach}>" in repr(run.snapshots)
