"""A loader whose order and random transforms follow from a seed alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ..generators import drawn_from, generators_within, number_from

Place = tuple[int, int, Any]  # epoch, number of the batch in it, indices


def seeded(loader: DataLoader[Any], seed: int) -> DataLoader[Any]:
    """Make a loader whose order and random transforms are a pure function of (*seed*, epoch, number of the batch).

    The same batches come for any number of workers, and a run resumes in the middle of an epoch to the same bits,
    without loading what it has seen. Transforms and ``collate_fn`` draw from Python's, NumPy's or torch's generator on
    the CPU, or from a generator of their own that hangs on the data set: all are seeded for each batch. What is drawn
    elsewhere (CUDA, the operating system) is not covered. Nothing is drawn from the process's generators.

    A run counts the epochs itself; in a loop by hand call ``loader.sampler.set_epoch(epoch)`` before each. A sampler's
    own ``set_epoch`` is passed on; with a ``rank``, as a DistributedSampler has, each rank's transforms draw other
    numbers. The order is made at the epoch's start, as a list of all indices. A batch costs 20 µs more in a worker,
    and 0.1 to 0.2 ms without workers, where the process's generators are put back (most of it is NumPy's).

    Args:
        loader: Over a data set with indices. It is left as it is; the new one has its data set, samplers and options,
            except ``generator``. ``loader.dataset.dataset`` is the data set itself.
        seed: Any whole number.

    Raises:
        TypeError: If the data set cannot be indexed, the sampler has no length, or the loader iterates in its own way.
        ValueError: If the loader is seeded already, or gives batches in any order.

    Example:
        >>> data = [1.0, 2.0, 3.0, 4.0]
        >>> noisy = lambda samples: torch.tensor(samples) + torch.rand(len(samples))
        >>> loader = lt.seeded(torch.utils.data.DataLoader(data, 2, shuffle=True, collate_fn=noisy), seed=7)
        >>> first, again = list(loader), list(loader)
        >>> all(map(torch.equal, first, again))
        True
        >>> loader.sampler.set_epoch(1)
        >>> all(map(torch.equal, first, loader))
        False
    """
    _check(loader, seed)
    order = Order(loader, seed)
    pin: dict[str, Any] = {"pin_memory_device": loader.pin_memory_device} if loader.pin_memory_device else {}
    return DataLoader(
        SeededBatches(loader, seed, order.rank),
        batch_size=None,
        sampler=order,
        num_workers=loader.num_workers,
        collate_fn=_as_it_is,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator().manual_seed(number_from(seed) & (2**63 - 1)),  # else it draws the process's
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        **pin,
    )


def _check(loader: Any, seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seeded: seed must be a whole number, got {seed!r}.")
    if not isinstance(loader, DataLoader):
        raise TypeError(f"seeded: give a torch.utils.data.DataLoader, got a {type(loader).__name__}.")
    if is_seeded(loader):
        raise ValueError(
            f"seeded: the loader is seeded already, with {getattr(loader.dataset, 'seed', seed)}. Seed the plain one."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(
            f"seeded: the data set, a {type(loader.dataset).__name__}, has no indices: which sample comes when is up "
            "to it. Give a data set with __getitem__ and __len__, or leave seeded out."
        )
    own = next(kind for kind in type(loader).__mro__ if "__iter__" in kind.__dict__)
    if own.__module__.partition(".")[0] not in ("torch", "torchdata"):
        raise TypeError(
            f"seeded: {own.__name__} has an __iter__ of its own, which would be lost. Seed the DataLoader inside it."
        )
    if not getattr(loader, "in_order", True):
        raise ValueError("seeded: in_order=False gives batches in the order in which workers finish. Leave it out.")
    try:
        len(loader)
    except (TypeError, NotImplementedError):
        kind = type(loader.sampler if loader.batch_sampler is None else loader.batch_sampler).__name__
        raise TypeError(
            f"seeded: the {kind} has no len, so its order cannot be made beforehand. Give it one."
        ) from None


def is_seeded(loader: Any) -> bool:
    """Whether `seeded` made it."""
    return isinstance(loader, DataLoader) and isinstance(loader.dataset, SeededBatches)


class Order:
    """The sampler of a seeded loader: gives the place of each batch, with the indices of its samples.

    Args:
        loader: Whose sampler decides on the order.
        seed: What it follows from, with the epoch.
    """

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        self.indices: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self.seed = seed
        self.epoch = 0
        samplers: list[Any] = [self.indices, getattr(self.indices, "sampler", None)]
        self._told = [sampler for sampler in samplers if hasattr(sampler, "set_epoch")]
        ranks = [rank for sampler in samplers if isinstance(rank := getattr(sampler, "rank", None), int)]
        self.rank: int | None = next(iter(ranks), None)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next walk is."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Place]:
        return self._places(self.epoch)

    def _places(self, epoch: int) -> Iterator[Place]:
        for sampler in self._told:
            sampler.set_epoch(epoch)
        with drawn_from("order", self.seed, epoch, own=generators_within(self.indices)):
            order = list(self.indices)
        for number, indices in enumerate(order):
            yield epoch, number, indices


class SeededBatches(Dataset[Any]):
    """The data set of a seeded loader: makes a whole batch of its place, and draws what the place says.

    Args:
        loader: Whose data set and ``collate_fn`` make it.
        seed: What the random numbers follow from, with epoch, number and rank.
        rank: Of this process among those that share the order; None if it does not share it.
    """

    def __init__(self, loader: DataLoader[Any], seed: int, rank: int | None) -> None:
        self.dataset: Any = loader.dataset
        self.seed = seed
        self.batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        self.collate_fn = loader.collate_fn
        self._whole = loader.batch_sampler is not None  # whether indices are those of a whole batch
        self._rank = rank
        self._own: tuple[int, dict[str, Any]] | None = None  # generators that transforms draw from, and in which epoch

    def facts(self) -> dict[str, Any]:
        """What a run must have in common with one that goes on from it."""
        return {"seed": self.seed, "batch_size": self.batch_size}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "dataset" not in self.__dict__:  # not made yet: it is being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_own": None}

    def __getitem__(self, place: Place) -> Any:
        epoch, number, indices = place
        if self._own is None or self._own[0] != epoch:
            within = {"dataset": self.dataset, "collate_fn": self.collate_fn}
            self._own = epoch, generators_within(within)
        in_process = get_worker_info() is None
        with drawn_from(self.seed, epoch, number, self._rank, own=self._own[1], put_back=in_process):
            return self.collate_fn(self._fetch(indices))

    def _fetch(self, indices: Any) -> Any:
        if not self._whole:
            return self.dataset[indices]
        if getattr(self.dataset, "__getitems__", None):
            return self.dataset.__getitems__(indices)
        return [self.dataset[index] for index in indices]


def _as_it_is(batch: Any) -> Any:
    return batch
