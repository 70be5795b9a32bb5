"""Find the line that waits for the device, and say it as a reader knows it."""

from __future__ import annotations

import linecache
import os
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
import torch

HOME = str(Path(__file__).parents[2]) + os.sep
TORCH = str(Path(torch.__file__).parent) + os.sep
LOADER = f"{TORCH}utils{os.sep}data{os.sep}"
GENERATORS = f"{HOME}generators.py"  # whose states are on the host
STANDARD = str(Path(sysconfig.get_paths()["stdlib"])) + os.sep
PACKAGES = ("site-packages", "dist-packages")
MADE = ("<frozen ", "<attrs ", "<eval_with_key>")  # code that stands in no file
THROUGH = {f"{HOME}means.py", f"{TORCH}_tensor.py"}  # whoever calls these asks, not they


@attrs.frozen
class Read:
    """One wait for the device.

    Args:
        how: What was called: ``item``, ``__bool__``, ``cpu``, ``nonzero`` ...
        file: The nearest file of your own or of looptools: in a notebook, the cell's.
        line: Number of the line there.
        via_file: Where it was a library that asked, torch included, its file; else empty.
        via_line: Number of the line there.

    Example:
        >>> Read("item", "/home/me/train.py", 12, "/lib/site-packages/torch/amp/grad_scaler.py", 350)
        <item at me/train.py:12, via torch/amp/grad_scaler.py:350>
    """

    how: str
    file: str
    line: int
    via_file: str = ""
    via_line: int = 0

    @property
    def where(self) -> str:
        """``file:line``, short."""
        return f"{short(self.file)}:{self.line}"

    @property
    def via(self) -> str:
        """The library's ``file:line``; empty if none stands between."""
        return f"{short(self.via_file)}:{self.via_line}" if self.via_file else ""

    @property
    def code(self) -> str:
        """What stands in the line, as far as it can be had."""
        return linecache.getline(self.file, self.line).strip()

    def __repr__(self) -> str:
        return f"<{self.how} at {self.where}{f', via {self.via}' if self.via else ''}>"


def blame(how: str, within: str) -> tuple[Read | None, bool]:
    """Who asks now, and whether a DataLoader does, or a data set for it: of these, tensors are on the host anyway.

    Args:
        how: What was called.
        within: The file of whoever wants to know, which is passed over.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (frame.f_code.co_filename == within or frame.f_code.co_filename in THROUGH):
        frame = frame.f_back
    asked = own = frame
    while own is not None and of_library(own.f_code.co_filename):
        own = own.f_back
    if asked is None:
        return None, False
    if own is None:  # a library's own thread
        own = asked
    via = (asked.f_code.co_filename, asked.f_lineno) if own is not asked else ("", 0)
    return Read(how, own.f_code.co_filename, own.f_lineno, *via), _loads(asked)


def _loads(frame: FrameType | None) -> bool:
    """Whether a DataLoader stands between looptools and *frame*."""
    while frame is not None and not frame.f_code.co_filename.startswith((HOME, LOADER)):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(LOADER)


def is_within(file: str) -> bool:
    """Whether a function of *file* is under way."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != file:
        frame = frame.f_back
    return frame is not None


@lru_cache(maxsize=1000)
def of_library(file: str) -> bool:
    """Whether *file* belongs to Python, to torch or to an installed package other than looptools."""
    if file.startswith(HOME):
        return False
    return file.startswith((TORCH, STANDARD, *MADE)) or any(f"{os.sep}{name}{os.sep}" in file for name in PACKAGES)


def short(file: str) -> str:
    """A file as a reader knows it: a cell by its number, a package's from the package on, yours from where you are.

    Example:
        >>> short("/lib/python3.11/site-packages/torch/amp/grad_scaler.py"), short("/home/me/project/train.py")
        ('torch/amp/grad_scaler.py', 'project/train.py')
    """
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    cell = (
        shell.compile.format_code_name(file) if hasattr(getattr(shell, "compile", None), "format_code_name") else None
    )
    if cell:
        return " ".join(cell)
    path = Path(file)
    for name in PACKAGES:
        if name in path.parts:
            return "/".join(path.parts[len(path.parts) - path.parts[::-1].index(name) :])
    for base in (Path(HOME).parent, Path(TORCH).parent, Path.cwd()):
        if path.is_relative_to(base):
            return path.relative_to(base).as_posix()
    return "/".join(path.parts[-2:]) if path.is_absolute() else file
