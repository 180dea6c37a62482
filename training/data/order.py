"""In which order a run goes through its items: epochs of permutations, cut among the ranks, resumable at any item.

All ranks together walk one endless sequence: epoch after epoch, each a permutation of all items that depends on the
seed and the epoch only. Group g of G takes places g, g + G, g + 2G, … of it. So no item is dropped or repeated within
an epoch whatever G is, ranks of one sequence-parallel group see the same item, and a place in the data is one number,
which means the same for any number of ranks and workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from longtake.errors import LongtakeError

EPOCH_STRIDE = 1_000_003  # a prime, so that (seed, epoch) of neighbouring runs don't meet soon


class Order:
    """An endless order over `items` items for group `group` of `groups`. See the module."""

    def __init__(self, items: int, seed: int, group: int = 0, groups: int = 1) -> None:
        if items < 1 or not 0 <= group < groups:
            raise LongtakeError(
                "nothing to put in order", got=f"{items} items, group {group} of {groups}", expected="at least 1 item"
            )
        self.items, self.seed, self.group, self.groups = items, seed, group, groups

    def at(self, place: int) -> int:
        """The item at a place of the sequence that all groups share."""
        epoch, index = divmod(place, self.items)
        return int(permutation(self.items, self.seed, epoch)[index])

    def starting(self, position: int) -> Iterator[int]:
        """This group's items from shared position `position` on (the items all groups together have taken)."""
        place = position + self.group
        while True:
            yield self.at(place)
            place += self.groups


@lru_cache(maxsize=4)
def permutation(items: int, seed: int, epoch: int) -> Tensor:
    """The order of one epoch, int64 [items]."""
    generator = torch.Generator().manual_seed((seed * EPOCH_STRIDE + epoch) % 2**63)
    return torch.randperm(items, generator=generator)


def sampler_for(rank: int, world: int, seed: int, *, items: int, sequence_parallel: int = 1) -> Order:
    """The order of rank `rank` of `world`, whose seed must be the run's, the same on every rank.

    Args:
        sequence_parallel: consecutive ranks that share a sample.

    Raises:
        LongtakeError: the ranks don't divide into such groups.
    """
    if sequence_parallel < 1 or world % sequence_parallel:
        raise LongtakeError(
            "ranks don't divide into sequence-parallel groups",
            got=f"{world} ranks, groups of {sequence_parallel}",
            expected="a number of ranks that the group size divides",
            fix=f"start {max(1, sequence_parallel) * max(1, world // max(1, sequence_parallel))} ranks",
        )
    return Order(items, seed, rank // sequence_parallel, world // sequence_parallel)
