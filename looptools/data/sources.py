"""Where batches come from: an object, not a generator, so that its place survives every exception."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from ..devices import move
from ..generators import get_generators
from ..modes import torch_modes
from ..plain import device_of, is_plain
from . import loaders
from .draws import Draws, Said
from .given import trusted_len
from .loaders import END as END  # what fetch gives when the source is exhausted
from .replaying import elements, is_sequence, walk_again

_NOTHING: Any = object()


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
        self._before: dict[str, Any] | None = None  # where it stood before the batch ahead, if that cannot be saved
        self._unmoved: Any = _NOTHING  # taken out of the iterator, but not yet on its device
        self._may_leak = self._raised = self._exhausted = self._plain = False
        self.at_start: dict[str, Any] | None = None  # the random generators before the walk began; new for each walk
        self._failed = False  # its place must be found again
        self._stateful = loaders.has_state(given)
        self._lives_on = not self._stateful and isinstance(given, DataLoader) and loaders.lives_on(given)
        self._stand: dict[str, Any] | None = None  # the source's own state, and the batches taken by then
        self._came_back = False  # another process began the walks before
        self._said = Said(name)
        self._draws = Draws(given, self._said)
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

    def back_to(self, start: dict[str, Any] | None, begun: int, taken: int, under_way: bool) -> None:
        """Stand where it stood before something was begun or fetched that got lost, or is to be fetched again.

        Args:
            start: What `at_start` was.
            begun: Walks begun by then.
            taken: Batches taken of the last of them.
            under_way: Whether that had not ended.
        """
        if self.at_start is not start and self.at_start is not None:  # a walk has begun meanwhile
            self._draws.put(self.at_start)
            self._iterator = None
        elif self.taken == taken and self._has_pending:
            return  # the batch is still at hand
        self.at_start, self.begun, self.taken = start, begun, taken
        self._ahead = self._unmoved = _NOTHING
        self._before = None
        self._failed = self._raised = under_way

    @property
    def goes_once(self) -> bool:
        """Whether no batch comes a second time: an iterator that cannot say where it stands."""
        return hasattr(self.given, "__next__") and not self._stateful

    @property
    def has_ahead(self) -> bool:
        """Whether it was looked whether another batch comes."""
        return self._ahead is not _NOTHING

    def unpeek(self) -> None:
        """Take that back: it will be fetched again."""
        self._ahead, self._before = _NOTHING, None
        self._failed, self._raised = True, False

    def undraw(self) -> None:
        """The generators are as they were before a batch could not be fetched."""
        self._raised = False

    def begin(self) -> None:
        """Start a walk from the first batch.

        Raises:
            RuntimeError: If the source can be walked through only once, and was.
        """
        self.at_start = self._draws.now()
        if self._lives_on:  # its place is in the data set itself, which a new iterator would go on from
            self.at_start["dataset"] = copy.deepcopy(self.given.dataset.state_dict())
        if self._stateful and not isinstance(self.given, DataLoader):
            self._stand = {"taken": 0, "state": copy.deepcopy(self.given.state_dict())}
        else:
            self._stand = None
        self._iterator, *_ = self._iterate(self.begun)
        self.begun += 1
        self.taken = 0
        self._ahead = self._unmoved = _NOTHING
        self._before = None
        self._failed = self._raised = self._exhausted = False

    def _iterate(self, walk: int, passed: int = 0) -> loaders.Begun:
        """A new iterator, past the batches that are to be *passed* if that can be had without making them."""
        iterable: Iterable[Any] = self.given() if self._makes_its_own else self.given
        if not hasattr(iterable, "__iter__") and not hasattr(iterable, "__getitem__"):
            raise TypeError(f"{self.name}: its source must be an iterable of batches, got {iterable!r}.")
        for part in loaders.parts_of(iterable)[1:]:
            if hasattr(part, "set_epoch"):
                part.set_epoch(walk)
        if isinstance(iterable, DataLoader):
            return self._iterate_loader(iterable, passed)
        self._may_leak = not isinstance(iterable, list | tuple)
        if is_sequence(iterable):
            return elements(iterable, passed), passed, None
        iterator = iter(iterable)
        if iterator is iterable and walk > 0 and not self._makes_its_own:
            kind = type(iterable).__name__
            raise RuntimeError(
                f"{self.name}: its source is a {kind}, which is spent after one pass. "
                "Give a function that makes it anew (lambda: ...), or a list."
            )
        return iterator, 0, None

    def _iterate_loader(self, loader: DataLoader[Any], passed: int) -> loaders.Begun:
        self._may_leak = isinstance(loader.dataset, IterableDataset)
        passed = passed if loaders.passes_over(loader) else 0
        if "resets" not in self._start:  # the walk begins
            again = loader is self.given and self.begun > 0
            self._start["resets"] = loaders.keeps_workers(loader) and (again or loader._iterator is not None)
            doubtful = self._came_back and loaders.keeps_workers(loader)
        else:
            doubtful = passed > 0 or self._stand is not None or self._start["resets"]
        resets = self._start["resets"] and self._stand is None  # what a loader's own state holds, the first one takes
        rewind = functools.partial(self._draws.put, self._start)
        begun = loaders.begin(loader, passed, resets, rewind, self._draws.of_order)
        for doubt in loaders.doubts(loader) if doubtful else ():
            self._said.once(doubt)
        return begun

    def fetch(self) -> Any:
        """The next batch, moved to its device; `END` if the walk is over."""
        if self._failed and self._ahead is _NOTHING and self._unmoved is _NOTHING:
            self.replay()
        if self._ahead is not _NOTHING:
            batch, self._ahead, self._before = self._ahead, _NOTHING, None
            self.taken += batch is not END
            return batch
        if self._unmoved is not _NOTHING:
            batch = self._unmoved
        elif self._iterator is None or (self.limit is not None and self.taken >= self.limit):
            self._iterator = None
            return END
        else:
            modes = torch_modes() if self._may_leak else None
            try:
                batch = next(self._iterator, END)
            except BaseException:
                self._failed = self._raised = True
                raise
            if modes is not None and modes != torch_modes():
                self._failed = True
                raise loaders.leaked(self.name, self._iterator, modes)
            if self.length is not None and (batch is END) is (self.taken < self.length):
                self._refuse_length()
            if batch is END:
                self._iterator, self._exhausted = None, True
                return END
        if self.device is not None:
            self._unmoved = batch  # kept, in case that moving fails
            batch = move(batch, self.device, self.non_blocking)
        self._unmoved = _NOTHING
        self.taken += 1
        return batch

    def peek(self) -> bool:
        """Whether another batch comes; fetches it if need be."""
        if self._ahead is _NOTHING:
            before = None if self._plain else {**self._draws.now(), "loader": self._own_state()}
            batch = self.fetch()
            self.taken -= batch is not END
            self._ahead = batch
            if before is not None and batch is not END:
                self._plain = is_plain(batch)  # then so are the others
                self._before = None if self._plain else before
        return self._ahead is not END

    def _refuse_length(self) -> None:
        if self.taken < (self.length or 0):
            raise RuntimeError(
                f"{self.name}: its source has len {self.length}, but ended after {self.taken} batches. Schedules and "
                "progress count on that number: mend __len__, or hide it with a function (lambda: iter(source))."
            )
        raise RuntimeError(f"{self.name}: its source has len {self.length}, but gives more batches than that.")

    def replay(self) -> None:
        """Find the place of the walk again: the same order, and the batch that comes next is the same.

        Batches of a list or of a loader over a data set with indices are passed over without being loaded. A source
        with a state of its own goes on from that. Others are walked through again, which is said on stderr if it takes
        long. The process's generators end up as they are now.

        Raises:
            RuntimeError: If the source can be walked through only once, or gives fewer batches than before.
        """
        if self.at_start is None:
            return
        if self._iterator is not None and self._iterator is self.given:  # it can only go on
            if isinstance(self.given, types.GeneratorType) and self.given.gi_frame is None:
                raise RuntimeError(
                    f"{self.name}: its source is a generator, and the exception ended it. Give a function that makes "
                    "it anew (lambda: ...), and its place can be found again."
                )
            self._failed = self._raised = False
            return
        now, passed, stand = self._draws.now(), self.taken + self._has_pending, self._stand
        self._draws.put(self._start)
        if "dataset" in self._start:
            self.given.dataset.load_state_dict(copy.deepcopy(self._start["dataset"]))
        if stand is not None:
            self.given.load_state_dict(copy.deepcopy(stand["state"]))
        try:
            at_once = passed if stand is None else 0
            iterator, skipped, passing = self._iterate(self.begun - 1, at_once)
            first: list[dict[str, Any]] = []
            left = passed - (skipped if stand is None else stand["taken"])
            walk_again(self.name, iterator, left, lambda: first.append(get_generators()))
        except BaseException as error:
            self._draws.put(now)
            if isinstance(error, loaders.FewerError):
                fewer = f"{self.name}: its source gave fewer batches than before; it had given {passed}."
                raise RuntimeError(fewer) from None
            raise
        if first:
            self._draws.tell_of_walk(first[0], now)
        if passed:  # at the first batch the order is drawn; it must be drawn as it was
            self._draws.forward(now, passing, self._raised, passed + 1 == self.length)
        self._iterator = iterator
        self._failed = self._raised = False
        if self._before is not None:
            self._fetch_ahead_again(now)

    @property
    def _has_pending(self) -> bool:
        """Whether one more batch was fetched than was handed out."""
        return self._unmoved is not _NOTHING or self._ahead is not _NOTHING

    @property
    def _start(self) -> dict[str, Any]:
        assert self.at_start is not None
        return self.at_start

    def _fetch_ahead_again(self, now: dict[str, Any]) -> None:
        """Fetch the batch that comes next as it was fetched before the state was saved, which could not hold it."""
        before, self._before = self._before, None
        assert before is not None
        self._draws.put(before)
        batch = self.fetch()
        self.taken -= batch is not END
        self._ahead, self._before = batch, before
        self._draws.put(now)

    def skip_failed(self) -> None:
        """Count the batch that could not be fetched as taken."""
        own = isinstance(self.given, DataLoader) and isinstance(self.given.dataset, IterableDataset)
        if self._failed and (own or isinstance(self._iterator, types.GeneratorType)):
            raise RuntimeError(
                f"{self.name}: its source is a generator, and the exception ended it; there is nothing to skip to."
            )
        self._unmoved = _NOTHING
        self._failed = self._iterator is None
        self._raised = False
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
        self._ahead = self._unmoved = _NOTHING
        self._before = None
        self._failed = self._raised = False
        if full and iterator is not None and not looked and next(iterator, END) is not END:
            self._refuse_length()

    def release(self) -> None:
        """Let workers go; the next fetch finds the place again."""
        if isinstance(self.given, DataLoader) and self.given.num_workers > 0:
            if self._iterator is not None and self._stateful:
                self._stand = copy.deepcopy(self._own_state())
            self.given._iterator = None  # a loader holds on to those that it keeps
            self._failed = self.under_way
            self._iterator = None

    def own_generators(self) -> dict[str, Any]:
        """State of the generators that hang on a loader, its samplers or its data set, by where they are."""
        return self._draws.own()

    def set_own_generators(self, states: dict[str, Any] | list[torch.Tensor]) -> None:
        """Put back what `own_generators` gave."""
        self._draws.set_own(states)

    # What is saved

    def state_dict(self) -> dict[str, Any]:
        """Its place: walks begun, batches taken, the generators as they were when the walk began, and a batch ahead."""
        within = self.under_way or self._ahead is END
        state: dict[str, Any] = {"begun": self.begun, "taken": self.taken if within else 0}
        state |= {"at_start": self.at_start if within else None, "own": self.own_generators()}
        if not within:
            asked = self._stateful or self._lives_on
            return state | (loaders.between_walks(self.given, self._exhausted or not self.begun) if asked else {})
        if self._stateful and (own := self._own_state()) is not None:
            state["loader"] = own
        if self._ahead is END:
            return state | {"ahead": {"end": True}}
        pending = self._unmoved if self._unmoved is not _NOTHING else self._ahead
        if self._before is not None:
            return state | {"loader": self._before["loader"], "ahead": {"before": self._before}}
        if pending is _NOTHING:
            return state
        if is_plain(pending):
            return state | {"ahead": {"batch": pending, "device": None if self.device else device_of(pending)}}
        self._said.once(
            f"a batch that was fetched ahead, a {type(pending).__name__}, could not be saved; it is fetched again, and "
            "random transforms in it may draw other numbers."
        )
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where `state_dict` was taken. The place in the walk is found at the next fetch."""
        self.begun, self.taken, self.at_start = state["begun"], state["taken"], state["at_start"]
        self.set_own_generators(state["own"])
        self._iterator, self._ahead, self._unmoved = None, _NOTHING, _NOTHING
        self._failed, self._raised, self._came_back = self.at_start is not None, False, self.begun > 0
        ahead = state.get("ahead", {})
        self._stand, self._before = state.get("loader"), ahead.get("before")
        if "batch" in ahead:
            there = ahead["device"]
            self._unmoved = ahead["batch"] if there is None else move(ahead["batch"], torch.device(there))
        if ahead.get("end"):
            self._ahead, self._failed = END, False
        if self.at_start is None and self._stand is not None:
            self.given.load_state_dict(self._stand["state"])
            self._stand = None
        if "dataset" in state:
            self.given.dataset.load_state_dict(state["dataset"])

    def _own_state(self) -> dict[str, Any] | None:
        """The source's own state, if it has one, and how many batches it had given by then."""
        if not self._stateful or self._iterator is None:
            return self._stand
        state = loaders.state_of(self.given)
        return self._stand if state is None else {"taken": self.taken + self._has_pending, "state": state}
