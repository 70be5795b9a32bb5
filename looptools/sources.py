"""Where batches come from: an object, not a generator, so that its place survives every exception."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn import Module
from torch.utils.data import DataLoader, IterableDataset

from .devices import move
from .generators import get_generators, set_generators
from .interrupts import deaf_workers
from .modes import put_back, torch_modes

END: Any = object()  # what fetch gives when the source is exhausted
_NOTHING: Any = object()


def trusted_len(source: Any) -> int | None:
    """How many batches *source* gives a pass, where its ``len`` can be believed.

    That of a DataLoader over an IterableDataset cannot: it is the data set's own guess.
    """
    if isinstance(source, DataLoader) and isinstance(source.dataset, IterableDataset):
        return None
    try:
        return len(source)
    except (TypeError, NotImplementedError):
        return None


def check_source(where: str, source: Any) -> None:
    """Refuse what cannot be walked through where it is typed."""
    if isinstance(source, type):
        raise TypeError(f"{where}: source is the class {source.__name__}; give an instance of it.")
    if isinstance(source, Module):
        raise TypeError(f"{where}: source is a module. The model comes first: {where}(model, source, step).")
    if not callable(source) and not hasattr(source, "__iter__") and not hasattr(source, "__getitem__"):
        raise TypeError(f"{where}: source must be an iterable of batches or a function that makes one, got {source!r}.")


class Source:
    """Walks through a phase's data, as often as it is asked to.

    Args:
        given: An iterable of batches, or a function without arguments that is called for each walk.
        name: The phase's name, for errors.
        limit: Batches after which a walk ends early.
        non_blocking: Whether tensors are moved without waiting.
    """

    def __init__(self, given: Any, name: str, limit: int | None = None, non_blocking: bool = False) -> None:
        self.given = given
        self.name = name
        self.limit = limit
        self.non_blocking = non_blocking
        self.device: torch.device | None = None  # where batches are moved to
        self.begun = 0  # walks begun so far
        self.taken = 0  # batches taken of the walk that goes on
        self._iterator: Iterator[Any] | None = None
        self._ahead: Any = _NOTHING
        self._unmoved: Any = _NOTHING  # taken out of the iterator, but not yet on its device
        self._may_leak = False
        self._at_start: dict[str, Any] | None = None  # the random generators before the walk began
        self._failed = False
        whole = None if self._makes_its_own else trusted_len(given)
        self.length = limit if whole is not None and limit is not None and limit < whole else whole
        if self.length == 0:
            raise ValueError(f"{name}: its source is empty (len 0). Is the data set smaller than one batch?")

    @property
    def _makes_its_own(self) -> bool:
        return callable(self.given) and not hasattr(self.given, "__iter__") and not hasattr(self.given, "__getitem__")

    @property
    def under_way(self) -> bool:
        """Whether a walk has begun and has not been seen to end."""
        return self._iterator is not None or self._failed

    def begin(self) -> None:
        """Start a walk from the first batch.

        Raises:
            RuntimeError: If the source can be walked through only once, and was.
        """
        keeps = isinstance(self.given, DataLoader) and self.given.persistent_workers
        resets = keeps and (self.begun > 0 or self.given._iterator is not None)
        self._at_start = {"process": get_generators(), "own": self.own_generators(), "resets": resets}
        self._iterator = self._iterate(self.begun)
        self.begun += 1
        self.taken = 0
        self._ahead = self._unmoved = _NOTHING
        self._failed = False

    def _iterate(self, walk: int) -> Iterator[Any]:
        iterable: Iterable[Any] = self.given() if self._makes_its_own else self.given
        if not hasattr(iterable, "__iter__") and not hasattr(iterable, "__getitem__"):
            raise TypeError(f"{self.name}: its source must be an iterable of batches, got {iterable!r}.")
        for sampler in _samplers(iterable):
            sampler.set_epoch(walk)
        if isinstance(iterable, DataLoader) and iterable.num_workers > 0:
            with deaf_workers(iterable):
                if iterable is self.given and iterable._iterator is None and self._start["resets"]:
                    iter(iterable)  # its workers were let go: the first iterator draws a seed, which a reset does not
                    self._set_generators()
                return iter(iterable)
        iterator = iter(iterable)
        by_index = isinstance(iterable, DataLoader) and not isinstance(iterable.dataset, IterableDataset)
        self._may_leak = not (by_index or isinstance(iterable, list | tuple))
        if iterator is iterable and walk > 0 and not self._makes_its_own:
            kind = type(iterable).__name__
            raise RuntimeError(
                f"{self.name}: its source is a {kind}, which is spent after one pass. "
                "Give a function that makes it anew (lambda: ...), or a list."
            )
        return iterator

    def fetch(self) -> Any:
        """The next batch, moved to its device; `END` if the walk is over."""
        if self._ahead is not _NOTHING:
            batch, self._ahead = self._ahead, _NOTHING
            self.taken += batch is not END
            return batch
        if self._failed:
            self.replay()
        if self._iterator is None or (self.limit is not None and self.taken >= self.limit):
            self._iterator = None
            return END
        if self._unmoved is not _NOTHING:
            batch = self._unmoved
        else:
            modes = torch_modes() if self._may_leak else None
            try:
                batch = next(self._iterator, END)
            except BaseException:
                self._failed = True
                raise
            if modes is not None and modes != torch_modes():
                self._refuse_leak(modes)
            if self.length is not None and (batch is END) is (self.taken < self.length):
                self._refuse_length()
        if batch is END:
            self._iterator = None
            return END
        if self.device is not None:
            self._unmoved = batch  # kept, in case that moving fails
            batch = move(batch, self.device, self.non_blocking)
            self._unmoved = _NOTHING
        self.taken += 1
        return batch

    def _refuse_leak(self, modes: tuple[bool, ...]) -> None:
        self._failed = True
        if isinstance(self._iterator, types.GeneratorType):
            self._iterator.close()  # leaves its `with`
        put_back(modes)
        raise RuntimeError(
            f"{self.name}: its source left gradients, inference_mode or autocast switched. Move its yield out of the "
            "`with torch.no_grad():` block; only the work goes inside."
        )

    def peek(self) -> bool:
        """Whether another batch comes; fetches it if need be."""
        if self._ahead is _NOTHING:
            batch = self.fetch()
            self.taken -= batch is not END
            self._ahead = batch
        return self._ahead is not END

    def _refuse_length(self) -> None:
        if self.taken < (self.length or 0):
            raise RuntimeError(
                f"{self.name}: its source has len {self.length}, but ended after {self.taken} batches. Schedules and "
                "progress count on that number: mend __len__, or hide it with a function (lambda: iter(source))."
            )
        raise RuntimeError(f"{self.name}: its source has len {self.length}, but gives more batches than that.")

    def replay(self) -> None:
        """Walk again to where the walk stood: the same order, and the batch that comes next is the same.

        Batches that were taken are made once more and thrown away. The process's generators end up as they are now.

        Raises:
            RuntimeError: If the source can be walked through only once.
        """
        now, taken, start = get_generators(), self.taken, self._at_start
        if start is None:
            return
        if self._iterator is not None and self._iterator is self.given:  # it can only go on
            if isinstance(self.given, types.GeneratorType) and self.given.gi_frame is None:
                raise RuntimeError(
                    f"{self.name}: its source is a generator, and the exception ended it. Give a function that makes "
                    "it anew (lambda: ...), and its place can be found again."
                )
            self._failed = False
            return
        self._set_generators()
        self._iterator = self._iterate(self.begun - 1)
        for _ in range(taken):
            try:
                if next(self._iterator, END) is END:
                    raise RuntimeError(f"{self.name}: its source gave fewer batches than before; it had given {taken}.")
            except (KeyboardInterrupt, SystemExit):
                raise
            except Exception:  # a batch that failed and was skipped fails again
                if isinstance(self._iterator, types.GeneratorType):
                    raise
        self._failed = False
        self._ahead = self._unmoved = _NOTHING
        if taken:  # at the first batch the order is drawn; it must be drawn as it was
            set_generators(now)

    @property
    def _start(self) -> dict[str, Any]:
        assert self._at_start is not None
        return self._at_start

    def _set_generators(self) -> None:
        """Have the random generators stand where they stood before the walk began."""
        set_generators(self._start["process"])
        self.set_own_generators(self._start["own"])

    def skip_failed(self) -> None:
        """Count the batch that could not be fetched as taken."""
        own = isinstance(self.given, DataLoader) and isinstance(self.given.dataset, IterableDataset)
        if self._failed and (own or isinstance(self._iterator, types.GeneratorType)):
            raise RuntimeError(
                f"{self.name}: its source is a generator, and the exception ended it; there is nothing to skip to."
            )
        self._unmoved = _NOTHING
        self._failed = False
        self.taken += 1

    def end(self) -> None:
        """Leave the walk where it is; the next pass begins anew. A fully taken loader is asked once more.

        A plain ``for`` asks too, and a loader with workers winds up then.

        Raises:
            RuntimeError: If the source gives more than its ``len`` says.
        """
        full = self.limit is None and self.length is not None and self.taken == self.length
        iterator, self._iterator = self._iterator, None
        looked = self._ahead is not _NOTHING
        self._ahead = _NOTHING
        if full and iterator is not None and not looked and next(iterator, END) is not END:
            self._refuse_length()

    def release(self) -> None:
        """Let workers go; the next fetch finds the place again."""
        if isinstance(self.given, DataLoader) and self.given.num_workers > 0:
            if self.given.persistent_workers:
                self.given._iterator = None  # the loader itself holds on to them
            self._failed = self.under_way
            self._iterator, self._ahead = None, _NOTHING

    def own_generators(self) -> list[torch.Tensor]:
        """State of the generators that a loader draws its order from, if it has its own."""
        return [generator.get_state() for generator in _generators_of(self.given)]

    def set_own_generators(self, states: list[torch.Tensor]) -> None:
        """Put back what `own_generators` gave."""
        for generator, state in zip(_generators_of(self.given), states, strict=True):
            generator.set_state(state)

    def state_dict(self) -> dict[str, Any]:
        """Its place: walks begun, batches taken, and the generators as they were when the walk began."""
        start = self._at_start if self.under_way else None
        own = self.own_generators()
        return {"begun": self.begun, "taken": self.taken if start else 0, "at_start": start, "own": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where `state_dict` was taken. The walk is gone through again at the next fetch."""
        self.begun, self.taken, self._at_start = state["begun"], state["taken"], state["at_start"]
        self.set_own_generators(state["own"])
        self._iterator, self._ahead = None, _NOTHING
        self._failed = self._at_start is not None


def _parts(loader: Any) -> list[Any]:
    """A loader and its samplers."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    return [loader, *{id(sampler): sampler for sampler in samplers}.values()]


def _samplers(loader: Any) -> list[Any]:
    """The samplers of a loader that want to know the number of the walk."""
    return [sampler for sampler in _parts(loader)[1:] if hasattr(sampler, "set_epoch")]


def _generators_of(loader: Any) -> list[torch.Generator]:
    """The generators of its own that a loader draws its order from."""
    found = {id(g): g for part in _parts(loader) if isinstance(g := getattr(part, "generator", None), torch.Generator)}
    return list(found.values())
