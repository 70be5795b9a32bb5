"""Numbers, locks and lists, where a small mistake would not be seen at once: each test was made for a planted fault."""

from __future__ import annotations

import errno
import gc
import importlib
import os
import signal
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


def training(folder, n=40, **options):
    """A run of *n* training iterations over one weight."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    phase = lt.train(model, [torch.ones(4, 1)] * n, lambda m, batch: m(batch).pow(2).mean()) | lt.optimize(sgd)
    return lt.workflow([(phase, 1)], max_epochs=1) | lt.checkpoint(folder, at_end=False, **options)


def numbers(folder):
    return [(entry["number"], entry["file"]) for entry in read_manifest(folder).checkpoints]


@pytest.fixture
def fails_once(monkeypatch):
    """A list: what is put in is raised by the next write."""
    real, errors = save_module.write, []
    monkeypatch.setattr(save_module, "write", lambda *args: _raise(errors.pop()) if errors else real(*args))
    return errors


def _raise(error):
    raise error


def failed_in_the_background(folder, fails_once):
    """A run whose second checkpoint could not be written; it has been told, and has let the folder go."""
    run = training(folder, every=2, keep=1, background=True)
    list(run.take(2))
    run["checkpoint"]._saver.writer.join()
    fails_once.append(OSError(28, "planted"))
    list(run.take(2))
    with pytest.raises(OSError, match="planted"):
        run.__exit__()
    return run


def test_what_has_failed_never_retires_a_newer_one(tmp_path, fails_once):
    """It is written late, behind a file that was saved by hand meanwhile, which stays the newest."""
    run = failed_in_the_background(tmp_path, fails_once)
    next(run)
    by_hand = run.save(tmp_path)

    run["checkpoint"]._saver.settle()

    assert numbers(tmp_path)[-1][1] == by_hand.name
    assert by_hand.exists()
    assert training(tmp_path).resume() == by_hand
    run.close()


def test_what_has_failed_is_not_written_into_a_folder_that_is_another_ones_by_now(tmp_path, fails_once):
    """The lock is asked for first."""
    run = failed_in_the_background(tmp_path, fails_once)
    other = training(tmp_path, every=1, keep=None)
    other.resume()
    list(other.take(3))
    before = numbers(tmp_path)
    next(run)

    with pytest.raises(RuntimeError, match="another run of this process has taken"):
        next(run)  # the next save is due

    assert numbers(tmp_path) == before
    run.close()
    other.close()


def test_after_an_older_file_the_numbers_go_on_behind_those_of_all_folders(tmp_path):
    """Else the branch that was left would be taken for the newest."""
    a, b = tmp_path / "a", tmp_path / "b"
    two = lambda: training(a, every=9, keep=None) | lt.checkpoint(b, every=2, keep=None, at_end=False)  # noqa: E731
    run = two()
    list(run.take(17))
    run.close()
    run = two()
    run.resume(b / "epoch_0000-iteration_000008.pt")
    next(run)  # saved in a
    run.close()

    assert two().resume().parent == a


def test_a_resumption_that_is_refused_lets_the_folder_go(tmp_path):
    """The run never began, so nobody need wait for it."""
    run = training(tmp_path, every=2)
    list(run.take(4))
    run.close()
    refused = training(tmp_path, n=41)

    with pytest.raises(RuntimeError, match="Nothing was changed"):
        refused.resume()

    assert not (tmp_path / LOCK).exists()


def test_an_error_that_passes_costs_no_file(tmp_path, monkeypatch):
    """A sound file that could not be read once is not renamed; the next process finds it again."""
    resume_module = importlib.import_module("looptools.checkpoints.resume")
    run = training(tmp_path, every=2)
    list(run.take(4))
    run.close()
    real, errors = resume_module.load, [OSError(116, "Stale file handle")]
    monkeypatch.setattr(resume_module, "load", lambda *args: _raise(errors.pop()) if errors else real(*args))

    with pytest.warns(UserWarning, match="cannot be read: Stale file handle. Trying the one before"):
        assert training(tmp_path).resume().name == "epoch_0000-iteration_000002.pt"

    assert not list(tmp_path.glob("*.damaged"))
    assert training(tmp_path).resume().name == "epoch_0000-iteration_000004.pt"


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    """Whatever the process does with its working directory."""
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    run = training("runs/x", every=2)
    list(run.take(2))
    monkeypatch.chdir(tmp_path / "other")
    list(run.take(2))
    run.close()

    assert len(list((tmp_path / "runs/x").glob("*.pt"))) == 2
    assert list((tmp_path / "other").iterdir()) == []


def test_a_signal_comes_before_a_failure_of_the_background(tmp_path, fails_once):
    """What failed is written again, the run is saved, and the process ends with 75."""
    run = training(tmp_path, every=2, keep=None, background=True)
    list(run.take(2))
    run["checkpoint"]._saver.writer.join()
    fails_once.append(OSError(28, "planted"))
    list(run.take(2))
    run["checkpoint"]._saver.writer.join()
    signal.raise_signal(signal.SIGTERM)

    with pytest.warns(UserWarning, match="Writing it again"), pytest.raises(SystemExit) as caught:
        next(run)

    assert caught.value.code == 75
    assert [name for _, name in numbers(tmp_path)] == [f"epoch_0000-iteration_00000{n}.pt" for n in (2, 4, 5)]
    run.close()


def test_two_parts_that_keep_the_same_best_are_refused(tmp_path):
    """For the second one nothing would ever be better than what the first has taken."""
    best = lt.highest("val/score")
    run = scores([1.0], tmp_path / "a", tmp_path / "b", best=best)

    with pytest.raises(ValueError, match="checkpoint: two parts keep the best 'val/score'"):
        next(run)


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    """Some network file systems refuse that of folders."""
    real = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "planted")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    run = training(tmp_path, every=1)
    next(run)
    run.close()

    assert lt.verify(tmp_path).sound
