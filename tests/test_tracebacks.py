"""A traceback shows the user's own lines, and keeps nothing alive once the run has gone on."""

from __future__ import annotations

import gc
import os
import pdb
import signal
import sys
import traceback
import weakref

import pytest
import torch
from loops import Planted
from torch import nn
from torch.utils.data import DataLoader, Dataset

import looptools as lt
from looptools.tracebacks import FULL, let_go

HOUSE = os.path.dirname(lt.__file__)


def frames(error):
    """Functions in the traceback, looptools' own marked, from this file's innermost caller on."""
    shown = [(f.filename, f.name) for f in traceback.extract_tb(error.__traceback__)]
    return [f"looptools: {name}" if file.startswith(HOUSE) else name for file, name in shown]


def planted(model, batch):
    """A step that raises, below one more function of the user's."""
    logits = model(batch)
    return deeper(logits)


def deeper(logits):
    raise Planted


def run_of(model, batches, sgd, step=planted, *parts):
    phase = lt.train(model, batches, step) | lt.optimize(sgd)
    for part in parts:
        phase = phase | part
    return lt.workflow([(phase, 1)], max_epochs=1)


@pytest.fixture
def run(model, batches, sgd):
    return run_of(model, batches, sgd)


def failure(verb):
    with pytest.raises(Exception) as caught:  # noqa: PT011 (each case raises its own)
        verb()
    return caught.value


def loop(states):
    for _ in states:
        pass


def retried(run):
    failure(run.to_end)
    run.retry()


VERBS = {
    "next": lambda run: next(run),
    "for": lambda run: loop(run),
    "to_end": lambda run: run.to_end(),
    "take": lambda run: list(run.take(2)),
    "for take": lambda run: loop(run.take(2)),
    "stages": lambda run: loop(run.stages()),
    "after": lambda run: run.after("update"),
    "before": lambda run: run.before("update"),
    "retry": retried,
    "skip": lambda run: (failure(run.to_end), run.skip(), next(run)),
    "rehearse": lambda run: run.rehearse(1),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())
def test_no_frame_of_looptools_between_the_users_line_and_his_step(run, verb):
    """Whatever verb it is: the caller, the step, and what the step calls."""
    names = frames(failure(lambda: verb(run)))

    assert not any("looptools" in name for name in names)
    assert names[-2:] == ["planted", "deeper"]
    assert set(names[:-2]) <= {"failure", "<lambda>", "retried", "loop"}


def test_a_phase_by_itself_and_validate(model, batches, run):
    """`phase.to_end()` and `run.validate(phase)` are verbs like any other."""
    phase = lt.validate(model, batches, planted)

    assert frames(failure(phase.to_end))[-3:] == ["failure", "planted", "deeper"]
    assert frames(failure(lambda: run.validate(phase)))[-3:] == ["<lambda>", "planted", "deeper"]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("named", [False, True])
def test_however_the_step_is_called(batches, autocast, named):
    """Under autocast, without gradients, with the state as its third parameter."""

    def with_state(model, batch, state):
        raise Planted

    def without(model, batch):
        raise Planted

    phase = lt.validate(None, batches, with_state if named else without, autocast=autocast)

    assert frames(failure(phase.to_end)) == ["failure", "with_state" if named else "without"]


class Broken(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise Planted


def test_a_data_set_that_raises(model, sgd):
    """Between the caller and the data set stands the loader, as without looptools."""
    by_hand = frames(failure(lambda: next(iter(DataLoader(Broken())))))
    piped = frames(failure(run_of(model, DataLoader(Broken()), sgd).to_end))

    assert piped[-1] == "__getitem__"
    assert piped[1:] == by_hand[2:]


def failing(states):
    for state in states:
        raise Planted
        yield state


class Part:
    def __call__(self, states):
        yield from failing(states)


@pytest.mark.parametrize(("part", "names"), [(failing, ["failing"]), (Part(), ["__call__", "failing"])])
def test_parts_in_both_scopes(model, batches, sgd, part, names):
    """A plain generator, a class; on the phase, on the run."""
    step = lambda model, batch: model(batch)  # noqa: E731
    in_phase = run_of(model, batches, sgd, step, part)
    in_run = run_of(model, batches, sgd, step) | part

    assert frames(failure(in_phase.to_end)) == frames(failure(in_run.to_end)) == ["failure", *names]


def test_a_function_of_the_workflow(batches):
    """It is the user's too."""

    def refresh(run):
        raise Planted

    run = lt.workflow([(refresh, 1), (lt.validate(None, batches, lambda m, b: {"x": b.sum()}), 1)], max_rounds=1)

    assert frames(failure(run.to_end)) == ["failure", "refresh"]


def test_behind_a_part_that_drops_states(batches):
    """It asks for the next state in the middle of its loop, and stands in the traceback; what is between does not."""

    def every_other(states):
        for state in states:
            if state.index == 1:
                yield state

    def step(model, batch):
        if batch.mean() == 2:
            raise Planted
        return {"x": batch.sum()}

    run = lt.workflow([(lt.validate(None, batches, step) | every_other, 1)], max_rounds=1)

    assert frames(failure(run.to_end)) == ["failure", "every_other", "step"]


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda model, batch: model(batch).detach(), "backward: the loss of iteration 0 of train has no graph"),
        (lambda model, batch: None, "forward: the step returned NoneType"),
    ],
)
def test_what_looptools_raises_itself_shows_the_users_line_and_the_message(model, batches, sgd, step, words):
    """No frame of looptools at all."""
    error = failure(run_of(model, batches, sgd, step).to_end)

    assert str(error).startswith(words)
    assert frames(error) == ["failure"]


@pytest.mark.parametrize(
    "refused",
    [lambda run: run.after("nobody"), lambda run: run.replace(1), lambda run: run["nobody"], lambda run: run.retry()],
)
def test_what_a_verb_refuses_too(run, refused):
    """LookupError, TypeError, RuntimeError: at the line where the verb was typed."""
    assert frames(failure(lambda: refused(run))) == ["failure", "<lambda>", "<lambda>"]


def test_a_run_that_cannot_be_built(model, batches):
    """Refused at its first use."""
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)

    assert frames(failure(lambda: next(run_of(model, batches, other)))) == ["failure", "<lambda>"]


def test_where_looptools_slips_its_innermost_frame_stays(model, batches, sgd):
    """A call that fails before the user's function begins, or a fault of our own: one frame shows the line."""

    def step(model, batch, *, weight):
        return model(batch)

    assert frames(failure(run_of(model, batches, sgd, step).to_end)) == ["failure", "looptools: __call__"]


def test_ctrl_c_shows_the_users_line(batches):
    """At the boundary it is looptools that raises it."""

    def step(model, batch):
        signal.raise_signal(signal.SIGINT)
        return {"x": batch.sum()}

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            lt.validate(None, batches, step).to_end()
    finally:
        signal.signal(signal.SIGINT, before)

    assert frames(caught.value) == ["test_ctrl_c_shows_the_users_line"]


def test_notes_cause_and_context_stay(model, batches, sgd):
    """The exception is the same one; what it came from is short too."""

    def step(model, batch):
        try:
            deeper(batch)
        except Planted as error:
            raise ValueError("second") from error

    def exhausted(states):
        next(iter(()))
        yield from states

    error = failure(run_of(model, batches, sgd, step).to_end)
    stop = failure(run_of(model, batches, sgd, lambda m, b: m(b), exhausted).to_end)

    assert error.__notes__[0].startswith("looptools: train/forward")
    assert frames(error.__cause__) == ["step", "deeper"]
    assert not any("looptools" in name for name in [*frames(stop), *frames(stop.__cause__)])


def test_members_of_a_group_are_short_too(model, batches, sgd):
    """Two parts fail while they are closed."""

    def fails_at_the_end(states):
        yield from states
        raise Planted

    run = run_of(model, batches, sgd, lambda m, b: m(b)) | fails_at_the_end | fails_at_the_end
    next(run)
    with pytest.raises(BaseExceptionGroup) as caught:
        run.close()

    assert [frames(error) for error in caught.value.exceptions] == [["fails_at_the_end"]] * 2


def test_an_environment_variable_shows_all_frames(run, monkeypatch):
    """For whoever looks for a fault in looptools."""
    monkeypatch.setenv(FULL, "1")
    names = frames(failure(run.to_end))

    assert "looptools: advance" in names
    assert names[-2:] == ["planted", "deeper"]


def test_a_debugger_stands_in_the_users_frame(run):
    """What `%debug` and `pdb.pm()` look at: the innermost frame with its locals, the step's above it."""
    error = failure(run.to_end)
    stack, at = pdb.Pdb().get_stack(None, error.__traceback__)
    innermost, above = stack[at][0], stack[at - 1][0]

    assert innermost.f_code.co_name == "deeper"
    assert torch.equal(above.f_locals["logits"], innermost.f_locals["logits"])
    assert above.f_locals["batch"] is run.failed.state.batch


def test_what_a_notebook_prints(run):
    """IPython's own formatter: the cell, the step, the message and the notes."""
    ultratb = pytest.importorskip("IPython.core.ultratb")
    error = failure(run.to_end)
    text = ultratb.FormattedTB(mode="Context", theme_name="nocolor").text(type(error), error, error.__traceback__)

    assert "return deeper(logits)" in text
    assert "run.retry() redoes the iteration" in text
    assert f"{HOUSE}{os.sep}" not in text


# Letting go


@pytest.fixture
def fails_once(sgd, model):
    """A run over batches that nobody else holds, whose second iteration raises once; weak references to all it made."""
    made, errors = {}, [Planted()]

    def source():
        for n in (1, 2, 3):
            yield torch.full((2, 1), float(n))

    def step(model, batch):
        loss = model(batch)
        if batch.mean() == 2 and errors:
            logits = loss * 1
            made.update(batch=weakref.ref(batch), loss=weakref.ref(loss), logits=weakref.ref(logits))
            raise errors.pop()
        return loss

    return run_of(model, source, sgd, step), made


def alive(made):
    gc.collect()
    return [name for name, reference in made.items() if reference() is not None]


def skipped(run):
    run.skip()
    next(run)


ONWARD = {
    "next": lambda run: loop(run.take(2)),
    "retry": lambda run: (run.retry(), next(run)),
    "skip": skipped,
    "stages": lambda run: (loop(run.stages()), next(run)),
    "to_end": lambda run: (run.to_end(), run.reset()),
    "reset": lambda run: run.reset(),
    "close": lambda run: run.close(),
}


@pytest.mark.parametrize("onward", ONWARD.values(), ids=ONWARD.keys())
def test_a_kept_exception_lets_go_once_the_run_has_gone_on(fails_once, onward, monkeypatch):
    """`except ... as e: kept = e`, `sys.last_exc` and a kept `run.failed` pin neither batch nor graph."""
    run, made = fails_once
    kept = failure(run.to_end)
    monkeypatch.setattr(sys, "last_exc", kept, raising=False)
    failed = run.failed
    assert alive(made) == ["batch", "loss", "logits"]

    onward(run)
    if run.cursor.handed is not None:
        run.cursor.handed = None  # the state that was handed out last is the run's own

    assert alive(made) == []
    assert frames(kept)[-1] == "step"
    assert (failed.state, failed.exception) == (None, kept)
    assert repr(failed) == "Failed(part='train/forward', iteration=1, epoch=0, exception=Planted())"


def test_what_a_debugger_was_given_is_let_go_too(fails_once):
    """It asks the frames for a dictionary of their variables, and keeps that."""
    run, made = fails_once
    error = failure(run.to_end)
    held = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    assert "logits" in held[-1]

    run.retry()
    next(run)

    assert "logits" not in held[-1]
    assert alive(made) == []


def test_as_long_as_the_run_stands_there_all_of_it_can_be_seen(fails_once):
    """A second failure takes the place of the first; asleep, it still stands there."""
    run, made = fails_once
    failure(run.to_end)
    with run:
        pass

    assert run.failed.state is not None
    assert alive(made) == ["batch", "loss", "logits"]


def test_the_first_of_two_failures_is_let_go_by_the_second(model, batches, sgd):
    """What the run stands at is the newest; with out of memory, the room is there before it is tried again."""
    seen = []

    def step(model, batch):
        activation = torch.ones(3)
        seen.append((activation is not None and weakref.ref(activation), [r() is None for r, _ in seen]))
        raise Planted

    run = run_of(model, batches, sgd, step)
    kept = [failure(run.to_end), failure(run.retry)]

    assert seen[1][1] == [True]
    assert seen[1][0]() is not None
    assert len(kept) == 2


def test_frames_that_go_on_keep_what_they_have(fails_once):
    """A generator of the user's that has caught the exception waits for its turn, and is not closed."""
    run, _ = fails_once
    kept = []

    def stream():
        mine = torch.ones(1)
        while not run.ended:
            try:
                yield from run
            except Planted as error:
                kept.append(error)
                yield mine

    states = stream()
    seen = [next(states), next(states)]
    run.retry()

    assert torch.equal(seen[1], torch.ones(1))
    assert kept[0].__traceback__.tb_frame.f_code.co_name == "stream"
    assert next(states).iteration == 2


def test_within_an_except_the_function_itself_keeps_its_variables(fails_once):
    """It is at work, and needs them."""
    run, _ = fails_once
    mine = torch.ones(1)
    try:
        run.to_end()
    except Planted:
        run.retry()

    assert torch.equal(mine, torch.ones(1))


def test_let_go_of_what_it_came_from():
    """Causes, contexts and members of groups; an exception that was never raised has nothing to let go."""
    references = []

    def fails():
        tensor = torch.ones(1)
        references.append(weakref.ref(tensor))
        raise Planted

    first = failure(fails)
    second = failure(fails)
    group = ExceptionGroup("both", [second, ValueError("never raised")])
    group.__cause__ = first

    let_go(group)

    assert [reference() for reference in references] == [None, None]
