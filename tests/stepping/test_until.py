"""Watchpoints: back at the prompt at the iteration that one waits for."""

from __future__ import annotations

import math
import os
import signal

import attrs
import pytest
import torch
from torch import nn

import looptools as lt
from looptools.stepping.until import nonfinite
from tests.loops import device_reads

STEP = lambda model, batch: model(batch)  # noqa: E731  # the gradient of the one weight is the batch's mean


@pytest.fixture
def run(model, sgd, batches):
    """Two epochs of gradients 1, 2 and 3, clipped at 10 so that their norm is known; one validation batch each."""
    train = lt.train(model, batches, STEP) | lt.optimize(sgd, max_norm=10.0)
    return lt.workflow([(train, 1), (lt.validate(model, batches[:1], STEP), 1)], max_epochs=2)


def places(run, when, **options):
    """Phase and iteration of every state at which `until` stops, until the run ends."""
    found = []
    with pytest.raises(LookupError, match="the run ended"):
        while True:
            state = run.until(when, **options)
            found.append((state.phase, state.iteration))
    return found


def test_it_stops_at_each_state_that_the_function_is_true_of(run, model):
    """The iteration is complete, as after `next(run)`: counted, handed out, the weight moved."""
    state = run.until(lambda s: s.grad_norm > 1.5)

    assert (state.iteration, state.grad_norm, model.w.item()) == (1, 2.0, 3 - 1 - 2)
    assert (run.progress.iteration, run.state) == (2, state)
    assert places(run, lambda s: s.grad_norm > 1.5) == [("train", 2), ("train", 4), ("train", 5)]
    assert run.ended


def test_in_front_of_a_part_nothing_behind_it_has_happened(run, model):
    """Stopped before `update` the gradient can be mended; twice in a row it does not stop at the same state."""
    state = run.until(lambda s: s.grad_norm > 1.5, before="update")
    assert (state.iteration, model.w.item(), run.progress.iteration) == (1, 2.0, 1)

    model.w.grad.zero_()
    assert run.until(lambda s: s.grad_norm > 1.5, before="update").iteration == 2
    assert model.w.item() == 2.0
    assert next(run).iteration == 2


@pytest.mark.parametrize("before", [None, "forward", "train/update", "average"])
def test_iterations_and_epochs_are_counted_from_0(run, before):
    """Both stop at the training state that bears the number, and stay where they stand already."""
    assert run.until(iteration=2, before=before).iteration == 2
    state = run.until(epoch=1, before=before)
    assert (state.phase, state.epoch, state.index, state.iteration) == ("train", 1, 0, 3)
    if before is not None:
        assert run.until(epoch=1, before=before) is state
        assert run.until(iteration=3, before=before) is state
        assert next(run) is state


def test_the_same_bits_as_a_run_that_nobody_watched(batches):
    """Watching changes nothing."""

    def trained(watch):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        adam = torch.optim.AdamW(model.parameters(), lr=0.1)
        train = lt.train(model, batches, lambda model, batch: model(batch).pow(2).mean()) | lt.optimize(adam)
        run = lt.workflow([(train, 1)], max_epochs=4)
        if watch:
            run.until(iteration=2)
            run.until(lambda s: s.index == 1, before="update")
            with pytest.raises(LookupError):
                run.until_nonfinite()
        run.to_end()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(trained(True), trained(False))


def test_each_state_is_asked_once(run):
    """Validation states too; one that stands in front of the part already is asked at once."""
    asked = []
    ask = lambda s: bool(asked.append((s.phase, s.index)))  # noqa: E731
    first = run.before("average")
    with pytest.raises(LookupError, match=r"ended \(finished: 2 epochs, 6 iterations\) .*; 8 states were looked at"):
        run.until(ask, before="average")

    assert first.iteration == 0
    assert asked == [*(("train", n) for n in range(3)), ("val", 0)] * 2


def test_an_open_iteration_is_completed_and_asked(run, model):
    """After `run.after` the open one counts; so does one whose part has failed, and been mended."""
    state = run.after("backward")
    assert run.until(lambda s: True) is state
    assert model.w.item() == 2.0

    run.replace("train/forward", lambda model, batch: 1 // len([]))
    with pytest.raises(ZeroDivisionError):
        run.until(iteration=1)
    run.replace("train/forward", STEP)
    assert run.until(iteration=1).iteration == 1
    assert run.failed is None


def test_after_a_failed_backward_the_forward_comes_next(run):
    """The graph is gone: what is asked in front of `backward` is asked of a new loss."""
    run.replace("train/forward", lambda model, batch: model(batch).detach())
    with pytest.raises(RuntimeError, match="has no graph"):
        next(run)
    run.replace("train/forward", STEP)

    state = run.until(lambda s: s.loss.requires_grad, before="backward")
    assert (state.iteration, run.failed) == (0, None)
    assert next(run) is state


def test_after_a_stop_a_redone_state_is_asked_again(run):
    """Left in front of `backward`, failed there and redone, it is a new question."""
    stop = lambda s: s.iteration == 0  # noqa: E731
    state = run.until(stop, before="backward")
    state.loss = state.loss.detach()
    with pytest.raises(RuntimeError, match="has no graph"):
        next(run)

    assert run.until(stop, before="backward") is state


def test_dropped_states_are_not_asked(model, batches):
    """Not by number either: the first one behind it counts."""

    def drops(states):
        for state in states:
            if state.iteration != 1:
                yield state

    run = lt.workflow([(lt.train(model, batches, STEP) | drops, 1)], max_epochs=2)
    asked = []
    assert run.until(lambda s: asked.append(s.iteration) or s.iteration == 3).iteration == 3
    assert asked == [0, 2, 3]
    run.reset()
    assert run.until(iteration=1).iteration == 2
    run.reset()
    assert run.until(iteration=1, before="average").iteration == 2


def test_a_skipped_state_is_not_asked(run):
    """Neither the one that is open and dropped, nor its number."""
    run.after("backward")
    run.skip()

    assert run.until(iteration=1).iteration == 1


# What the function may do


@pytest.mark.parametrize(
    "when",
    [
        lambda s: s.grad_norm > 2.5,
        lambda s: s.grad_norm and s.grad_norm > 2.5,
        lambda s: float(s.grad_norm) > 2.5,
        lambda s: s.grad_norm.sqrt() > 1.6,
        lambda s: bool(torch.isfinite(s.grad_norm)) and s.grad_norm > 2.5,
        lambda s: any(x > 2.5 for x in [s.grad_norm]),
        lambda s: torch.stack([s.grad_norm]) > 2.5,
    ],
)
def test_what_is_none_on_a_state_counts_as_not_yet(run, when):
    """No gradient norm in the validation: the run goes on."""
    assert places(run, when) == [("train", 2), ("train", 5)]


def test_in_front_of_forward_there_is_no_loss_yet(run):
    """Nothing is true of it, and the run says so as soon as an epoch has gone by."""
    with (
        pytest.warns(UserWarning, match="until: there was no answer so far. On all 4 states loss was None: no part se"),
        pytest.raises(LookupError, match="On all 8 states loss was None"),
    ):
        run.until(lambda s: s.loss > 0, before="forward")


def test_a_function_that_forgets_to_return_is_told(run):
    """It would never be true."""

    def when(state):
        state.loss > 2  # noqa: B015

    with (
        pytest.warns(UserWarning, match="gave None each time: does it return its answer"),
        pytest.raises(LookupError, match="gave None each time"),
    ):
        run.until(when)


@pytest.mark.parametrize(
    ("when", "error", "match"),
    [
        (lambda s: s.grad_nrom > 1, AttributeError, "no attribute 'grad_nrom'|State has no 'grad_nrom'"),
        (lambda s: s.loss > None, TypeError, "None"),
        (lambda s: s.run.failed.part == "x", AttributeError, "'NoneType' object has no attribute 'part'"),
        (lambda s: s.metrics["acuracy"] > 1, KeyError, "acuracy"),
        (lambda s: next(iter(())), RuntimeError, "until: the function raised StopIteration"),
    ],
)
def test_a_mistake_in_the_function_comes_out(run, when, error, match):
    """With a note; the run stands where it stood and loses nothing."""
    with pytest.raises(error, match=match) as caught:
        run.until(when)

    assert "until: the function that was given raised this for a state of train (iteration 0)" in str(
        caught.value.__notes__
    )
    assert (run.failed, run.state.iteration) == (None, 0)
    assert next(run).iteration == 1


def test_a_tensor_with_one_element_is_an_answer_and_more_are_not(run):
    """bool of several would be torch's riddle."""
    assert run.until(lambda s: torch.ones(1, 1)).iteration == 0
    with pytest.raises(
        TypeError, match=r"until: the function gave a tensor of shape \(2, 1\), .* one answer. Write .any"
    ):
        run.until(lambda s: s.batch > 0)


def test_an_interval_is_a_function_of_the_state(run):
    """The last iteration of the first epoch."""
    assert run.until(lt.epochs(1)).iteration == 2


@pytest.mark.parametrize(
    ("args", "options", "error", "match"),
    [
        ((), {}, ValueError, r"until: give what to wait for: a function .* iteration=, or epoch="),
        ((), {"before": "update"}, ValueError, r"To stop there in any iteration: run.before\('update'\)"),
        ((3,), {}, TypeError, r"until: got 3. Say which number it is: run.until\(iteration=3\), or epoch=3"),
        (("update",), {}, TypeError, r"To stop at a part: run.before\('update'\), or run.until\(..., before='update'"),
        ((lt.epochs,), {}, TypeError, "until: give a function of the state"),
        ((lambda: True,), {}, TypeError, r"must take one argument, the state, but takes \(\)"),
        ((lambda s: True,), {"epoch": 1}, ValueError, "give one of when, epoch= and iteration=, got when and epoch"),
        ((), {"epoch": -1}, ValueError, r"until: epoch must be at least 0, got -1. .* run.back\(n\)"),
        ((), {"iteration": 1.5}, TypeError, "until: iteration must be a whole number, got 1.5"),
        ((), {"epoch": True}, TypeError, "until: epoch must be a whole number, got True"),
        (
            (),
            {"iteration": 2, "before": "clip"},
            LookupError,
            "until: there is no part 'clip'. There are: train/for",
        ),
        (
            (),
            {"epoch": 1, "before": "val/forward"},
            ValueError,
            r"run.until\(lambda s: s.epoch == 1, before=\"val/",
        ),
        ((), {"iteration": 6}, LookupError, "iteration=6 will not come: the run has 6 iterations, 0 to 5. run.extend"),
        ((), {"epoch": 2}, LookupError, "epoch=2 will not come: the run has 2 epochs, 0 to 1"),
    ],
)
def test_what_cannot_be_waited_for_is_refused_at_once(run, args, options, error, match):
    """Each says what to write; nothing has run."""
    with pytest.raises(error, match=match):
        run.until(*args, **options)
    assert not run.begun


def test_what_is_behind_is_refused(run):
    """Named with what comes next, and the verb that goes back."""
    run.until(iteration=1)
    with pytest.raises(ValueError, match=r"iteration=1 is behind already: iteration 2 comes next. run.replay\(1\)"):
        run.until(iteration=1)
    with pytest.raises(ValueError, match=r"epoch=0 is behind already: iteration 2 comes next, .* to begin is 1"):
        run.until(epoch=0)
    run.before("average")
    with pytest.raises(ValueError, match=r"iteration=2 is behind already: iteration 3 comes next"):
        run.until(iteration=2, before="update")
    assert run.until(iteration=2).iteration == 2
    assert run.until(epoch=1).iteration == 3


def test_an_epoch_begins_with_its_first_state(run):
    """Open, it can still be waited for; behind its validation the next one comes."""
    run.after("train/forward")
    assert run.until(epoch=0).index == 0
    run.after("val/forward")
    with pytest.raises(ValueError, match="epoch=0 is behind already"):
        run.until(epoch=0)
    assert run.until(epoch=1).iteration == 3


def test_a_run_that_is_over_says_so(run):
    """There is nothing to wait for."""
    run.to_end()

    with pytest.raises(LookupError, match=r"until: the run is over \(finished: .*run.extend\(max_epochs=...\) goes on"):
        run.until(lambda s: True)
    with pytest.raises(LookupError, match="until_nonfinite: the run is over"):
        run.until_nonfinite()


def test_a_run_that_is_stopped_says_why(run):
    """As `run.ended` does."""
    ask = lambda s: s.stop("seen enough") or False  # noqa: E731
    with pytest.raises(
        LookupError, match=r"until: the run ended \(seen enough\) before .* true of a state; 1 state was"
    ):
        run.until(ask)


def test_a_part_that_is_muted_is_not_waited_for(run):
    """The run would go by to its end."""
    run.cursor.slots[1].muted = True

    with pytest.raises(LookupError, match=r"until: train/backward is muted, .*run.mute\('train/backward', False\)"):
        run.until(lambda s: True, before="backward")
    assert not run.begun


def test_checkpoints_and_other_work_at_the_boundary_are_done(run, model, batches):
    """As after `next(run)`, before the state is given back."""
    done = []

    def asks(states):
        for state in states:
            state.run.at_boundary(lambda run: done.append(run.progress.iteration))
            yield state

    run = lt.workflow([(lt.train(model, batches, STEP), 1)], max_epochs=1) | asks
    run.until(iteration=1)

    assert done == [0 + 1, 1 + 1]


# Ctrl-C


@pytest.fixture
def pythons_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pressing(run, at):
    """A step that presses Ctrl-C once in iteration *at*."""
    pressed = []

    def step(model, batch, state):
        if state.iteration == at and not pressed:
            pressed.append(at)
            os.kill(os.getpid(), signal.SIGINT)
        return model(batch)

    run.replace("train/forward", step)


@pytest.mark.skipif(os.name == "nt", reason="os.kill(SIGINT) ends the process on Windows")
@pytest.mark.parametrize("before", [None, "update"])
def test_ctrl_c_comes_back_at_a_boundary_and_loses_nothing(run, model, before, pythons_handler):
    """Called again, it goes on where it was: the finished state is asked first."""
    pressing(run, at=1)
    asked = []
    ask = lambda s: asked.append(s.iteration) or s.iteration == 2  # noqa: E731

    with pytest.raises(KeyboardInterrupt):
        run.until(ask, before=before)
    assert run.progress.iteration == 1 + 1
    assert run.until(ask, before=before).iteration == 2
    assert asked == [0, 1, 2]


@pytest.mark.skipif(os.name == "nt", reason="os.kill(SIGINT) ends the process on Windows")
def test_ctrl_c_in_the_iteration_that_is_found(run, model, pythons_handler):
    """It is raised there, between two parts, and not by the next cell; the verb called again is there at once."""
    pressing(run, at=1)
    with pytest.raises(KeyboardInterrupt):
        run.until(lambda s: s.iteration >= 1, before="update")

    assert (run.progress.iteration, model.w.item()) == (1, 2.0)
    assert run.until(lambda s: s.iteration >= 1, before="update").iteration == 1
    assert run.until(lambda s: s.iteration >= 1, before="update").iteration == 2


# What is not a number


@attrs.define
class Poison:
    """A step that makes something infinite or nan at one iteration."""

    what: str
    at: int = 2
    phase: str = "train"

    def __call__(self, model, batch, state):
        loss = model(batch)
        here = state.iteration == self.at and state.phase == self.phase
        if here and self.what == "loss":
            loss = loss * math.nan
        if here and self.what == "gradient":  # of sqrt at 0, where the loss is finite
            loss = loss + (model.w - model.w.detach()).abs().sqrt()
        metric = batch.sum() / (0 if here and self.what == "metric" else 1)
        return {"loss": loss, "metric": metric, "host": math.inf if here and self.what == "host" else 0.0}


def poisoned(model, sgd, batches, poison, *parts, **options):
    train = lt.train(model, batches, poison) | lt.chain(*parts) | lt.optimize(sgd, **options)
    return lt.workflow([(train, 1), (lt.validate(model, batches[:1], poison), 1)], max_epochs=2)


@pytest.mark.parametrize("before", [None, "update"])
@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("loss", {"loss", "gradient of w"}),
        ("metric", {"metric"}),
        ("host", {"host"}),
        ("gradient", {"gradient of w"}),
    ],
)
def test_it_stops_where_something_is_not_finite(model, sgd, batches, what, names, before):
    """And says what; in front of `update` the weight is still what it was."""
    run = poisoned(model, sgd, batches, Poison(what))
    state = run.until_nonfinite(before=before)
    moved = {"weight w"} if before is None and "gradient of w" in names else set()

    assert (state.phase, state.iteration) == ("train", 2)
    assert set(nonfinite(run.cursor)) == names | moved
    assert before is None or model.w.item() == 3 - 1 - 2


def test_validation_states_count(model, sgd, batches):
    """Their loss and metrics; gradients and weights are those of the training."""
    run = poisoned(model, sgd, batches, Poison("metric", phase="val"))

    assert run.until_nonfinite().phase == "val"
    assert nonfinite(run.cursor) == {"metric": math.inf}


def test_a_weight_that_the_update_overflows(model, batches):
    """Loss and gradient were finite, the learning rate was not sane."""
    run = poisoned(model, torch.optim.SGD(model.parameters(), lr=3e38), batches[1:], Poison(""))
    state = run.until_nonfinite()

    assert (state.iteration, nonfinite(run.cursor)) == (0, {"weight w": math.inf})


def test_a_gradient_norm_that_is_not_finite(model, sgd, batches):
    """`clip_grad_norm` has scaled the gradient by then, its norm tells."""
    run = poisoned(model, sgd, batches, Poison("gradient"), max_norm=1.0)
    run.until_nonfinite(before="update")

    assert nonfinite(run.cursor).keys() == {"grad_norm", "gradient of w"}


def test_gradients_of_the_iteration_before_are_not_blamed_on_the_next(model, sgd, batches):
    """In front of `backward` the bad gradient still lies there, in the iteration after."""
    run = poisoned(model, sgd, batches, Poison("gradient", at=1))
    run.before("average")
    run.before("update")
    model.w.grad.zero_()  # no longer what it was
    next(run)
    model.w.grad.fill_(math.nan)

    with pytest.raises(LookupError, match=r"until_nonfinite: the run ended \(.*\) and all was finite; 4 states were"):
        run.until_nonfinite(before="backward")


def test_a_scaler_looks_after_its_gradients_itself(model, batches):
    """Infinite ones are its daily bread: the update is skipped, and the scale halved."""
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    run = poisoned(model, sgd, batches, Poison("gradient"), scaler=scaler)

    with pytest.raises(LookupError, match="all was finite; 8 states"):
        run.until_nonfinite()
    assert run.progress.updates[sgd] == 5


def test_large_and_odd_tensors_are_no_false_alarm():
    """A norm of 1e30's would overflow; empty, sparse, integer, half and lazy parameters are looked at or left out."""
    model = nn.ModuleDict(
        {
            "big": nn.Linear(1, 1),
            "sparse": nn.Embedding(4, 2, sparse=True),
            "narrow": nn.Linear(1, 1).bfloat16(),
            "lazy": nn.LazyLinear(1),
        }
    )
    model["big"].weight.data.fill_(1e30)
    model.register_parameter("empty", nn.Parameter(torch.zeros(0)))
    model.register_parameter("whole", nn.Parameter(torch.ones(1, dtype=torch.long), requires_grad=False))
    sgd = torch.optim.SGD([p for p in model.parameters() if not isinstance(p, nn.UninitializedParameter)], lr=0.0)

    def step(model, batch):
        return model["sparse"](torch.tensor([1])).sum() + 1e-30 * model["big"](batch).sum() + model.empty.sum()

    run = lt.workflow([(lt.train(model, [torch.ones(1, 1)] * 2, step) | lt.optimize(sgd), 1)], max_epochs=1)
    run.until(iteration=0)
    assert nonfinite(run.cursor) == {}
    model["sparse"].weight.data.fill_(math.nan)

    assert run.until_nonfinite(before="update").iteration == 1
    assert nonfinite(run.cursor) == {"loss": pytest.approx(math.nan, nan_ok=True)}


def test_the_device_is_read_once_an_iteration(model, sgd, batches):
    """Loss, metrics and all tensors together; the four iterations of an epoch and the pass's two means."""
    run = poisoned(model, sgd, batches, Poison(""), max_norm=10.0)
    with device_reads() as reads, pytest.raises(LookupError):
        run.until_nonfinite()
    watched = len(reads)
    run.reset()
    with device_reads() as reads:
        run.to_end()

    assert watched - len(reads) == 8


def test_a_guard_that_raises_is_heard_as_always(model, sgd, batches):
    """The failure is the run's, with its advice."""
    run = poisoned(model, sgd, batches, Poison("loss"), lt.nan_guard())

    with pytest.raises(FloatingPointError, match="nan_guard: loss is nan"):
        run.until_nonfinite()
    assert run.failed.part == "train/nan_guard"
    assert nonfinite(run.cursor).keys() == {"loss"}


def test_a_batch_that_a_guard_has_dropped_is_no_find(model, sgd, batches):
    """Nothing of it stays."""
    run = poisoned(model, sgd, batches, Poison("loss", at=1), lt.nan_guard(skip=1))

    with pytest.warns(UserWarning, match="the batch was dropped"), pytest.raises(LookupError, match="all was finite"):
        run.until_nonfinite()


def test_before_the_first_iteration_nothing_is_known(run):
    """Neither finite nor not."""
    assert nonfinite(run.cursor) == {}
