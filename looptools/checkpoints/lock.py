"""One writer a folder: a run holds a lock on the folders that it saves into, as long as it is open.

The system takes the lock back when the process dies, however it dies.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import time
import weakref
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from ..archives.whole import naming
from ..cursor import Cursor
from ..warn import warn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:  # everywhere else
    msvcrt = None  # type: ignore[assignment]

LOCK = "checkpoints.lock"
FAR = 1 << 30  # Windows lets nobody read what is locked; so a byte far behind the text is
PATIENCE = 10.0  # seconds that a dead process may need to let go of its last descriptor
TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class Locked(RuntimeError):  # noqa: N818 - a folder is
    """A folder that another run is writing to."""


class _Hold:
    """The lock on one folder, and whose it is."""

    def __init__(self, path: Path, file: FileIO | None) -> None:
        self.path, self.file = path, file
        self.owner: weakref.ref[Cursor] | None = None
        self.end: Any = None  # what lets go when its run is collected

    def give(self, cursor: Cursor) -> None:
        if self.end is not None:
            self.end.detach()
        self.owner, self.end = weakref.ref(cursor), weakref.finalize(cursor, self.release)

    def release(self) -> None:
        _HELD.pop(self.path, None)
        if self.end is not None:
            self.end.detach()
        if self.file is not None:
            _unlock(self.path, self.file)


_HELD: dict[Path, _Hold] = {}
_LAST: dict[Path, weakref.ref[Cursor]] = {}  # who held it last
_LOST: weakref.WeakKeyDictionary[Cursor, set[Path]] = weakref.WeakKeyDictionary()
_SAID: set[Path] = set()  # folders without locks


def hold(cursor: Cursor, folder: Path) -> None:
    """Have *cursor*'s run be the only one that writes to *folder*; harmless if it is already.

    Within one process a run takes the lock over from one that is not at work, as when a notebook's cell is run again;
    that one is refused from then on.

    Raises:
        Locked: If another run writes there, with its process, host and time.
        OSError: If the folder cannot be made, or have a file in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / LOCK
    if path in _LOST.get(cursor, ()):
        raise Locked(f"checkpoint: another run of this process has taken {folder} over. Go on with that one.")
    held = _HELD.get(path)
    owner = held.owner() if held is not None and held.owner is not None else None  # from here on it stays
    if held is not None and _HELD.get(path) is not held:
        held = None
    with naming(path):
        if held is not None and held.file is not None and not _is_at(path, held.file):  # the folder was made anew
            held.release()
            held = owner = None
        if held is None:
            held = _HELD[path] = _Hold(path, _lock(path))
    if owner is cursor:
        return
    if owner is not None and owner._working:
        raise Locked(f"checkpoint: {folder} is being written by another run of this process, which is at work.")
    last = _LAST[path]() if path in _LAST else None
    if last is not None and last is not cursor:  # also if it rests, and holds nothing
        _LOST.setdefault(last, set()).add(path)
    _LAST[path] = weakref.ref(cursor)
    held.give(cursor)


def let_go(cursor: Cursor) -> None:
    """Let others write to the folders of *cursor*'s run: it rests, or is over."""
    for held in [held for held in _HELD.values() if held.owner is not None and held.owner() is cursor]:
        held.release()


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Whether nobody outside this process writes to *folder*, and nobody can meanwhile."""
    path = folder.resolve() / LOCK
    if path in _HELD:
        yield True
        return
    try:
        file = _lock(path)
    except (Locked, OSError):
        yield False
        return
    try:
        yield True
    finally:
        if file is not None:
            _unlock(path, file)


def _lock(path: Path) -> FileIO | None:
    """Make and lock the file; None where there are no locks, which is said once."""
    until = time.monotonic() + PATIENCE
    while True:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(FileIO(path, "r+", opener=_make))
            try:
                _try(file)
            except OSError as error:
                if error.errno in TAKEN:
                    who = _who(file)
                    if _is_dead(who) and time.monotonic() < until:  # a child that it was just forking is still going
                        time.sleep(0.02)
                        continue
                    said = f"{path.parent} is being written by {who}"
                    raise Locked(f"checkpoint: {said}. Give each run its own folder.") from None
                if error.errno in NO_LOCKS:
                    _say_none(path.parent, str(error.strerror))
                    return None
                raise
            if _is_at(path, file):  # else whoever held it has deleted it since
                with contextlib.suppress(OSError):  # it is only for whoever comes second
                    file.truncate(0)
                    file.write(_me().encode())
                stack.pop_all()
                return file


def _make(path: str, flags: int) -> int:
    """Open it, made if missing, with what is in it."""
    return os.open(path, flags | os.O_CREAT, 0o666)


def _me() -> str:
    return f"process {os.getpid()} on host {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"


def _try(file: FileIO) -> None:
    if fcntl is not None:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    elif msvcrt is not None:
        file.seek(FAR)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)
    else:
        raise OSError(errno.ENOSYS, "Python has no file locks here")


def _is_at(path: Path, file: FileIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _is_dead(who: str) -> bool:
    """Whether it is a process of this machine that is gone."""
    found = re.match(r"process (\d+) on host (\S+) since", who)
    if found is None or found[2] != socket.gethostname() or fcntl is None:  # Windows would send a signal
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _who(file: FileIO) -> str:
    try:
        file.seek(0)
        return file.read(500).decode(errors="replace") or "another process"
    except OSError:
        return "another process"


def _say_none(folder: Path, why: str) -> None:
    if folder not in _SAID:
        _SAID.add(folder)
        warn(f"checkpoint: {folder} cannot be locked ({why}): see to it that no second run writes there.")


def _unlock(path: Path, file: FileIO) -> None:
    """Delete the file while it is locked, so that a look at the folder says that nobody writes there; then let go."""
    with contextlib.suppress(OSError):  # Windows deletes no open file; the next one takes it over
        if _is_at(path, file):
            path.unlink()
    with contextlib.suppress(OSError):
        file.close()


def _forked() -> None:
    """In a child, as a DataLoader's worker is: the lock stays its parent's, and must not outlive it."""
    for held in _HELD.values():
        if held.end is not None:
            held.end.detach()
        if held.file is not None:
            held.file.close()
    _HELD.clear()


if hasattr(os, "register_at_fork"):  # Windows cannot fork
    os.register_at_fork(after_in_child=_forked)
