"""One writer a folder, also among processes that die."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
import types

import pytest

import looptools as lt
from looptools.checkpoints import lock
from looptools.checkpoints.lock import Locked, alone, hold, let_go


def run():
    return lt.workflow([(lt.validate(None, [1.0], lambda model, batch: {"x": batch}), 1)], max_rounds=9)


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def held_by_nobody(folder):
    with alone(folder) as free:
        return free


@contextlib.contextmanager
def other(folder, code="sys.stdin.read()"):
    """Another process that holds the folder's lock, until it has done *code*."""
    source = """
        import os, sys, time
        from pathlib import Path
        import looptools as lt
        from looptools.checkpoints.lock import hold
        run = lt.workflow([(lt.validate(None, [1.0], lambda model, batch: 0.0), 1)], max_rounds=1)
        folder = Path(sys.argv[1])
        hold(run.cursor, folder)
        print("held", flush=True)
    """
    source = textwrap.dedent(source) + textwrap.dedent(code)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", source, folder], **pipes) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_the_lock_is_a_file_as_long_as_the_run_is_open(tmp_path):
    """It says who has it; a folder that nobody writes to has none."""
    one = run()
    hold(one.cursor, tmp_path)
    hold(one.cursor, tmp_path)  # harmless

    assert f"process {os.getpid()} on host " in (tmp_path / "checkpoints.lock").read_text()
    let_go(one.cursor)
    assert left(tmp_path) == []
    hold(one.cursor, tmp_path / "new/folder")
    let_go(one.cursor)


def test_a_second_process_is_refused_and_told_who_has_it(tmp_path):
    """Until the first one has ended, by whatever way: the system takes a lock back."""
    with other(tmp_path) as process:
        named = rf"^checkpoint: {tmp_path} is being written by process {process.pid} on host \S+ since 20"
        with pytest.raises(Locked, match=named):
            hold(run().cursor, tmp_path)
        assert not held_by_nobody(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert left(tmp_path) == ["checkpoints.lock"]

        one = run()
        hold(one.cursor, tmp_path)
        assert str(os.getpid()) in (tmp_path / "checkpoints.lock").read_text()
        let_go(one.cursor)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork")
def test_a_worker_that_outlives_a_killed_process_does_not_keep_the_folder(tmp_path):
    """A DataLoader's worker is forked, and has all that was open then; here it lives on for long."""
    code = """
        from torch.utils.data import DataLoader
        class Slow:
            def __len__(self): return 100
            def __getitem__(self, index):
                print("worker", os.getpid(), flush=True)
                time.sleep(600)
        next(iter(DataLoader(Slow(), num_workers=1, multiprocessing_context="fork")))
    """
    with other(tmp_path, code) as process:
        worker = int(process.stdout.readline().split()[1])
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        try:
            os.kill(worker, 0)  # it lives
            one = run()
            hold(one.cursor, tmp_path)
            let_go(one.cursor)
        finally:
            os.kill(worker, signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork")
def test_a_forked_child_neither_has_the_lock_nor_takes_it_away(tmp_path):
    """What it lets go of is not its own, and its parent's lock stands when it has ended."""
    code = """
        from looptools.checkpoints import lock
        child = os.fork()
        if not child:
            lock.let_go(run.cursor)
            try:
                hold(run.cursor, folder)
            except lock.Locked as error:
                print(str(os.getppid()) in str(error), flush=True)
            sys.exit()
        os.waitpid(child, 0)
        print("done", flush=True)
        sys.stdin.read()
    """
    with other(tmp_path, code) as process:
        assert [process.stdout.readline() for _ in range(2)] == ["True\n", "done\n"]
        assert left(tmp_path) == ["checkpoints.lock"]
        with pytest.raises(Locked, match=f"process {process.pid}"):
            hold(run().cursor, tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork")
def test_what_a_dead_process_still_holds_is_waited_for(tmp_path):
    """It was killed while it forked: a moment later its child is gone, and the lock with it."""
    code = """
        import re, subprocess
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        path = folder / "checkpoints.lock"
        path.write_text(re.sub(r"process [0-9]+", f"process {gone.pid}", path.read_text()))
        print("ready", flush=True)
        time.sleep(0.5)
        os._exit(0)
    """
    with other(tmp_path, code) as process:
        assert process.stdout.readline() == "ready\n"
        one = run()
        hold(one.cursor, tmp_path)
        let_go(one.cursor)


def test_a_process_that_ends_leaves_no_file(tmp_path):
    """Also if it never closed its run."""
    with other(tmp_path, "sys.exit()") as process:
        process.wait()

    assert left(tmp_path) == []


def test_in_one_process_the_newer_run_takes_over(tmp_path):
    """A notebook's cell is run again: the run of before is refused from then on, and says why."""
    old, new = run(), run()
    hold(old.cursor, tmp_path)
    hold(new.cursor, tmp_path)

    for _ in range(2):
        with pytest.raises(Locked, match=rf"^checkpoint: another run of this process has taken {tmp_path} over"):
            hold(old.cursor, tmp_path)
        let_go(old.cursor)
    assert left(tmp_path) == ["checkpoints.lock"]
    let_go(new.cursor)
    assert left(tmp_path) == []


def test_a_run_at_work_keeps_its_folder(tmp_path):
    """The other one is begun inside of it, or in another thread."""
    old, new = run(), run()
    hold(old.cursor, tmp_path)
    with pytest.raises(Locked, match="by another run of this process, which is at work"):
        old.cursor.work(lambda: hold(new.cursor, tmp_path))

    hold(old.cursor, tmp_path)
    let_go(old.cursor)


def test_with_a_run_that_is_collected_goes_its_lock(tmp_path):
    """Nobody has to close it."""
    one = run()
    hold(one.cursor, tmp_path)
    del one
    gc.collect()

    assert left(tmp_path) == []
    assert held_by_nobody(tmp_path)


def test_two_folders_are_let_go_together(tmp_path):
    """One that another name leads to is the same one."""
    one, two = run(), run()
    for name in ("a", "b"):
        hold(one.cursor, tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    hold(one.cursor, tmp_path / "link")
    hold(two.cursor, tmp_path / "c")
    let_go(one.cursor)

    assert [left(tmp_path / name) for name in "abc"] == [[], [], ["checkpoints.lock"]]
    let_go(two.cursor)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows deletes no open file")
def test_a_folder_that_was_deleted_is_taken_anew(tmp_path):
    """The lock of before was on a file that is gone."""
    one = run()
    hold(one.cursor, tmp_path / "a")
    (tmp_path / "a/checkpoints.lock").unlink()
    (tmp_path / "a").rmdir()
    hold(one.cursor, tmp_path / "a")

    assert left(tmp_path / "a") == ["checkpoints.lock"]
    let_go(one.cursor)


@pytest.mark.skipif(lock.fcntl is None, reason="only where there is flock")
def test_whoever_waits_for_a_file_that_was_deleted_makes_its_own(tmp_path, monkeypatch):
    """It was opened before its holder deleted it, and locked after."""
    path, real, times = tmp_path / "checkpoints.lock", lock.fcntl.flock, []

    def flock(descriptor, how):
        if not times:
            path.unlink()
        times.append(descriptor)
        real(descriptor, how)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    one = run()
    hold(one.cursor, tmp_path)

    assert (len(times), left(tmp_path)) == (2, ["checkpoints.lock"])
    let_go(one.cursor)


def say_once(folder, why):
    """A warning the first time; two runs go on all the same, one after the other."""
    one, two = run(), run()
    with pytest.warns(UserWarning, match=rf"^checkpoint: {folder} cannot be locked \({why}\): see to it"):
        hold(one.cursor, folder)
    hold(two.cursor, folder)
    with pytest.raises(Locked):
        hold(one.cursor, folder)
    let_go(two.cursor)
    assert held_by_nobody(folder)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, number):
    """As some network file systems are."""

    def flock(descriptor, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock, "fcntl", types.SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4))
    say_once(tmp_path, os.strerror(number))


def test_a_python_without_locks_is_said_once(tmp_path, monkeypatch):
    """Neither fcntl nor msvcrt."""
    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "msvcrt", None)
    say_once(tmp_path, "Python has no file locks here")


def test_other_errors_are_raised_with_the_path(tmp_path, monkeypatch):
    """A disk that fails is not a file system without locks."""

    def flock(descriptor, how):
        raise OSError(errno.EIO, "planted")

    monkeypatch.setattr(lock, "fcntl", types.SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4))
    with pytest.raises(OSError, match=r"planted: '.*checkpoints.lock'"):
        hold(run().cursor, tmp_path)
    with alone(tmp_path) as free:
        assert not free


def test_windows_locks_a_byte_that_nobody_reads(tmp_path, monkeypatch):
    """It has no flock; what is locked there cannot be read, and the text must be."""
    taken = set()

    def locking(descriptor, mode, count):
        place = os.lseek(descriptor, 0, os.SEEK_CUR)
        if (place, count) in taken:
            raise PermissionError(errno.EACCES, "Permission denied")
        taken.add((place, count))

    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    one = run()
    hold(one.cursor, tmp_path)
    [(place, count)] = taken
    text = (tmp_path / "checkpoints.lock").read_text()
    assert text.startswith("process ")
    assert (place > 1 << 20, count) == (True, 1)

    lock._HELD.clear()  # as another process sees it
    with pytest.raises(Locked, match=f"is being written by {text.partition(' since')[0]}"):
        hold(run().cursor, tmp_path)


def test_a_run_refuses_before_its_first_iteration(tmp_path):
    """The checkpoint part takes the lock when the run begins, and lets go when it ends."""
    done = []

    def spy(states):
        for state in states:
            done.append(state)
            yield state

    with other(tmp_path), pytest.raises(Locked, match="is being written by process"):
        next(run() | spy | lt.checkpoint(tmp_path))
    assert done == []

    one = run() | lt.checkpoint(tmp_path, keep=1)
    next(one)
    assert "checkpoints.lock" in left(tmp_path)
    one.to_end()
    assert "checkpoints.lock" not in left(tmp_path)
