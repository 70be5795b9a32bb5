"""With snapshots: what failed in the middle of a part that changes things is undone, exactly."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
import torch
from loops import Planted, assert_same, classify, loader, network
from torch import nn

import looptools as lt

Make = Callable[..., tuple[lt.Run, nn.Module]]


class Halfway(torch.optim.SGD):
    """Raises once, when the first two parameters have moved."""

    _at = -1

    def step(self, closure=None):
        self._at -= 1
        if self._at != 0:
            return super().step(closure)
        groups = self.param_groups[0]["params"]
        self.param_groups[0]["params"] = groups[:2]
        try:
            super().step()
        finally:
            self.param_groups[0]["params"] = groups
        raise Planted("in the middle of the update")


def build(snapshots: bool = True, at: int = -1, **options: Any) -> tuple[lt.Run, nn.Module]:
    torch.manual_seed(0)
    model = options.get("model") or network()
    optimizer = Halfway(model.parameters(), lr=0.05, momentum=0.9)
    optimizer._at = at
    train = lt.train(model, loader(), options.get("step", classify)) | lt.schedule_lr(optimizer, lt.schedules.cosine())
    for part in options.get("before", ()):
        train = train | part
    train = train | lt.optimize(optimizer, accumulate=options.get("accumulate", 1), max_norm=1.0)
    for part in options.get("behind", ()):
        train = train | part
    keep = lt.snapshots(every=4) if snapshots else None
    return lt.workflow(
        [(train, 1), (lt.validate(model, loader(shuffle=False), classify), 1)], max_epochs=2, snapshots=keep
    ), model


def whole(**options: Any) -> dict[str, Any]:
    run, model = build(False, **options)
    run.to_end()
    return dict(model.state_dict())


def fails(run: lt.Run) -> BaseException:
    with pytest.raises(Planted) as caught:
        run.to_end()
    return caught.value


def next_state(run: lt.Run) -> None:
    next(run)


GO_ON = [next_state, lt.Run.retry, lambda run: list(run.stages())]


@pytest.mark.parametrize("go_on", GO_ON)
@pytest.mark.parametrize("at", [1, 4, 7, 9])
def test_an_update_that_fails_half_way(go_on, at):
    """Weights and momentum are what they were at once, and the run ends as if nothing had been."""
    run, model = build(at=at)
    seen: list[dict[str, Any]] = [dict(model.state_dict())]
    with contextlib.suppress(Planted):
        for _ in run:
            seen.append({key: value.clone() for key, value in model.state_dict().items()})

    assert run.failed is not None
    assert_same(dict(model.state_dict()), seen[-1])
    assert "rolled back" in str(run.failed.exception.__notes__)
    go_on(run)
    run.to_end()
    assert_same(dict(model.state_dict()), whole())


@pytest.mark.parametrize("go_on", GO_ON)
def test_a_forward_that_fails_behind_its_batch_norm(go_on):
    """The statistics take the batch in once."""
    failing = iter([False] * 5 + [True] + [False] * 99)

    def step(model, batch):
        result = classify(model, batch)
        if model.training and next(failing):
            raise Planted
        return result

    run, model = build(step=step)
    fails(run)
    go_on(run)
    run.to_end()

    assert_same(dict(model.state_dict()), whole())


@pytest.mark.parametrize("go_on", GO_ON)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_backward_that_fails_half_way(go_on, accumulate):
    """The open window has each batch once."""
    run, model = build(accumulate=accumulate)
    list(run.take(4))
    count = iter(range(99))

    def raise_once(grad):
        if next(count) == 0:
            raise Planted

    handle = model[0].weight.register_hook(raise_once)  # the last gradient: all others are there already
    fails(run)
    handle.remove()
    go_on(run)
    run.to_end()

    assert_same(dict(model.state_dict()), whole(accumulate=accumulate))


@attrs.define
class moves:
    """A part of the user's own that moves weights and remembers, and fails once in the middle."""

    fails: Iterator[bool]
    seen: int = attrs.field(default=0, init=False)

    def __call__(self, states: Any) -> Iterator[lt.State]:
        for state in states:
            self.seen += 1
            with torch.no_grad():
                state.model[0].bias.add_(0.01)
                if next(self.fails):
                    raise Planted
                state.model[0].weight.mul_(0.99)
            yield state


@pytest.mark.parametrize("go_on", GO_ON)
def test_a_part_of_ones_own_that_moves_weights(go_on):
    """It is seen to have moved them, and undone with what it remembers."""
    run, model = build(before=[moves(iter([False] * 4 + [True] + [False] * 99))])
    fails(run)
    go_on(run)
    run.to_end()

    assert run["moves"].seen == 14
    assert_same(dict(model.state_dict()), whole(before=[moves(iter([False] * 99))]))


@pytest.mark.parametrize("where", ["before", "behind"])
def test_a_part_of_ones_own_that_only_looks_keeps_the_evidence(where):
    """Nothing was changed by it, so gradients and outputs stay to be looked at; next goes on at the part."""
    looks = iter([False] * 3 + [True] + [False] * 99)
    forwards: list[int] = []

    def step(model, batch, state):
        forwards.append(state.iteration)
        return classify(model, batch)

    def check(states):
        for state in states:
            if next(looks):
                raise Planted
            yield state

    run, model = build(step=step, **{where: [check]})
    fails(run)

    assert run.failed is not None
    assert run.failed.state.loss is not None
    assert "rolled back" not in str(run.failed.exception.__notes__)
    assert "run.retry() redoes the iteration" in run.failed.verbs
    assert model[0].weight.grad is not None
    next(run)
    assert forwards == [0, 1, 2, 3]
    run.to_end()
    assert_same(dict(model.state_dict()), whole())


@pytest.mark.parametrize("where", ["backward", "update", "average"])
def test_retry_at_any_part_of_an_open_iteration(where):
    """Also when the weights have moved, or the average has counted it."""
    run, model = build(accumulate=2)
    list(run.take(3))
    run.after(where)

    state = run.retry()

    assert state.iteration == 3
    run.to_end()
    assert_same(dict(model.state_dict()), whole(accumulate=2))
    assert run.results["train/loss"] == pytest.approx(build_results(accumulate=2), abs=0)


def build_results(**options: Any) -> float:
    run, _ = build(False, **options)
    return run.to_end()["train/loss"]


def test_retry_says_how_it_could_be_redone():
    """Without snapshots it cannot."""
    run, _ = build(False)
    run.after("update")

    with pytest.raises(RuntimeError, match=r"update has moved the weights\. .* snapshots=lt.snapshots\(\)"):
        run.retry()


@pytest.mark.parametrize("where", ["forward", "backward", "update"])
def test_skip_leaves_no_trace(where):
    """Weights, window, averages: as if the batch had never been."""
    run, model = build(accumulate=2)
    list(run.take(3))
    was = {key: value.clone() for key, value in model.state_dict().items()}
    filled = run["backward"].filled
    run.after(where)

    run.skip()

    assert_same(dict(model.state_dict()), was)
    assert run["backward"].filled == filled
    assert next(run).iteration == 4


def test_without_rollback_there_is_no_copy():
    """Snapshots alone: a failure half way is named, and replay is there to undo it."""
    run, model = build(at=6)
    run._snapshots = lt.snapshots(every=2, rollback=False)
    error = fails(run)

    assert "cannot be undone" in str(error.__notes__)
    assert run.snapshots.rollback_bytes == 0
    run.replay(5)
    run.to_end()
    assert_same(dict(model.state_dict()), whole())


def test_what_the_step_remembers_is_undone():
    """A hidden state that a module keeps as a plain attribute, and a list that a part fills."""

    class Carries(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.hidden = nn.Linear(3, 2), torch.zeros(2)

        def forward(self, x):
            out = self.layer(x) + self.hidden
            self.hidden = out.mean(0).detach()
            return out

    torch.manual_seed(0)
    run, model = build(at=4, model=Carries())
    fails(run)
    run.to_end()
    torch.manual_seed(0)
    want, other = build(model=Carries())
    want.to_end()

    assert torch.equal(model.hidden, other.hidden)
    assert_same(dict(model.state_dict()), dict(other.state_dict()))


def test_a_log_row_of_an_undone_iteration_is_written_once(tmp_path):
    """Files go back with the rest."""

    class Struck(BaseException):
        """As Ctrl-C twice."""

    strikes = iter([False] * 5 + [True] + [False] * 9)

    def raises_once(states):
        for state in states:
            if next(strikes):
                raise Struck
            yield state

    run, _ = build()
    run = run | lt.log(tmp_path, every=1, line=None, tensorboard=False) | raises_once
    with pytest.raises(Struck):
        run.to_end()
    list(run.take(2))
    run.close()

    rows = (tmp_path / "log.jsonl").read_text().splitlines()
    assert ['"kind": "pass"' in row for row in rows] == [False] * 7 + [True]
    assert [f'"iteration": {n},' in row for n, row in enumerate(rows[:7])] == [True] * 7


def test_loaders_that_draw_in_this_process():
    """A sample that raises once, behind random numbers that it has drawn, is drawn again."""

    class Noisy(torch.utils.data.Dataset):
        def __init__(self, at):
            self.at = at

        def __len__(self):
            return 24

        def __getitem__(self, index):
            noise = torch.randn(3)
            self.at -= 1
            if self.at == 0:
                raise Planted
            return noise, index % 2

    def train(at, snapshots):
        torch.manual_seed(0)
        model = network()
        source = torch.utils.data.DataLoader(Noisy(at), 4, shuffle=True)
        phase = lt.train(model, source, classify) | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1))
        return lt.workflow([(phase, 1)], max_epochs=2, snapshots=snapshots), model

    run, model = train(14, lt.snapshots())
    fails(run)
    run.to_end()
    want, other = train(-1, None)
    want.to_end()

    assert_same(dict(model.state_dict()), dict(other.state_dict()))
