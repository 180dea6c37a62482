"""Which blocks a block may attend to, and how shots move its rotary positions: the runtime's window, as a rule.

A block is a chunk of latent frames. `cuts[i]` says that block i is the first of a new shot; cuts[0] is ignored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WINDOW = 4


def visible_blocks(cuts: Sequence[bool], block: int, window: int = WINDOW) -> list[int]:
    """Blocks in the cache window while `block` is generated, itself included, in ascending order.

    The oldest block that isn't protected leaves before a new one is generated. The video's first block is always
    protected; the first block of the current shot becomes so once it has moved up next to that one. A shot's first
    block is bound only after it has been generated, so it still sees the shot before.
    """
    held: list[int] = []
    shot_sink = None
    for current in range(block + 1):
        if len(held) == window:
            del held[2 if held[1] == shot_sink else 1]
        held.append(current)
        if current and cuts[current]:
            shot_sink = current
    return held


def shot_offsets(cuts: Sequence[bool], offset: int) -> list[int]:
    """Latent frames added to each block's temporal positions: `offset` for each cut so far."""
    total, offsets = 0, []
    for block, cut in enumerate(cuts):
        total += offset if block and cut else 0
        offsets.append(total)
    return offsets


def full_history(blocks: int) -> Tensor:
    """The reference's history: every block sees itself and all before it, bool [N, N], row = the block that looks."""
    return torch.ones(blocks, blocks, dtype=torch.bool).tril()


def window_history(cuts: Sequence[bool], window: int = WINDOW) -> Tensor:
    """The runtime's window as a history, bool [N, N]."""
    history = torch.zeros(len(cuts), len(cuts), dtype=torch.bool)
    for block in range(len(cuts)):
        history[block, visible_blocks(cuts, block, window)] = True
    return history


def block_mask(history: Tensor) -> Tensor:
    """Teacher-forcing mask over the blocks of [clean; noisy], bool [..., 2N, 2N], of a history [..., N, N].

    Clean block i sees clean history[i] (itself included); noisy block i sees clean history[i] without i, and itself.
    """
    own = torch.eye(history.shape[-1], dtype=torch.bool, device=history.device).expand_as(history)
    clean = torch.cat((history, torch.zeros_like(own)), -1)
    return torch.cat((clean, torch.cat((history & ~own, own), -1)), -2)
