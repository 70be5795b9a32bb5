"""A crash leaves a file, the exception goes its way, and the run stands as if nobody had looked."""

from __future__ import annotations

import math
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Case, Planted, assert_same, by_hand, classify, device_reads, piped
from torch import nn

import looptools as lt
from looptools.plain import require_plain
from looptools.stepping import beginning, moment
from looptools.stepping import recorder as recording
from looptools.stepping.crash import files_in


def fails_at(iteration: int, phase: str = "train", step: Any = classify) -> Any:
    """A step that fails once, behind the forward."""
    left = [iteration]

    def classify(model, batch, state):
        found = step(model, batch)
        if (state.phase, state.iteration) == (phase, iteration) and left:
            left.clear()
            raise Planted("at the step")
        return found

    return classify


def crashed(run: lt.Run) -> Any:
    with pytest.raises(Planted) as caught:
        run.to_end()
    return caught.value


def loaded(folder: Path) -> Any:
    return torch.load(files_in(folder)[-1], weights_only=True)


def test_a_crash_leaves_one_file_and_a_note_names_it(tmp_path):
    """The original exception comes out."""
    run = piped(Case(), fails_at(9)) | lt.flight_recorder(tmp_path / "crashes")

    error = crashed(run)

    (file,) = (tmp_path / "crashes").iterdir()
    assert file.name == "crash_0001-epoch_0001-iteration_000009.pt"
    assert f"lt.reopen({str(file)!r}, run)" in "\n".join(error.__notes__)


def test_the_traceback_in_the_file_has_the_users_lines_only(tmp_path, monkeypatch):
    """Also of what the exception came from; the exception stays the same, and all frames can be had."""

    def step(model, batch):
        try:
            raise KeyError("low")
        except KeyError as error:
            raise Planted("high") from error

    def crash(folder, *recorders):
        run = piped(Case(), step)
        for recorder in recorders:
            run = run | recorder
        error = crashed(run)
        return [frame.name for frame in traceback.extract_tb(error.__traceback__)]

    short, full = tmp_path / "short", tmp_path / "full"
    assert crash(short, lt.flight_recorder(short)) == crash(None)
    monkeypatch.setenv("LOOPTOOLS_FULL_TRACEBACK", "1")
    crash(full, lt.flight_recorder(full))

    text = loaded(short)["crash"]["traceback"]
    assert re.findall(r'File "(.+)", line \d+, in (\w+)', text) == [(__file__, "step")] * 2
    assert 'raise KeyError("low")' in text
    assert "cursor.py" in loaded(full)["crash"]["traceback"]
    assert "cursor.py" not in text


def test_what_the_file_says(tmp_path):
    """Part, exception, traceback, batch, versions; all of it plain."""
    crashed(piped(Case(), fails_at(9)) | lt.flight_recorder(tmp_path))

    tree = loaded(tmp_path)
    crash = tree["crash"]

    require_plain(tree, "file")
    assert (crash["part"], crash["phase"], crash["epoch"], crash["iteration"], crash["index"]) == (
        "train/forward",
        "train",
        1,
        9,
        2,
    )
    assert crash["error"].startswith("loops.Planted: at the step")
    assert "in classify" in crash["traceback"]
    assert crash["batch"] == "list of (4, 3) float32 on cpu, (4,) int64 on cpu"
    assert crash["batch_lost"] == ""
    assert crash["versions"]["torch"] == torch.__version__
    assert crash["versions"]["looptools"] == lt.__version__
    assert tree["pipe"][:3] == ["train/forward", "train/backward", "train/update"]


@pytest.mark.parametrize("snapshots", [None, lt.snapshots(every=3), lt.snapshots(every=3, rollback=False)])
@pytest.mark.parametrize("case", [Case(), Case(optimizer="AdamW", accumulate=3, max_norm=1.0, cosine=True)])
def test_training_is_the_same_with_it(tmp_path, case, snapshots):
    """Also once it has written a file, and the run has gone on."""
    run = piped(case, fails_at(8)) | lt.flight_recorder(tmp_path)
    run._snapshots = snapshots

    crashed(run)
    run.to_end()

    assert_same(run.model.state_dict(), by_hand(case))


@pytest.mark.parametrize("part", ["backward", "update", "average", "clip_grad_norm"])
def test_the_failed_state_can_be_looked_into_and_gone_on_from(tmp_path, part):
    """In front of each part: weights, buffers and gradients stand as they stood when it failed."""
    case, seen = Case(optimizer="AdamW", accumulate=2, max_norm=1.0), []

    def looks(states):
        for state in states:
            if state.phase == "train" and state.iteration == 10 and not seen:
                seen.append({name: p.grad.clone() for name, p in state.model.named_parameters() if p.grad is not None})
                seen.append({name: value.clone() for name, value in state.model.state_dict().items()})
                raise Planted
            yield state

    run = piped(case) | lt.flight_recorder(tmp_path)
    run.insert(looks, before=f"train/{part}")
    run.cursor.keeper._may_be_halfway = lambda slot, state: False  # no rollback

    crashed(run)

    grads, weights = seen
    assert_same({name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}, grads)
    assert_same(run.model.state_dict(), weights)
    run.to_end()
    assert_same(run.model.state_dict(), by_hand(case))


def nan_at(*iterations: int) -> Any:
    """A step whose loss is nan there; its gradients are not."""

    def classify_nan(model, batch, state):
        found = classify(model, batch)
        bad = state.trains and state.iteration in iterations
        return {**found, "loss": found["loss"] + math.nan * 1.0} if bad else found

    return classify_nan


def test_a_loss_that_is_not_finite_leaves_one_file_and_the_run_goes_on(tmp_path):
    """The first of an episode is written; once a finite one came, the next is."""
    case = Case()
    run = piped(case, nan_at(3, 4, 9)) | lt.flight_recorder(tmp_path)

    with pytest.warns(UserWarning, match="flight_recorder: loss is nan") as warned:
        run.to_end()

    assert [file.name[11:] for file in files_in(tmp_path)] == [
        "epoch_0000-iteration_000003.pt",
        "epoch_0001-iteration_000009.pt",
    ]
    assert "(iteration 3, epoch 0, batch 3 of train)" in str(warned[0].message)
    assert loaded(tmp_path)["crash"]["nonfinite"] == "loss is nan"
    plain = piped(case, nan_at(3, 4, 9))
    plain.to_end()
    for left, right in zip(run.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def test_nonfinite_can_be_switched_off(tmp_path):
    """Then nothing is looked at, and the device not read."""
    (piped(Case(), nan_at(3)) | lt.flight_recorder(tmp_path, nonfinite=False)).to_end()

    assert not list(tmp_path.iterdir())


def test_a_state_has_one_file(tmp_path):
    """A retry that fails again is the same iteration: the file of it is named again."""

    def always(model, batch, state):
        if state.iteration == 2:
            raise Planted
        return classify(model, batch)

    run = piped(Case(), always) | lt.flight_recorder(tmp_path)

    crashed(run)
    error = crashed(run)

    assert len(files_in(tmp_path)) == 1
    assert "crash_0001" in "\n".join(error.__notes__)


def test_the_newest_files_stay(tmp_path):
    """Numbers go on from what is there; nothing is written over, other files are let alone."""
    (tmp_path / "mine.pt").touch()
    for number in range(1, 5):
        crashed(piped(Case(), fails_at(number)) | lt.flight_recorder(tmp_path, keep=2))

    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "crash_0003-epoch_0000-iteration_000003.pt",
        "crash_0004-epoch_0000-iteration_000004.pt",
        "mine.pt",
    ]


@pytest.mark.parametrize("trouble", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_the_original_exception_comes_out_whatever_goes_wrong(tmp_path, monkeypatch, trouble):
    """A full disk, a second Ctrl-C: the note says that there is no file, and the model stands where it stood."""

    def write(path, tree):
        raise trouble

    monkeypatch.setattr(recording, "write", write)
    case = Case(optimizer="AdamW")
    run = piped(case, fails_at(9)) | lt.flight_recorder(tmp_path)

    error = crashed(run)

    assert f"flight_recorder: no file was left: {type(trouble).__name__}" in "\n".join(error.__notes__)
    assert not list(tmp_path.iterdir())
    run.to_end()
    assert_same(run.model.state_dict(), by_hand(case))


def test_a_full_disk_does_not_stop_a_run_with_a_bad_loss(tmp_path, monkeypatch):
    """It is said in the warning."""
    monkeypatch.setattr(recording, "write", lambda path, tree: exec("raise OSError(28, 'No space left on device')"))
    run = piped(Case(), nan_at(3)) | lt.flight_recorder(tmp_path)

    with pytest.warns(UserWarning, match="no file was left: OSError: .*No space left"):
        run.to_end()

    assert run.ended.startswith("finished")


def test_no_memory_for_the_present_rolls_the_iteration_back(tmp_path, monkeypatch):
    """Where memory ran out there is none for a copy; then the iteration begins with its batch again."""

    def at_the_beginning(*args):
        raise torch.OutOfMemoryError("none")

    monkeypatch.setattr(recording, "at_the_beginning", at_the_beginning)
    case = Case()
    run = piped(case) | lt.flight_recorder(tmp_path)
    run.insert(trips_once(4), before="train/average")
    run.cursor.keeper._may_be_halfway = lambda slot, state: False

    error = crashed(run)

    assert "It was rolled back to where the iteration had only its batch." in error.__notes__
    assert len(files_in(tmp_path)) == 1
    run.to_end()
    assert_same(run.model.state_dict(), by_hand(case))


def trips_once(iteration: int) -> Any:
    left = [iteration]

    def trips(states):
        for state in states:
            if state.trains and state.iteration == iteration and left:
                left.clear()
                raise Planted
            yield state

    return trips


def test_ctrl_c_anywhere_in_it_leaves_the_model_where_it_was():
    """While the beginning is put in place, while it is written, while the present is put back: at 60 opcodes."""
    run = piped(Case(optimizer="AdamW", accumulate=2, max_norm=1.0)) | lt.flight_recorder("crashes")
    list(run.take(8))
    run.after("update")
    cursor, model = run.cursor, run.model
    now = everything(run)

    total = struck_at(-1, lambda: beginning.at_the_beginning(cursor, cursor.keeper.moment, lambda: None))
    for n in range(1, total + 1, max(1, total // 60)):
        with pytest.raises(KeyboardInterrupt):
            struck_at(n, lambda: beginning.at_the_beginning(cursor, cursor.keeper.moment, lambda: None))
        assert_same(everything(run), now)
    with pytest.raises(AssertionError):  # it is put in place indeed
        beginning.at_the_beginning(cursor, cursor.keeper.moment, lambda: assert_same(everything(run), now))
    assert total > 1000
    assert model.training


def everything(run: lt.Run) -> dict[str, Any]:
    """Copies of weights, buffers, gradients, the optimizer's state and the generators."""
    found = {name: value.clone() for name, value in run.model.state_dict().items()}
    found |= {f"grad {n}": p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}
    for n, state in run.optimizer.state_dict()["state"].items():
        found |= {f"state {n} {key}": value.clone() for key, value in state.items()}
    return {**found, "generator": torch.get_rng_state()}


def struck_at(n: int, action: Any) -> int:
    """Do *action*, with Ctrl-C at the n-th opcode in the files that put things in place; returns how many there are."""
    files, count, before = {beginning.__file__, moment.__file__}, 0, sys.gettrace()

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            count += 1
            if count == n:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_who_stops_the_run_wants_no_file(tmp_path, error):
    """Ctrl-C and SystemExit are no crashes."""

    def stops(model, batch, state):
        if state.iteration == 2:
            raise error
        return classify(model, batch)

    with pytest.raises(error):
        (piped(Case(), stops) | lt.flight_recorder(tmp_path)).to_end()

    assert not list(tmp_path.iterdir())


def test_the_folder_is_made_with_the_first_file_but_checked_at_once(tmp_path):
    """What cannot be made is refused when the run is built."""
    (tmp_path / "file").touch()

    len(piped(Case()) | lt.flight_recorder(tmp_path / "a" / "b"))

    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(OSError, match="file") as caught:
        len(piped(Case()) | lt.flight_recorder(tmp_path / "file" / "crashes"))
    assert "flight_recorder: cannot write to" in caught.value.__notes__[0]


def test_what_cannot_be_saved_is_refused_when_the_run_is_built(tmp_path):
    """By part and field."""

    class Keeps:
        def __call__(self, states):
            yield from states

        def state_dict(self):
            return {"function": print}

        def load_state_dict(self, state): ...

    with pytest.raises(TypeError, match="flight_recorder/parts/run/Keeps/function is a builtins.builtin"):
        len(piped(Case()) | Keeps() | lt.flight_recorder(tmp_path))


def test_bad_options():
    """They fail where they are typed."""
    with pytest.raises(ValueError, match="flight_recorder: keep must be at least 1, got 0"):
        lt.flight_recorder("crashes", keep=0)
    with pytest.raises(TypeError, match="nonfinite"):
        lt.flight_recorder("crashes", nonfinite="yes")
    with pytest.raises(TypeError, match="flight_recorder: pipe it onto the run, not onto a phase"):
        model = nn.Linear(1, 1)
        len(lt.workflow([(lt.train(model, [1], classify) | lt.flight_recorder("crashes"), 1)], max_epochs=1))


def test_it_cannot_come_later(tmp_path):
    """The beginnings of iterations are kept from the first one on."""
    run = piped(Case()) | lt.timer()
    next(run)

    with pytest.raises(RuntimeError, match="flight_recorder: it has to be there when the run is built"):
        run.insert(lt.flight_recorder(tmp_path), after="timer")


def test_two_of_them(tmp_path, monkeypatch):
    """Each leaves its file, also where the iteration had to be rolled back for the first."""
    monkeypatch.setattr(recording, "at_the_beginning", lambda *args: exec("raise MemoryError"))
    run = piped(Case()) | lt.flight_recorder(tmp_path / "a") | lt.flight_recorder(tmp_path / "b", nonfinite=False)
    run.insert(trips_once(4), before="train/average")
    run.cursor.keeper._may_be_halfway = lambda slot, state: False

    crashed(run)

    assert [len(files_in(tmp_path / name)) for name in "ab"] == [1, 1]


def test_muted_removed_and_replaced(tmp_path):
    """A muted or removed one leaves no file, a replaced one leaves it where the new one says."""
    muted = piped(Case(), fails_at(2)) | lt.flight_recorder(tmp_path / "a")
    muted.mute("flight_recorder")
    crashed(muted)
    removed = piped(Case(), fails_at(2)) | lt.flight_recorder(tmp_path / "b")
    removed.remove("flight_recorder")
    crashed(removed)
    replaced = piped(Case(), fails_at(2)) | lt.flight_recorder(tmp_path / "c")
    replaced.replace("flight_recorder", lt.flight_recorder(tmp_path / "d"))
    crashed(replaced)

    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_one_next_is_one_iteration_and_one_read(model, sgd, batches, tmp_path):
    """It fetches no second batch, and hands on the same state; the device is read for the loss, no more."""
    fetched = []
    source = (fetched.append(batch) or batch for batch in batches)
    train = lt.train(model, lambda: source, lambda model, batch: model(batch))
    run = lt.workflow([(train, lt.iterations(3))], max_iterations=3) | lt.flight_recorder(tmp_path)
    run.cursor.unsure = None

    with device_reads() as reads:
        state = next(run)
    run.close()

    assert (state.index, len(fetched), reads) == (0, 1, ["item"])


def test_it_does_nothing_to_states_that_belong_to_no_run():
    """In a pipe over hand-made states there is nothing to record."""
    states = [lt.State(phase="train", loss=torch.tensor(math.nan))]

    assert list(lt.pipe(states, lt.flight_recorder("crashes"))) == states


def test_its_log_is_not_rewound(tmp_path):
    """A row that was written in the bad iteration stays, once, and what waits for a sink still comes."""
    run = piped(Case(), nan_at(3)) | lt.log(tmp_path / "log", every=1, line=None, tensorboard=False)
    run = run | lt.flight_recorder(tmp_path)

    with pytest.warns(UserWarning, match="loss is nan"):
        run.to_end()

    rows = (tmp_path / "log" / "log.jsonl").read_text().splitlines()
    plain = piped(Case(), nan_at(3)) | lt.log(tmp_path / "plain", every=1, line=None, tensorboard=False)
    plain.to_end()
    assert len(rows) == len((tmp_path / "plain" / "log.jsonl").read_text().splitlines())


def test_other_verbs_work_with_it(tmp_path):
    """Explain, simulate, rehearse, fork; none of them leaves a file."""
    run = piped(Case()) | lt.flight_recorder(tmp_path)

    run.simulate()
    run.rehearse(1)
    run.explain()
    next(run)
    for one in run.fork(2):
        next(one)

    assert not list(tmp_path.iterdir())


def test_a_validation_with_spoilt_weights_leaves_no_file(tmp_path, model, sgd, batches):
    """It is the effect; the file of the cause stays the newest, which `reopen` takes."""

    def step(model, batch):
        return model(batch) * (math.nan if model.training and float(batch[0, 0]) == 2 else 1)

    train = lt.train(model, batches, step) | lt.optimize(sgd)
    run = lt.workflow([(train, 1), (lt.validate(model, batches, step), 1)], max_epochs=1)
    with pytest.warns(UserWarning, match="loss is nan"):
        (run | lt.flight_recorder(tmp_path)).to_end()

    assert [path.name for path in tmp_path.iterdir()] == ["crash_0001-epoch_0000-iteration_000001.pt"]
