"""What must be known of torch's DataLoader to begin in the middle of its data, without loading what comes before."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset
from torch.utils.data._utils.collate import default_collate, default_convert

from ..interrupts import deaf_workers
from ..modes import put_back
from .seeded import is_seeded

END: Any = object()  # what comes when a source is exhausted


class FewerError(Exception):
    """A sampler gave fewer batches of indices than were to be passed over."""


class Passing:
    """An index sampler that passes over its first batches of indices, once: a loader that keeps it asks again.

    Args:
        sampler: The loader's own.
        batches: How many to pass over.
        look: Called after the first and after the last of them; what it gives is kept as `first` and `last`.
    """

    def __init__(self, sampler: Any, batches: int, look: Callable[[], Any]) -> None:
        self.sampler = sampler
        self.batches = batches  # yet to be passed over
        self.all = batches
        self.look = look
        self.first: Any = None
        self.last: Any = None
        self.newest: _Indices | None = None

    def __iter__(self) -> _Indices:
        newest = self.newest = _Indices(self, iter(self.sampler))
        return newest

    def finish(self, iterator: Any) -> int:
        """Pass over what *iterator* was not yet made to, step out of its way, and say how many were passed."""
        if self.newest is None:  # the loader did not ask its sampler
            return 0
        newest, self.newest = self.newest, None  # they hold each other
        if self.batches:  # with workers it is done already: they were given indices
            newest.pass_over()
        if getattr(iterator, "_sampler_iter", None) is newest:
            iterator._sampler_iter = newest.indices
        return self.all

    def __len__(self) -> int:
        return len(self.sampler)


class _Indices:
    """Passes over them when the first index is asked for: torch draws a seed between that and ``iter(sampler)``."""

    def __init__(self, of: Passing, indices: Iterator[Any]) -> None:
        self.of = of
        self.indices = indices

    def __iter__(self) -> _Indices:
        return self

    def __next__(self) -> Any:
        if self.of.batches:
            self.pass_over()
        return next(self.indices)

    def pass_over(self) -> None:
        batches, self.of.batches = self.of.batches, 0
        for number in range(batches):
            if next(self.indices, END) is END:
                raise FewerError
            if number == 0:
                self.of.first = self.of.last = self.of.look()
        if batches > 1:
            self.of.last = self.of.look()


Begun = tuple[Iterator[Any], int, Passing | None]  # an iterator, the batches it is past, and how a loader passed them


def parts_of(loader: Any) -> list[Any]:
    """A loader and its samplers."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    return [loader, *{id(sampler): sampler for sampler in samplers}.values()]


def passes_over(loader: Any) -> bool:
    """Whether *loader* is torch's, over a data set with indices: one whose samples need not be loaded to pass them."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    kind = next(kind for kind in type(loader).__mro__ if "__iter__" in kind.__dict__)
    return kind.__module__.partition(".")[0] in ("torch", "torchdata")


def has_state(source: Any) -> bool:
    """Whether *source* can say itself where it stands, and there is no better way to find its place again."""
    both = hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
    return both and not isinstance(source, type) and not passes_over(source)


def state_of(source: Any) -> dict[str, Any] | None:
    """The state of a source that has one; None if what would be made of it is known not to be where it stands.

    torchdata 0.11 has a worker whose data had ended begin them anew.
    """
    state: dict[str, Any] = source.state_dict()
    if isinstance(source, DataLoader) and source.num_workers > 0:
        at_work = getattr(source._iterator, "_workers_status", [])
        fetchers = [
            (w or {}).get("fetcher_state") for w in state.get("_snapshot", {}).get("_worker_snapshots", {}).values()
        ]
        if not all(at_work) or any((fetcher or {}).get("fetcher_ended") for fetcher in fetchers):
            return None
    return state


def between_walks(source: Any, exhausted: bool) -> dict[str, Any]:
    """What a source with a state remembers between two walks.

    A loader is not asked: loaded behind its last batch, it would give an empty walk. What lives on is its data set.
    Other sources are asked if they were *exhausted*; else the next ``iter`` begins anew.
    """
    if not isinstance(source, DataLoader):
        return {"loader": {"taken": 0, "state": source.state_dict()}} if exhausted else {}
    return {"dataset": source.dataset.state_dict()} if lives_on(source) else {}  # type: ignore[attr-defined]


def lives_on(loader: DataLoader[Any]) -> bool:
    """Whether its data set, in this process, says itself where it stands."""
    data: Any = loader.dataset
    both = hasattr(data, "state_dict") and hasattr(data, "load_state_dict")
    return loader.num_workers == 0 and isinstance(data, IterableDataset) and both


def keeps_workers(loader: Any) -> bool:
    """Whether its workers, with their random generators, live on from one pass to the next."""
    return isinstance(loader, DataLoader) and loader.num_workers > 0 and loader.persistent_workers


def begin(
    loader: DataLoader[Any], batches: int, resets: bool, rewind: Callable[[], None], look: Callable[[], Any]
) -> Begun:
    """An iterator of *loader* that begins behind its first *batches*, without loading them.

    It draws from the generators what one draws that begins at the first.

    Args:
        loader: The loader.
        batches: How many to pass over.
        resets: Whether the iterator is not the first one of workers that a loader keeps.
        rewind: Sets the generators to where they stood before the walk; called if something else drew from them.
        look: As for `Passing`.

    Returns:
        The iterator, how many it is past, and how they were passed.

    Raises:
        FewerError: If there are fewer.
    """
    key = "sampler" if loader.batch_sampler is None else "batch_sampler"
    passing = Passing(getattr(loader, key), batches, look)
    with deaf_workers(loader) if loader.num_workers > 0 else contextlib.nullcontext():
        if keeps_workers(loader):
            if not resets:
                loader._iterator = None  # those that are there would not draw their seed again
            elif loader._iterator is None:  # its workers were let go
                with _sampled_by(loader, key, ()):
                    iter(loader)  # the first iterator draws a seed, which a reset does not
                rewind()
        if not batches:
            return iter(loader), 0, passing
        with _sampled_by(loader, key, passing):
            iterator = iter(loader)
    return iterator, passing.finish(iterator), passing


@contextlib.contextmanager
def _sampled_by(loader: DataLoader[Any], key: str, sampler: Any) -> Iterator[None]:
    """Within the ``with``, iterators take their indices from *sampler*; later passes from the loader's own again."""
    own = loader.__dict__[key]
    before: Any = loader._iterator
    loader.__dict__[key] = sampler  # a loader refuses to be assigned one
    if before is not None:
        before._index_sampler = sampler
    try:
        yield
    finally:
        loader.__dict__[key] = own
        for iterator in (before, loader._iterator):
            if iterator is not None and iterator._index_sampler is sampler:
                iterator._index_sampler = own


def draws_in_workers(loader: Any) -> bool:
    """Whether random numbers may be drawn in workers that follow from more than the batch's place."""
    if not isinstance(loader, DataLoader) or not loader.num_workers or is_seeded(loader):
        return False
    return loader.collate_fn not in (default_collate, default_convert) or not _is_still(loader.dataset)


def in_order(loader: DataLoader[Any]) -> bool:
    """Whether batches come in the order of their indices; torch has had the option since 2.6."""
    return bool(getattr(loader, "in_order", True))


def doubts(loader: DataLoader[Any]) -> Iterator[str]:
    """What of a loader's walk is not exact once its place had to be found again, in words."""
    if draws_in_workers(loader):
        yield (
            f"its order is exact, but random transforms within its {loader.num_workers} workers are not reproduced: "
            "they draw other numbers than without the interruption. lt.seeded(loader, seed) makes them exact; if there "
            "are none, nothing is lost."
        )
    if keeps_workers(loader) and isinstance(loader.dataset, IterableDataset):
        yield (
            "its loader keeps its workers from pass to pass, and what the data set in them knew of earlier passes is "
            "lost. With persistent_workers=False each pass begins from the data set as it was given."
        )
    if not in_order(loader) and loader.num_workers > 1:
        yield (
            "its loader has in_order=False and several workers, so which batches it had given is known by their number "
            "only: some may come twice, others not at all. in_order=True makes it exact."
        )


def _is_still(data: Any) -> bool:
    """Whether a data set is known to draw nothing."""
    if type(data) is Subset:
        return _is_still(data.dataset)
    if type(data) is ConcatDataset:
        return all(map(_is_still, data.datasets))
    return type(data) in (TensorDataset, Tensor, list, tuple, range)


def leaked(name: str, iterator: Any, modes: tuple[bool, ...]) -> RuntimeError:
    """The error of a source that has left torch's modes switched, which are put back to what they were."""
    if isinstance(iterator, types.GeneratorType):
        iterator.close()  # leaves its `with`
    put_back(modes)
    return RuntimeError(
        f"{name}: its source left gradients, inference_mode or autocast switched. Move its yield out of the "
        "`with torch.no_grad():` block; only the work goes inside."
    )
