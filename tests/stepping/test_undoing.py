"""What a planted fault has shown to need a test of its own: each is about one thing that must come back, or be kept."""

from __future__ import annotations

import contextlib
import json
import random
import signal
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from loops import Planted, assert_same, classify, loader, network
from test_rollback import Halfway, build, fails, whole
from test_travel import built, everything
from torch import nn

import looptools as lt


def swaps(run: lt.Run, model: nn.Module) -> None:
    run.replace("clip_grad_norm", lt.clip_grad_norm(model.parameters(), 0.01))


def changes_a_buffer(run: lt.Run, model: nn.Module) -> None:
    model[1].running_mean.add_(1.0)  # type: ignore[index, operator, union-attr]


def draws_within(run: lt.Run, model: nn.Module) -> None:
    run.after("batches")
    torch.rand(3)


def skips(run: lt.Run, model: nn.Module) -> None:
    run.after("backward")
    run.skip()


@pytest.mark.parametrize("change", [swaps, changes_a_buffer, draws_within, skips])
def test_what_cannot_be_computed_again_is_not_computed_through(change: Callable[..., None]):
    """Behind it there is one more snapshot, so going back to behind it and forward again gives the same."""
    run, model = built(lt.snapshots(every=50, keep=9))
    list(run.take(3))
    change(run, model)
    list(run.take(3))
    was = everything(run, model)

    run.back(2)
    list(run.take(2))

    assert_same(everything(run, model), was)


def test_looking_takes_no_snapshots():
    """Stepping through iterations without changing anything does not use the ring up."""
    run, _ = built(lt.snapshots(every=50, keep=2))
    next(run)
    for _ in range(3):
        list(run.stages())
        run.trace()
        run.after("backward")
        next(run)

    assert run.snapshots.iterations == [0]


def test_gradients_of_the_future_are_gone():
    """Also where the run goes back to a snapshot itself."""
    run, model = built(lt.snapshots(every=4, keep=9))
    list(run.take(6))

    run.back(2)

    assert all(parameter.grad is None for parameter in model.parameters())


def test_stages_hear_ctrl_c_at_the_boundary(model, sgd, batches):
    """The iteration is complete then."""
    presses = iter([True, False, False])

    def press(states):
        for state in states:
            if next(presses):
                signal.raise_signal(signal.SIGINT)
            yield state

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    train = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)
    run = lt.workflow([(train, 1)], max_epochs=1) | press
    try:
        with pytest.raises(KeyboardInterrupt):
            list(run.stages())
        assert run.progress.iteration == 1
    finally:
        run.close()
        signal.signal(signal.SIGINT, before)


def test_a_retry_forgets_gauges(model, sgd, batches):
    """What parts wrote on the state is not there when they see it again."""
    seen = []

    def gauges(states):
        for state in states:
            seen.append(dict(state.gauges))
            state.gauges["own"] = 1.0
            yield state

    train = lt.train(model, batches, lambda model, batch: model(batch)) | gauges | lt.optimize(sgd)
    run = lt.workflow([(train, 1)], max_epochs=1)
    run.after("gauges")
    run.retry()

    assert seen == [{}, {}]


ONCE = [False] * 3 + [True] + [False] * 99  # in the fourth iteration, whose update fails half way


def test_a_stop_is_undone():
    """It was asked for in the iteration that is rolled back."""
    calls = iter(ONCE)

    def stops(states):
        for state in states:
            if next(calls):
                state.stop("enough")
            yield state

    run, _ = build(at=4, before=[stops])
    fails(run)
    run.to_end()

    assert run.ended.startswith("finished")


def freezes(model: nn.Module) -> None:
    model[0].weight.requires_grad_(False)  # type: ignore[index, operator, union-attr]


def switches(model: nn.Module) -> None:
    model[1].eval()  # type: ignore[index, operator]


@pytest.mark.parametrize("change", [freezes, switches])
def test_flags_are_undone(change: Callable[[nn.Module], None]):
    """What a step has frozen or switched in the iteration that is rolled back."""
    calls = iter(ONCE)

    def step(model, batch):
        if model.training and next(calls):
            change(model)
        return classify(model, batch)

    run, model = build(at=4, step=step)
    fails(run)

    assert model[0].weight.requires_grad
    assert model[1].training
    run.to_end()
    assert_same(dict(model.state_dict()), whole())


@attrs.define(eq=False)
class noise:
    """Draws from a generator that it keeps to itself."""

    _generator: torch.Generator = attrs.field(factory=lambda: torch.Generator().manual_seed(1), init=False)

    def __call__(self, states):
        for state in states:
            if state.trains:
                state.model[0].weight.grad.add_(torch.randn((), generator=self._generator))
            yield state


def test_a_generator_of_a_part_goes_back():
    """Whatever the field's name."""
    ends = []
    for at in (4, -1):
        run, model = build(at=at)
        run.insert(noise(), before="clip_grad_norm")
        with contextlib.suppress(Planted):
            run.to_end()
        run.to_end()
        ends.append(dict(model.state_dict()))

    assert_same(*ends)


def test_a_pass_is_counted_once_however_often_it_is_ended():
    """Ctrl-C may strike in the middle of the counting, which is done once more then."""
    run, _ = built(None)
    while not (state := run.after("average")).last:
        pass

    run.cursor.passes.end(state)
    run.cursor.passes.end(state)

    assert (run.cursor.passes.place.done, run.progress.epoch) == (1, 1)


def test_a_pass_that_cannot_be_set_out_on_draws_its_order_once():
    """A part that fails in on_pass: the next try has the same batches."""

    @attrs.define(eq=False)
    class begins:
        left: int = attrs.field(default=1, init=False)

        def on_pass(self, run):
            self.left -= 1
            if self.left == 0:
                raise Planted

        def __call__(self, states):
            for state in states:
                yield state

    ends = []
    for parts in ([begins()], []):
        torch.manual_seed(0)
        model = network()
        train = lt.train(model, loader(), classify) | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1))
        for part in parts:
            train = train | part
        run = lt.workflow([(train, 1)], max_epochs=2)
        with contextlib.suppress(Planted):
            next(run)
        run.to_end()
        ends.append(dict(model.state_dict()))

    assert_same(*ends)


def test_a_run_that_is_over_sets_no_handler(model, sgd, batches):
    """Nobody would put the one before back."""
    train = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)
    run = lt.workflow([(train, 1)], max_epochs=1)
    run.to_end()

    def own(number: int, frame: Any) -> None:
        """The user's."""

    before = signal.signal(signal.SIGINT, own)
    try:
        assert next(run, None) is None
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_reopened_run_logs_each_row_once(tmp_path):
    """The file goes on where it stood before the iteration that crashed."""

    def make(at):
        torch.manual_seed(0)
        model = network()

        def breaks(states):
            for state in states:
                if state.iteration == at:
                    raise Planted
                yield state

        train = lt.train(model, loader(), classify) | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1))
        run = lt.workflow([(train, 1)], max_epochs=1) | lt.log(tmp_path / "log", every=1, line=None, tensorboard=False)
        return run | breaks | lt.flight_recorder(tmp_path / "crash")

    first = make(3)
    fails(first)
    first.close()
    run = lt.reopen(tmp_path / "crash", make(-1))
    run.to_end()
    run.close()

    rows = map(json.loads, (tmp_path / "log" / "log.jsonl").read_text().splitlines())
    assert [row["iteration"] for row in rows if row["kind"] == "iterations"] == list(range(7))


def test_a_removed_freeze_gives_its_flags_back():
    """Nobody else would."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    train = lt.train(model, loader(), classify) | lt.freeze("0")
    run = lt.workflow([(train | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1)), 1)], max_epochs=1)
    next(run)
    assert not model[0].weight.requires_grad

    run.remove("freeze")

    assert model[0].weight.requires_grad


def test_a_look_ahead_is_undone():
    """The batch after the next one was drawn from the source's own generator."""

    class Stream(torch.utils.data.IterableDataset):
        def __init__(self):
            self.generator = torch.Generator().manual_seed(3)

        def __iter__(self):
            for n in range(6):
                yield torch.randn(3, generator=self.generator), n % 2

    def peeks(states):
        for state in states:
            assert state.last in (True, False)
            yield state

    ends = []
    for at in (1, -1):
        torch.manual_seed(0)
        model = network()
        optimizer = Halfway(model.parameters(), lr=0.05, momentum=0.9)
        optimizer._at = at
        train = lt.train(model, torch.utils.data.DataLoader(Stream(), 2), classify) | peeks | lt.optimize(optimizer)
        run = lt.workflow([(train, 1)], max_epochs=2, snapshots=lt.snapshots())
        with contextlib.suppress(Planted):
            run.to_end()
        run.to_end()
        ends.append(dict(model.state_dict()))

    assert_same(*ends)


def test_a_scaler_forgets_what_was_unscaled():
    """Between backward and update of the iteration that back drops."""
    ends = []
    for goes_back in (True, False):
        torch.manual_seed(0)
        model = network()
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train = lt.train(model, loader(), classify) | lt.optimize(optimizer, scaler=scaler, max_norm=1.0)
        run = lt.workflow([(train, 1)], max_epochs=2, snapshots=lt.snapshots())
        if goes_back:
            list(run.take(3))
            run.after("clip_grad_norm")
            run.back(1)
        run.to_end()
        ends.append(dict(model.state_dict()))

    assert_same(*ends)


# What an exactness review has found


def test_a_step_that_draws_and_fails_is_undone():
    """Python's generator, a counter of the step; the model has no buffers."""

    class Step:
        def __init__(self):
            self.calls = 0

        def __call__(self, model, batch):
            self.calls += 1
            scale = random.random()
            if next(fails_now):
                raise Planted
            return model(batch[0]).square().mean() * scale

    ends = []
    for at in (3, 99):
        fails_now = iter([False] * at + [True] + [False] * 99)
        torch.manual_seed(0)
        random.seed(0)
        model, step = nn.Linear(3, 1), Step()
        train = lt.train(model, loader(), step) | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1))
        run = lt.workflow([(train, 1)], max_epochs=1, snapshots=lt.snapshots())
        with contextlib.suppress(Planted):
            run.to_end()
        run.to_end()
        ends.append({**model.state_dict(), "calls": torch.tensor(step.calls)})

    assert_same(*ends)


def test_an_iterator_that_gives_batches_once(model, sgd):
    """A retry loses none of them; back says that it cannot."""
    calls = iter([False] * 2 + [True] + [False] * 9)
    seen = []

    def fails_behind(states):
        for state in states:
            if next(calls):
                raise Planted
            seen.append(int(state.batch))
            yield state

    train = lt.train(model, iter([torch.tensor(float(n)) for n in range(6)]), lambda model, batch: model(batch))
    run = lt.workflow([(train | lt.optimize(sgd), 1)], max_epochs=1, snapshots=lt.snapshots()) | fails_behind
    with pytest.raises(Planted):
        run.to_end()
    run.retry()
    with pytest.raises(RuntimeError, match="back: the source of train is a list_iterator, whose batches come once"):
        run.back(1)
    run.to_end()

    assert seen == [0, 1, 2, 3, 4, 5]


def test_going_back_that_is_interrupted_leaves_nothing_half_done():
    """The run stands at the snapshot, and goes on to the same bits."""
    calls = iter([False] * 8 + [True] + [False] * 99)

    class Struck(BaseException):
        """As Ctrl-C, in the middle of the second time."""

    def step(model, batch):
        result = classify(model, batch)
        if model.training and next(calls):
            raise Struck
        return result

    run, model = built(lt.snapshots(every=50), step=step)
    list(run.take(6))
    with pytest.raises(Struck):
        run.back(1)

    assert run.progress.iteration == 0
    run.to_end()
    other, want = built(None)
    other.to_end()
    assert_same(dict(model.state_dict()), dict(want.state_dict()))


class Odd(nn.Module):
    """Keeps things aside: a list, a tensor, a buffer that is made late, and one that is expanded."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.losses, self.last = [], torch.zeros(2)
        self.register_buffer("late", None)
        self.register_buffer("wide", torch.zeros(1).expand(4), persistent=False)  # torch itself cannot load it

    def forward(self, x):
        if self.late is None:
            self.late = torch.zeros(2)
        out = self.layer(x) + self.late + self.last
        self.late, self.last = self.late + 0.1, out.detach().mean(0)
        self.losses.append(float(self.last.sum()))
        return out


@pytest.mark.parametrize("how", ["back", "rollback"])
def test_what_a_module_keeps_aside_comes_back(how):
    """Also where a checkpoint's tree has no place for it."""
    ends = []
    for disturbed in (True, False):
        torch.manual_seed(0)
        run, model = build(at=4 if disturbed and how == "rollback" else -1, model=Odd())
        with contextlib.suppress(Planted):
            list(run.take(6))
        if disturbed and how == "back":
            run.back(6)
        run.to_end()
        ends.append({"late": model.late, "last": model.last, "losses": torch.tensor(model.losses)})

    assert_same(*ends)


def asks_not(run: lt.Run, model: nn.Module) -> None:
    model[0].bias.requires_grad_(False)  # type: ignore[index, operator, union-attr]


def resets_momentum(run: lt.Run, model: nn.Module) -> None:
    for state in run.optimizer.state.values():
        state["exp_avg"].zero_()


def validates(run: lt.Run, model: nn.Module) -> None:
    run.validate(lt.validate(model, loader(shuffle=False), classify, name="test"))


def lays_aside(run: lt.Run, model: nn.Module) -> None:
    switches(model)


@pytest.mark.parametrize("change", [asks_not, lays_aside, resets_momentum, validates])
def test_what_is_done_at_the_prompt_is_kept(change: Callable[..., None]):
    """Between two iterations: it cannot be computed again."""
    run, model = built(lt.snapshots(every=50, keep=9))
    list(run.take(3))
    change(run, model)
    list(run.take(3))
    was = everything(run, model)

    run.back(2)
    list(run.take(2))

    assert_same(everything(run, model), was)


def test_generators_of_boundaries_take_little_memory():
    """Python's and NumPy's are kept once, as long as nobody draws from them."""
    run, _ = built(lt.snapshots(every=50))
    list(run.take(10))

    kept = [place[1] for place in run.cursor.keeper.trail.values()]

    assert len(kept) >= 10
    assert len({id(states["python"]) for states in kept}) == 1
    assert len({id(states["numpy"]) for states in kept}) == 1


def test_snapshots_of_a_future_with_skipped_iterations_are_gone():
    """Skipped ones are not handed out, so the count alone does not tell."""
    run, model = built(lt.snapshots(every=1, keep=9))
    was = everything(run, model)
    for _ in range(2):
        run.after("forward")
        run.skip()
    next(run)
    run.replay(0)
    list(run.take(3))

    run.back(3)

    assert run.progress.iteration == 0
    assert_same(everything(run, model), was)
