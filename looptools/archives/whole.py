"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from .trailer import END, LENGTH, announced, checksum_in, join, trailer

LARGE = 1 << 20  # bytes: pieces of this size are not copied, and have their checksum from torch
STEP = 32 << 20  # bytes: so far may writing get ahead of reading back


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Stream]:
    """What is written to the stream takes the place of *path* once it is on the disk and was read back the same.

    All that can be checked is checked while it still has its temporary name, in the same folder. So whatever fails,
    the file that was there is untouched; only if the folder itself then cannot be synced, the new one is there, whole.

    Raises:
        OSError: If it cannot be written, with errno and *path*. No temporary file is left.
    """
    temporary = _temporary(path)
    try:
        with naming(path):
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()  # left by a process that was killed; opening it would follow a link
            with FileIO(temporary, "x") as file, FileIO(temporary) as reader:
                stream = Stream(file, Behind(file, reader))
                try:
                    yield stream
                    stream.finish()
                except BaseException as error:
                    if stream.failure is None or stream.failure is error:
                        raise
                    raise stream.failure from None  # torch makes a RuntimeError of what its file raises
                finally:
                    stream.behind.stop()
            os.replace(temporary, path)
            sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an OSError from in here name *path*, which those of an open file do not."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename == str(path):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of processes that were killed. Only while nobody else writes to *folder*."""
    for pattern in (".*.pt.tmp", ".checkpoints.json.tmp"):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                path.unlink()


def sync_folder(folder: Path) -> None:
    """Make the new names in *folder* outlast a power cut.

    Windows cannot do that, and has no O_DIRECTORY; NTFS keeps a journal of names.
    """
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:  # some network file systems cannot do it with a folder
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


class Stream:
    """A file for ``torch.save``: adds up checksum and length, and keeps the exception that torch makes another one of.

    Args:
        file: What is written to.
        behind: What reads it back.

    Attributes:
        size: Bytes so far.
        crc: Their crc32.
        failure: What went wrong in `write`.
        torch_sums: Whether it is torch that writes, with checksums of its own.
    """

    def __init__(self, file: FileIO, behind: Behind) -> None:
        self.size = self.crc = 0
        self.failure: BaseException | None = None
        self.behind = behind
        self._file = file
        self._small = bytearray()
        self._record = 0  # length of a large record whose checksum is about to come
        self.torch_sums = torch.serialization.get_crc32_options()

    def write(self, data: Any) -> int:
        if self.failure is None:  # else torch writes the archive's end before it gives up
            try:
                self._take(memoryview(data).cast("B"))
            except BaseException as error:
                self.failure = error
                raise
        return len(data)

    def flush(self) -> None:
        """Torch calls it at the end; `finish` does more."""

    def _take(self, data: memoryview) -> None:
        if self._record:
            self._end_record(bytes(data))
        if len(data) < LARGE:
            if len(self._small) + len(data) > LARGE:
                self._put_small()
            self._small += data
            return
        self._put_small()
        if self.torch_sums:
            self._record = len(data)
        else:
            self.crc = zlib.crc32(data, self.crc)
        self._put(data)

    def _end_record(self, descriptor: bytes) -> None:
        """Take in the checksum of the record before, which torch has made and writes behind it.

        To make it once more would cost half as much time again as all of ``torch.save``. It is that of the memory, so
        a file that was written otherwise is found when it is read back.
        """
        length, self._record = self._record, 0
        layout = {16: "<4sIII", 24: "<4sIQQ"}.get(len(descriptor))  # the longer one from 4 GiB on
        signature, crc, *lengths = struct.unpack(layout, descriptor) if layout else (b"", 0)
        if signature != b"PK\x07\x08" or lengths != [length, length]:  # torch writes otherwise than is known here
            with FileIO(self._file.name) as file:
                file.seek(self.size - length)
                self.crc = checksum(file, length, self.crc)
        else:
            self.crc = join(self.crc, crc, length)

    def _put_small(self) -> None:
        self.crc = zlib.crc32(self._small, self.crc)
        small, self._small = self._small, bytearray()
        self._put(memoryview(small))

    def _put(self, data: memoryview) -> None:
        while data:
            written = self._file.write(data)
            self.size += written
            data = data[written:]
        self.behind.follow(self.size)

    def copy(self, source: FileIO) -> None:
        """Write what *source* holds, a checkpoint: its trailer says what must be read back."""
        buffer, end = memoryview(bytearray(LARGE)), b""
        while count := source.readinto(buffer):
            end = (end + bytes(buffer[max(0, count - LENGTH) : count]))[-LENGTH:]
            self._put(buffer[:count])
        crc = checksum_in(end)
        if crc is None:
            raise OSError(errno.EIO, "what is to be copied is no whole checkpoint")
        self.crc = zlib.crc32(end, crc)

    def seal(self) -> None:
        """Put the trailer behind the archive."""
        end = announced(bytes(self._small[-END:]))
        self._small[-END:] = end
        self._put_small()
        self._small += trailer(self.size, self.crc)

    def finish(self) -> None:
        """Have all of it on the disk, and see that it reads the same.

        Raises:
            OSError: If not.
        """
        if self._record:
            self._end_record(b"")
        self._put_small()
        if self.behind.finish(self.size) != self.crc:
            raise OSError(errno.EIO, "what was read back is not what was written")


class Behind:
    """Reads back what was written, and has the disk begin with it, while more of a large file is being written.

    By reads and not by a memory map, in which an error of the disk would kill the process.
    """

    def __init__(self, file: FileIO, reader: FileIO) -> None:
        self._file, self._reader = file, reader
        self._reading, self._syncing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)  # each in order
        self._jobs: list[Future[None]] = []
        self._asked = self._read_to = self._crc = 0

    def follow(self, size: int) -> None:
        """*size* bytes have been written."""
        if size - self._asked >= STEP:
            self._asked = size
            self._later(self._reading, self._read, size)
            self._later(self._syncing, getattr(os, "fdatasync", os.fsync), self._file.fileno())

    def finish(self, size: int) -> int:
        """Have all *size* bytes on the disk; returns the checksum of what was read back."""
        if self._asked:
            self._later(self._reading, self._read, size)
        os.fsync(self._file.fileno())
        for job in self._jobs:
            job.result()
        self._read(size)
        return self._crc

    def stop(self) -> None:
        """Have no thread left."""
        for pool in (self._reading, self._syncing):
            pool.shutdown(cancel_futures=True)

    def _read(self, size: int) -> None:
        self._crc = checksum(self._reader, size - self._read_to, self._crc)
        self._read_to = size

    def _later(self, pool: ThreadPoolExecutor, job: Callable[..., None], *args: Any) -> None:
        try:
            self._jobs.append(pool.submit(job, *args))
        except RuntimeError:  # the interpreter goes down, and starts no more threads
            pool.shutdown()
            job(*args)


def checksum(file: FileIO, length: int, crc: int = 0) -> int:
    """The crc32 of the next *length* bytes of a file, or of as many as there are.

    Example:
        >>> (folder / "digits").write_bytes(b"123456789")
        9
        >>> with FileIO(folder / "digits") as file:
        ...     f"{checksum(file, 100):08x}"
        'cbf43926'
    """
    buffer = memoryview(bytearray(min(length, LARGE)))
    while length and (count := file.readinto(buffer[:length])):
        crc = zlib.crc32(buffer[:count], crc)
        length -= count
    return crc
