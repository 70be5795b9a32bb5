"""Files that grow by whole lines, and make room for those of another run."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import BinaryIO


class GrowingFile:
    """A text file that is opened when it first grows, and again after ``close()``.

    Example:
        >>> file = GrowingFile(folder / "notes.txt")
        >>> file.append("one")
        >>> file.size()
        3
        >>> file.close()
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def append(self, text: str) -> None:
        """Write *text* at the end, whole or not at all, so that it can be written again after a failure."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        size = self.size()
        try:
            self._file.write(text.encode())
            self._file.flush()
        except BaseException:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                file.close()  # tries once more to write what is left, and may fail once more
            self.cut(size)
            raise

    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Drop what lies behind the first *size* bytes."""
        self.close()
        if self.size() > size:
            os.truncate(self.path, size)

    def rewrite(self, text: str) -> None:
        """Put *text* in the place of all that was written; a reader sees the old file or the new one."""
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(f"{self.path.name}.new")
        new.write_bytes(text.encode())
        os.replace(new, self.path)

    def set_aside(self) -> None:
        """Rename a file that another run left, to the first free ``log.1.jsonl``, ``log.2.jsonl`` ..."""
        self.close()
        if self.size():
            set_aside(self.path)

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()


def set_aside(path: Path) -> None:
    """Rename *path* to the first free name with a number in it."""
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
