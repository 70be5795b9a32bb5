"""Notice who waits for the device: tensors' methods, looked after while somebody counts, and not a moment longer.

A dispatch mode would miss some (``tolist``, ``repr``, what is compiled), and torch's sync debug mode needs CUDA and
goes through the user's warnings. So the methods themselves are exchanged, for the time that one action takes. They are
the process's, but only the thread that counts is looked at. What waits within an operator, as `torch.linalg.solve` does
to see whether it succeeded, is not noticed, nor is what a compiled function asks within its graph.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from threading import get_ident
from typing import Any, TypeVar

import torch
from torch import Tensor

from .blame import GENERATORS, Read, blame

T = TypeVar("T")
Judge = Callable[[tuple[Any, ...], dict[str, Any], Any], str]
MISSING: Any = object()


class Tally:
    """Who counts.

    Args:
        take: Called with each read, after it.
    """

    def __init__(self, take: Callable[[Read], None]) -> None:
        self.take = take
        self.on = True
        self.on_host = True  # whether tensors on the host count too, as if they were on a device


class _Here(threading.local):
    """What one thread is in the middle of."""

    inside = False  # a read, which makes others: they are one
    fetched: Callable[[], Any] = staticmethod(lambda: None)  # what `cpu` gave last


class _Exchange:
    """Whether methods have been exchanged, or are about to be."""

    done = False


_here = _Here()
_exchange = _Exchange()
_lock = threading.RLock()
_tallies: dict[int, tuple[Tally, ...]] = {}  # of each thread that counts


def counted(action: Callable[[], T], tally: Tally) -> T:
    """Do *action*, and give *tally* the reads that this thread makes meanwhile; those within another one do not count.

    Example:
        >>> found = []
        >>> counted(lambda: float(torch.tensor(0.5)), Tally(found.append))
        0.5
        >>> [read.how for read in found]
        ['__float__']
    """
    if any(one is tally for one in _tallies.get(get_ident(), ())):
        return action()
    try:
        return _counted(action, tally)
    finally:  # an interrupt may have come into the first clean-up, or just before it
        leave(tally)


def _counted(action: Callable[[], T], tally: Tally) -> T:
    try:
        enter(tally)
        return action()
    finally:
        leave(tally)


def enter(tally: Tally) -> None:
    """From here on this thread's reads count; `leave` must follow, whatever happens."""
    with _lock:
        mine = _tallies.get(get_ident(), ())
        _tallies[get_ident()] = mine if any(one is tally for one in mine) else (*mine, tally)
        _exchange.done = True
        for patch in PATCHES:
            patch.install()


def leave(tally: Tally) -> None:
    """The end of it; harmless if it is said twice."""
    _here.inside = False  # an interrupt may have left it
    with _lock:
        rest = tuple(one for one in _tallies.get(get_ident(), ()) if one is not tally)
        if rest:
            _tallies[get_ident()] = rest
        else:
            _tallies.pop(get_ident(), None)
        if not _tallies and _exchange.done:
            _put_back()


def _put_back() -> None:
    for patch in PATCHES:
        patch.restore()
    _exchange.done = False


def _those_who_count() -> tuple[Tally, ...]:
    """The tallies of this thread; in one of autograd's own, which goes back on a device, those of who waits for it."""
    ident = get_ident()
    found = _tallies.get(ident, ())
    if not found and len(_tallies) == 1 and all(thread.ident != ident for thread in threading.enumerate()):
        found = next(iter(_tallies.values()), ())
    return found


def _forked() -> None:
    """A process that was forked meanwhile, as workers are, counts nothing."""
    global _lock
    _lock = threading.RLock()
    _tallies.clear()
    _put_back()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class _Patch:
    """A method, or a function, and what stands in its place while somebody counts."""

    def __init__(self, owner: Any, name: str, judge: Judge) -> None:
        self.owner, self.name, self.judge = owner, name, judge
        self.found: Any = None  # what stood there before; MISSING: it is inherited
        self.ours: Any = None

    def install(self) -> None:
        """Put ours in its place, if none of ours stands there."""
        now = vars(self.owner).get(self.name, MISSING)
        if now is not self.found:  # the first time, or somebody has exchanged it since
            if hasattr(now, "stands_for"):
                return
            ours = self._around(getattr(self.owner, self.name))
            ours.stands_for = now
            self.ours, self.found = ours, now
        setattr(self.owner, self.name, self.ours)

    def restore(self) -> None:
        """Put back what stood there, unless somebody else has exchanged it since."""
        now = vars(self.owner).get(self.name)
        if now is None or (now is not self.ours and not hasattr(now, "stands_for")):
            return
        if now.stands_for is MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, now.stands_for)

    def _around(self, original: Any) -> Any:
        name, judge = self.name, self.judge

        def counting(*args: Any, **options: Any) -> Any:
            tallies = _those_who_count()
            if not tallies or _here.inside:
                return original(*args, **options)
            try:
                _here.inside = True
                result = original(*args, **options)
                kind = judge(args, options, result)
                if kind:
                    _report(name, kind, tallies)
                return result
            finally:
                _here.inside = False

        counting.__name__, counting.__doc__ = name, getattr(original, "__doc__", None)
        counting.__qualname__ = getattr(original, "__qualname__", name)
        return counting


def _report(name: str, kind: str, tallies: tuple[Tally, ...]) -> None:
    counts = [tally for tally in tallies if tally.on and (kind != "cpu" or tally.on_host)]
    read, loads = blame(name, __file__) if counts else (None, False)
    if read is not None and not (kind == "cpu" and (loads or read.file == GENERATORS)):
        for tally in counts:
            tally.take(read)


# What is waited for: the kind of device; empty for nothing. "cpu" would be a wait if the tensor were on a device.


def _tensor(args: tuple[Any, ...], options: dict[str, Any], result: Any) -> str:
    """Its values are asked for."""
    tensor = args[0] if args else next(iter(options.values()), None)
    if not isinstance(tensor, Tensor) or tensor.is_meta or _here.fetched() is tensor:
        return ""
    return str(tensor.device.type)


def _fetch(args: tuple[Any, ...], options: dict[str, Any], result: Any) -> str:
    """`cpu`: on the host it gives the very tensor, whose values may then be read without another wait."""
    kind = _tensor(args, options, result)
    _here.fetched = weakref.ref(result)
    return kind


def _move(args: tuple[Any, ...], options: dict[str, Any], result: Any) -> str:
    """`to` and `cuda`: between host and device, in either direction."""
    return _between(args[0], result, _flag(args[1:], options))


def _copy(args: tuple[Any, ...], options: dict[str, Any], result: Any) -> str:
    source = args[1] if len(args) > 1 else options.get("src")
    return _between(source, args[0], _flag(args[2:], options))


def _flag(args: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """``non_blocking``, which comes before all other flags."""
    return bool(options.get("non_blocking", next((arg for arg in args if isinstance(arg, bool)), False)))


def _between(source: Any, target: Any, non_blocking: bool) -> str:
    if non_blocking or not (isinstance(source, Tensor) and isinstance(target, Tensor)):
        return ""
    kinds = [source.device.type, target.device.type]
    return next((kind for kind in kinds if kind != "cpu"), "") if "cpu" in kinds and "meta" not in kinds else ""


def _forced(args: tuple[Any, ...], options: dict[str, Any], result: Any) -> str:
    """`numpy`: without ``force=True`` a tensor on a device is refused."""
    return _tensor(args, {}, result) if options.get("force") else ""


def _mask(args: tuple[Any, ...], options: dict[str, Any], result: Any) -> str:
    """``x[mask]``: how many elements there are must be known on the host."""
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    masks = any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in index)
    return _tensor(args, options, result) if masks else ""


def _fill_mask(args: tuple[Any, ...], options: dict[str, Any], result: Any) -> str:
    """``x[mask] = values``; one number for all is filled in without a wait."""
    several = isinstance(args[2], Tensor) and args[2].numel() != 1
    return _mask(args, options, result) if several else ""


def _device(args: tuple[Any, ...], options: dict[str, Any], result: Any) -> str:
    return "device"


SCALARS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__complex__", "__format__", "__repr__")
DEPENDENT = ("nonzero", "masked_select", "equal", "allclose", "is_nonzero", "unique", "unique_consecutive", "bincount")
PATCHES = [  # `torch.where`, which waits if it has one argument, stands in many compiled steps: they would not fit
    *(_Patch(Tensor, name, _tensor) for name in (*SCALARS, *DEPENDENT)),
    *(_Patch(torch, name, _tensor) for name in (*DEPENDENT, "argwhere")),
    _Patch(Tensor, "cpu", _fetch),
    _Patch(Tensor, "to", _move),
    _Patch(Tensor, "cuda", _move),
    _Patch(Tensor, "copy_", _copy),
    _Patch(Tensor, "numpy", _forced),
    _Patch(Tensor, "__getitem__", _mask),
    _Patch(Tensor, "__setitem__", _fill_mask),
    _Patch(torch.cuda, "synchronize", _device),
    _Patch(torch.accelerator, "synchronize", _device),
    _Patch(torch.cuda.Event, "synchronize", _device),
    _Patch(torch.cuda.Stream, "synchronize", _device),
]
