"""Saving while training goes on: copies that stay as they are, and a thread that writes them down."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, UntypedStorage
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from ..plain import CONTAINERS

T = TypeVar("T")

PIECE = 32_000  # numbers: from 32,768 on torch takes its own threads
MOST_THREADS = 4  # more would wait for Python's lock


class Buffers:
    """Memory that tensors are copied into, made once and used again for the next copy.

    Each storage is copied once and whole, as `torch.save` writes it, and its tensors are views of the copy as they were
    of the original: a file of the copy is that of the original, to the byte. What is on a CUDA device is copied into
    pinned memory.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, bool], list[UntypedStorage]] = {}  # by size, and whether it is pinned

    @property
    def bytes(self) -> int:
        """Size of all of it."""
        return sum(size * len(storages) for (size, _), storages in self._kept.items())

    def copy(self, tree: T) -> T:
        """A copy of plain containers with everything in them, in the memory that the one before had.

        What is queued on the current streams is waited for, once.
        """
        copying = _Copying(self._kept)
        copied = copying.of(tree)
        _copy_all(copying.pairs)
        for device in copying.devices:
            torch.cuda.current_stream(device).synchronize()
        self._kept = copying.used
        return copied  # type: ignore[no-any-return]


class _Copying:
    """One copy that is being made."""

    def __init__(self, free: dict[tuple[int, bool], list[UntypedStorage]]) -> None:
        self.free = free
        self.used: dict[tuple[int, bool], list[UntypedStorage]] = {}
        self.pairs: list[tuple[Tensor, Tensor]] = []  # that are still to be copied, to and from
        self.devices: set[torch.device] = set()
        self._storages: dict[int, tuple[UntypedStorage, UntypedStorage]] = {}  # the original keeps its id taken
        self._copies: dict[int, Any] = {}  # what stands in two places stands in both again

    def of(self, value: Any) -> Any:
        known = self._copies.get(id(value))
        if known is not None:
            return known
        if isinstance(value, Tensor):
            copied = self._tensor(value)
        elif type(value) in CONTAINERS:
            copied = self._container(value)
        else:
            return value
        self._copies[id(value)] = copied
        return copied

    def _container(self, value: Any) -> Any:
        kind: Any = type(value)
        if not isinstance(value, dict):
            return kind(map(self.of, value))
        copied = kind()
        for key, item in value.items():
            copied[key] = self.of(item)
        if hasattr(value, "__dict__"):  # the versions of a model's layers, on its state_dict
            vars(copied).update(self._container(vars(value)))
        return copied

    def _tensor(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta or is_lazy(tensor):
            return tensor
        if tensor.is_cuda:
            self.devices.add(tensor.device)
        odd = tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg()
        if odd or tensor.layout is not torch.strided or type(tensor) not in (Tensor, Parameter):
            return tensor.detach().clone()
        place = tensor.storage_offset(), tensor.size(), tensor.stride()
        copied = torch.empty(0, dtype=tensor.dtype, device="cpu").set_(self._storage(tensor.untyped_storage()), *place)
        if isinstance(tensor, Parameter):
            return Parameter(copied, requires_grad=tensor.requires_grad)
        return copied.requires_grad_(tensor.requires_grad)

    def _storage(self, original: UntypedStorage) -> UntypedStorage:
        if id(original) in self._storages:
            return self._storages[id(original)][1]
        size, pinned = original.nbytes(), original.device.type == "cuda"
        free = self.free.get((size, pinned))
        if free:
            copied = free.pop()
        else:
            copied = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned).untyped_storage()
        if original.device.type == "cpu":
            self.pairs.append((_numbers(copied), _numbers(original)))
        else:
            _numbers(copied).copy_(_numbers(original), non_blocking=pinned)
        self._storages[id(original)] = original, copied
        self.used.setdefault((size, pinned), []).append(copied)
        return copied


def _numbers(storage: UntypedStorage) -> Tensor:
    """A storage as one row of whole numbers, wide ones if it can be: they are copied faster than bytes."""
    dtype = torch.uint8 if storage.nbytes() % 8 else torch.int64
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage)


def _copy_all(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy on the CPU with a few threads that need not wait for each other.

    Torch's own wait for each other at the end of each tensor. Where a loader's workers keep the cores busy, that takes
    several times as long; otherwise this is as fast.
    """
    pieces = [piece for to, source in pairs for piece in zip(to.split(PIECE), source.split(PIECE), strict=True)]
    threads = min(MOST_THREADS, torch.get_num_threads(), 1 + len(pieces) // 256)  # 64 MB for each
    if threads == 1:
        _copy_each(pieces)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_copy_each, [pieces[n::threads] for n in range(threads)]))


def _copy_each(pieces: list[tuple[Tensor, Tensor]]) -> None:
    for to, source in pieces:
        to.copy_(source)


class Background:
    """Does one thing at a time in a thread of its own, which the interpreter waits for before it exits."""

    def __init__(self) -> None:
        self.error: BaseException | None = None  # what it raised, until `wait` has raised it
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether it is at it."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, action: Callable[[], object], failure: str) -> None:
        """Begin with *action*, once the one before is done.

        Args:
            action: It is called without arguments.
            failure: What to say if it raises.
        """
        self.wait()
        self._thread = threading.Thread(target=self._do, args=(action, failure), name="looptools-checkpoint")
        self._thread.start()

    def _do(self, action: Callable[[], object], failure: str) -> None:
        try:
            action()
        except BaseException as error:
            error.add_note(failure)
            _untold[id(self)] = os.getpid(), f"{failure} {type(error).__name__}: {error}"
            self.error = error

    def join(self) -> None:
        """Wait until it is done, however it went."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Wait until it is done.

        Raises:
            BaseException: What it raised, once.
        """
        self.join()
        error, self.error = self.error, None
        if error is not None:
            del _untold[id(self)]
            raise error


_untold: dict[int, tuple[int, str]] = {}  # process and words of failures that nobody has been told of


@atexit.register
def _tell() -> None:
    """Say at exit what nobody asked for any more. Not in processes that were forked from the one that failed."""
    for process, words in _untold.values():
        if process == os.getpid():
            print(f"looptools: {words}", file=sys.stderr)
