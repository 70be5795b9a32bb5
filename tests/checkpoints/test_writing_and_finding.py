"""Numbers, locks and lists, where a small mistake would not be seen at once: each test was made for a planted fault."""

from __future__ import annotations

import gc
import importlib
import os
import threading

import pytest
import torch

import looptools as lt
from looptools.checkpoints.background import Background
from looptools.checkpoints.lock import LOCK
from looptools.checkpoints.manifest import read_manifest

save_module = importlib.import_module("looptools.checkpoints.save")


def scores(values, *folders, **options):
    left = iter(values)
    run = lt.workflow(
        [(lt.validate(None, lambda: [next(left)], lambda m, batch: {"score": batch}), 1)], max_rounds=len(values)
    )
    for folder in folders:
        run = run | lt.checkpoint(folder, **options)
    return run


def test_numbers_go_on_behind_the_newest_after_an_older_file(tmp_path):
    """Resumed from an older file, what is saved next is the newest all the same."""
    list(scores([1.0] * 4, tmp_path, keep=None).take(3))
    gc.collect()
    run = scores([1.0] * 4, tmp_path, keep=None)
    run.resume(tmp_path / "epoch_0000-iteration_000000.pt")
    next(run)
    assert [e["number"] for e in read_manifest(tmp_path).checkpoints] == [1, 2, 3, 4]


def test_saving_an_ended_run_by_hand_leaves_no_lock(tmp_path):
    """The folder is free for others at once."""
    run = scores([1.0], tmp_path / "a")
    run.to_end()
    run.save(tmp_path / "b")
    assert not (tmp_path / "b" / LOCK).exists()


def test_a_folder_by_another_name_is_waited_for(tmp_path, monkeypatch):
    """A link to the folder that is still being written to is the same folder."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    go, real = threading.Event(), save_module.write
    monkeypatch.setattr(save_module, "write", lambda *args: go.wait(60) and real(*args))
    run = scores([1.0, 2.0], tmp_path / "real", background=True)
    next(run)
    threading.Timer(0.2, go.set).start()
    run2 = scores([1.0, 2.0], tmp_path / "link")
    assert run2.resume() is not None  # of the run that was still writing


@pytest.mark.parametrize("own", [True, False])
def test_damaged_files_go_off_the_list_of_ones_own_folder_only(tmp_path, own):
    """A folder that is only given to look into is left as it is."""
    list(scores([1.0] * 3, tmp_path).take(2))
    gc.collect()
    newest = tmp_path / "epoch_0000-iteration_000000-2.pt"
    newest.write_bytes(b"broken")
    run = scores([1.0] * 3, tmp_path)
    with pytest.warns(UserWarning, match="Trying the one before"):
        run.resume(None if own else tmp_path)
    assert newest.exists() is not own
    assert [e["number"] for e in read_manifest(tmp_path).checkpoints] == ([1] if own else [1, 2])


def test_of_two_runs_folders_that_with_the_newer_one_counts(tmp_path):
    """Of two runs folders that with the newer one counts."""
    a, b = tmp_path / "a", tmp_path / "b"
    next(scores([1.0] * 3, a))
    list(scores([1.0] * 3, b).take(2))
    gc.collect()
    assert scores([1.0] * 3, a, b).resume().parent == b


def test_the_end_is_saved_though_the_write_of_it_has_failed(tmp_path, monkeypatch):
    """The end is saved though the write of it has failed."""
    real, fails = save_module.write, [OSError(28, "planted")]

    def write(*args):
        if fails:
            raise fails.pop()
        return real(*args)

    monkeypatch.setattr(save_module, "write", write)
    run = scores([1.0, 2.0], tmp_path, background=True)
    next(run)
    saver = run["checkpoint"]._saver
    saver.writer.join()
    with pytest.raises(OSError):
        saver.settle()
    assert saver.trained is None
    saver.settle()
    assert saver.trained == 0


def test_what_a_pass_on_demand_judges_is_saved_too(tmp_path):
    """What a pass on demand judges is saved too."""
    run = scores([1.0, 2.0], tmp_path)
    next(run)
    first = run["checkpoint"].save_now(run)
    run.validate(lt.validate(None, [5.0], lambda m, batch: {"score": batch}).on([5.0]))
    second = run["checkpoint"].save_now(run)
    assert second != first
    assert len(torch.load(second, weights_only=True)["history"]) == 2


def test_a_failure_is_said_by_the_process_that_has_it_only(capfd):
    """A failure is said by the process that has it only."""
    doing = Background()
    doing.start(lambda: 1 / 0, "planted.")
    doing.join()
    child = os.fork()
    if not child:
        importlib.import_module("looptools.checkpoints.background")._tell()
        os._exit(0)
    os.waitpid(child, 0)
    assert capfd.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):
        doing.wait()


def test_a_folder_is_let_go_when_its_last_write_is_over(tmp_path, monkeypatch):
    """A folder is let go when its last write is over."""
    real, locked = save_module.write, []

    def write(path, tree):
        threading.Event().wait(0.3)
        locked.append((tmp_path / LOCK).exists())
        return real(path, tree)

    monkeypatch.setattr(save_module, "write", write)
    with scores([1.0, 2.0], tmp_path, background=True) as run:
        next(run)
    assert locked == [True]
