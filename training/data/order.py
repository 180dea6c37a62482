"""In which order a run goes through its items: epochs of permutations, resumable at any item.

One endless sequence: epoch after epoch, each a permutation of all items that depends on the seed and the epoch only. All
ranks walk it alike (a stage deals a batch out to them), so a place in the data is one number, which means the same for
any number of ranks and workers.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from longtake.errors import LongtakeError

EPOCH_STRIDE = 1_000_003  # a prime, so that (seed, epoch) of neighbouring runs don't meet soon


class Order:
    """An endless order over `items` items. See the module."""

    def __init__(self, items: int, seed: int) -> None:
        if items < 1:
            raise LongtakeError("nothing to put in order", got=f"{items} items", expected="at least 1 item")
        self.items, self.seed = items, seed

    def at(self, place: int) -> int:
        """The item at a place of the sequence."""
        epoch, index = divmod(place, self.items)
        return int(permutation(self.items, self.seed, epoch)[index])


@lru_cache(maxsize=4)
def permutation(items: int, seed: int, epoch: int) -> Tensor:
    """The order of one epoch, int64 [items]."""
    generator = torch.Generator().manual_seed((seed * EPOCH_STRIDE + epoch) % 2**63)
    return torch.randperm(items, generator=generator)
