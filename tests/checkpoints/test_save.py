"""In which order a save goes, what it leaves when it fails, and who may write into a folder."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import torch
from loops import Case, assert_same, by_hand, classify, piped
from torch import nn
from torch.optim.swa_utils import AveragedModel

import looptools as lt

save_module = importlib.import_module("looptools.checkpoints.save")
whole = importlib.import_module("looptools.archives.whole")


def names(folder):
    return sorted(path.name for path in folder.glob("*.pt"))


def listed(folder, kind="checkpoints"):
    return json.loads((folder / "checkpoints.json").read_text())[kind]


def scores(values, folder, **options):
    """A run whose validation gives *values*, one a round."""
    left = iter(values)
    val = lt.validate(None, lambda: [next(left)], lambda model, batch: {"score": batch})
    return lt.workflow([(val, 1)], max_rounds=len(values)) | lt.checkpoint(folder, **options)


@pytest.mark.parametrize("background", [False, True])
def test_old_files_go_last(tmp_path, monkeypatch, background):
    """The new one is whole, then it is listed; only then what it displaces is deleted."""
    done = []

    def recorded(name, real):
        def call(*args):
            done.append((name, Path(args[0]).name))
            return real(*args)

        return call

    run = scores([1.0, 2.0], tmp_path, keep=1, background=background, best=lt.highest("val/score"))
    next(run)
    run["checkpoint"]._saver.writer.join()
    for name in ("write", "copy", "write_manifest"):
        monkeypatch.setattr(save_module, name, recorded(name, getattr(save_module, name)))
    monkeypatch.setattr(Path, "unlink", recorded("delete", Path.unlink))
    next(run)
    run["checkpoint"]._saver.writer.join()

    old, new = "epoch_0000-iteration_000000.pt", "epoch_0000-iteration_000000-2.pt"
    done = [(name, file) for name, file in done if name != "delete" or file.endswith(".pt")]
    assert done == [("write", new), ("copy", new), ("write_manifest", tmp_path.name), ("delete", old)]
    run.close()


@pytest.mark.parametrize("which", ["checkpoint", "best", "manifest"])
def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch, which):
    """Though only one is to stay; next(run) does it again."""
    run = scores([1.0, 2.0], tmp_path, keep=1, best=lt.highest("val/score"))
    next(run)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*") if path.suffix in (".pt", ".json")}
    name = {"checkpoint": "write", "best": "copy", "manifest": "write_manifest"}[which]
    with monkeypatch.context() as patch:
        patch.setattr(save_module, name, raises)
        with pytest.raises(OSError, match="planted"):
            next(run)
    now = {name: (tmp_path / name).read_bytes() for name in before}
    del before["best.pt"], now["best.pt"]  # written over, whole
    assert now == before
    assert run.best["val/score"]["value"] == 1.0
    next(run)

    assert names(tmp_path) == ["best.pt", "epoch_0000-iteration_000000-2.pt"]
    assert run.best["val/score"]["value"] == 2.0
    assert not list(tmp_path.glob(".*"))


def raises(*args):
    raise OSError(errno.ENOSPC, "planted")


def test_what_reads_back_otherwise_displaces_nothing(tmp_path, monkeypatch):
    """The disk has said that it wrote it; the file before stays, and the new one is not there."""
    run = scores([1.0, 2.0], tmp_path, keep=1)
    next(run)
    with monkeypatch.context() as patch:
        patch.setattr(whole.Behind, "finish", lambda self, size: 0)
        with pytest.raises(OSError, match="read back"):
            next(run)

    assert names(tmp_path) == ["epoch_0000-iteration_000000.pt"]
    run.to_end()


def test_a_best_file_of_the_same_model_is_a_copy(tmp_path, monkeypatch):
    """Serialised once; one of another model, with its weights under "weights", is written."""
    done = []
    for name in ("write", "copy"):
        real = getattr(save_module, name)
        monkeypatch.setattr(save_module, name, lambda a, b, name=name, real=real: (done.append(name), real(a, b))[1])
    model, optimizer, train, val = Case().make()
    averaged = AveragedModel(model)
    phase = lt.train(model, train, classify) | lt.optimize(optimizer) | lt.ema(averaged)
    run = lt.workflow([(phase, 1), (lt.validate(averaged, val, classify), 1)], max_epochs=1)
    best = [lt.lowest("train/loss", top=2), lt.lowest("val/loss", top=2)]
    (run | lt.checkpoint(tmp_path, best=best)).to_end()

    assert done == ["write", "copy"] + ["write", "write", "copy"]  # at the end of train; of val, with the checkpoint
    assert len(names(tmp_path)) == 5


def test_names_are_unique_within_a_pass(tmp_path):
    """Validation does not count iterations."""
    run = piped(Case(epochs=1)) | lt.checkpoint(tmp_path, every=lambda state: not state.trains and state.index < 3)
    run.to_end()

    assert names(tmp_path) == [f"epoch_0001-iteration_000007{n}.pt" for n in ("-2", "-3", "")]


def test_the_manifest_says_where_each_was_saved(tmp_path):
    """Phase and batches of its pass that are done; a border ends a pass."""
    every = lambda state: state.index == 2 or state.last  # noqa: E731
    (piped(Case(epochs=1)) | lt.checkpoint(tmp_path, every=every, keep=None)).to_end()

    places = [(entry["phase"], entry["index"], entry["border"]) for entry in listed(tmp_path)]
    assert places == [("train", 3, False), ("train", 7, True), ("val", 3, False), ("val", 7, True)]


def test_an_entry_whose_file_is_gone_counts_no_more(tmp_path):
    """Set aside as damaged, or deleted by hand: as many sound ones stay as were asked for."""
    run = scores([1.0, 2.0, 3.0], tmp_path, keep=2)
    list(run.take(2))
    (tmp_path / "epoch_0000-iteration_000000-2.pt").unlink()
    run.to_end()

    assert [entry["number"] for entry in listed(tmp_path)] == [1, 3]
    assert names(tmp_path) == sorted(entry["file"] for entry in listed(tmp_path))


def test_a_temporary_file_of_a_killed_process_is_removed(tmp_path):
    """Before the first iteration."""
    (tmp_path / ".epoch_0000-iteration_000000.pt.tmp").write_bytes(b"half")
    run = scores([1.0, 2.0], tmp_path)
    next(run)

    assert not list(tmp_path.glob(".*"))
    run.to_end()


# One writer a folder

HOLDS = """
import sys, looptools as lt
from looptools.checkpoints.lock import hold
phase = lt.validate(None, [1.0], lambda model, batch: {"x": batch})
run = lt.workflow([(phase, 1)], max_rounds=1)
from pathlib import Path
hold(run.cursor, Path(sys.argv[1]))
print("holds", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def another_process(folder):
    """That holds the folder."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "holds\n"
        yield process.pid
        process.stdin.close()


@pytest.mark.skipif(os.name == "nt", reason="a locked file cannot be deleted there")
def test_a_folder_that_another_process_writes_to_is_refused(tmp_path):
    """Before the first iteration, with its number; by hand too. Afterwards it is free."""
    run = piped(Case()) | lt.checkpoint(tmp_path)
    with another_process(tmp_path) as pid:
        with pytest.raises(RuntimeError, match=rf"checkpoint: .* is being written by process {pid} on host"):
            next(run)
        assert run.progress.iteration == 0
        with pytest.raises(RuntimeError, match="is being written by process"):
            piped(Case()).save(tmp_path)
    next(run)


def test_a_run_that_rests_lets_go_and_takes_it_again(tmp_path):
    """With the next save."""
    run = scores([1.0, 2.0], tmp_path)
    with run:
        next(run)
        assert (tmp_path / "checkpoints.lock").exists()
    assert not (tmp_path / "checkpoints.lock").exists()
    next(run)
    assert (tmp_path / "checkpoints.lock").exists()
    assert next(run, None) is None
    assert not (tmp_path / "checkpoints.lock").exists()


def test_saving_by_hand_holds_the_folder_no_longer_than_it_takes(tmp_path):
    """Unless a part of the run has one: then all are let go when it rests."""
    run = piped(Case())
    next(run)
    run.save(tmp_path / "a")
    assert not (tmp_path / "a" / "checkpoints.lock").exists()

    run = piped(Case()) | lt.checkpoint(tmp_path / "b")
    next(run)
    run.save(tmp_path / "a2")
    assert (tmp_path / "b" / "checkpoints.lock").exists()
    run.close()
    assert not list(tmp_path.rglob("*.lock"))


# What cannot be saved


@attrs.define(eq=False)
class keeps:
    """A part of one's own."""

    seen: object = attrs.field(default=None, init=False)

    def __call__(self, states):
        yield from states


def test_what_is_there_already_and_cannot_be_saved_is_refused_when_the_run_is_built(tmp_path):
    """Named by part and field, before anything is trained."""

    @attrs.define(eq=False)
    class remembers(keeps):
        seen: object = attrs.field(factory=lambda: tmp_path, init=False)

    run = piped(Case()) | lt.checkpoint(tmp_path) | remembers()

    with pytest.raises(TypeError, match="checkpoint/parts/run/remembers/seen is a pathlib.PosixPath|WindowsPath"):
        next(run)
    assert not run.begun


def test_a_module_with_a_state_of_its_own_is_looked_at_too(tmp_path):
    """``get_extra_state`` may give anything."""

    class Odd(nn.Linear):
        def get_extra_state(self):
            return tmp_path

        def set_extra_state(self, state):
            pass

    phase = lt.validate(Odd(1, 1), [1.0], lambda model, batch: {"x": batch})
    run = lt.workflow([(phase, 1)], max_rounds=1) | lt.checkpoint(tmp_path)

    with pytest.raises(TypeError, match="checkpoint/models/model/_extra_state is a pathlib"):
        next(run)


def test_a_part_that_cannot_tell_yet_is_asked_at_the_save(tmp_path):
    """Its state_dict may need what the first iteration makes."""

    class late:
        def __call__(self, states):
            for state in states:
                self.total = 1
                yield state

        def state_dict(self):
            return {"total": self.total}

        def load_state_dict(self, state):
            self.total = state["total"]

    run = scores([1.0], tmp_path) | late()
    run.to_end()

    assert torch.load(tmp_path / names(tmp_path)[0], weights_only=True)["parts"]["run/late"] == {"total": 1}


def test_looking_copies_nothing(tmp_path):
    """A model of 40 MB is looked at without as much memory."""
    model = nn.Linear(10_000, 1_000)
    phase = lt.validate(model, [1.0], lambda model, batch: {"x": batch})
    run = lt.workflow([(phase, 1)], max_rounds=1) | lt.checkpoint(tmp_path)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with profiler:
        run.explain()

    assert sum(event.self_cpu_memory_usage for event in profiler.events()) < 1e6


# The newest sound one


def test_after_a_damaged_one_the_retention_still_leaves_sound_ones(tmp_path):
    """The run goes on from the one before, to the same bits."""
    list((piped(Case()) | lt.checkpoint(tmp_path, every=3, keep=2)).take(7))
    newest = tmp_path / "epoch_0000-iteration_000006.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    run = piped(Case()) | lt.checkpoint(tmp_path, every=3, keep=2)
    with pytest.warns(UserWarning, match="damaged"):
        assert run.resume().name == "epoch_0000-iteration_000003.pt"
    next(state for state in run if state.iteration == 11)
    assert names(tmp_path) == ["epoch_0001-iteration_000009.pt", "epoch_0001-iteration_000012.pt"]
    run.to_end()

    assert_same(run.model.state_dict(), by_hand(Case()))
