"""Items read ahead by worker processes, in an order that doesn't depend on how many there are."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset

from longtake.errors import LongtakeError
from longtake.training.data.order import Order

AHEAD = 4  # items a worker holds ready


class Items(Protocol):
    """Anything whose item depends on its index only. It must be picklable: workers are new processes."""

    def __getitem__(self, index: int) -> Any: ...


class Loader:
    """Takes items of `order`, one after the other.

    position: items taken so far; with the order's seed it says where a run stands.
    """

    def __init__(self, items: Items, order: Order, workers: int = 0) -> None:
        self.items, self.order, self.workers = items, order, workers
        self.position = 0
        self._iterator: Iterator[Any] | None = None

    def take(self, count: int) -> list[Any]:
        """The next `count` items.

        Raises:
            LongtakeError: reading one failed, as the worker says.
        """
        if self._iterator is None:
            self._iterator = read_in_order(self.items, map(self.order.at, itertools.count(self.position)), self.workers)
        taken = [next(self._iterator) for _ in range(count)]
        self.position += count
        return taken

    def seek(self, position: int) -> None:
        """Go on from `position`; what was read ahead is forgotten."""
        self.position, self._iterator = position, None


def read_in_order(items: Items, indices: Iterable[int], workers: int) -> Iterator[Any]:
    """Items at `indices`, in that order, read by `workers` processes (0: by this one)."""
    if not workers:
        yield from (items[index] for index in indices)
        return
    loader: DataLoader[Any] = DataLoader(
        _Guarded(items),
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        prefetch_factor=AHEAD,
        collate_fn=_as_it_is,
        multiprocessing_context="spawn",  # a fork would copy CUDA's state and the locks of other threads
    )
    for item in loader:
        if isinstance(item, LongtakeError):
            raise item
        yield item


class _Guarded(Dataset[Any]):
    """Hands a user's errors over as they are: torch would wrap them in a traceback of the worker."""

    def __init__(self, items: Items) -> None:
        self.items = items

    def __getitem__(self, index: int) -> Any:
        try:
            return self.items[index]
        except LongtakeError as error:
            return error


def _as_it_is(item: Any) -> Any:
    return item
