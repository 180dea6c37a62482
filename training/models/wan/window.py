"""Which blocks a block may attend to, and how shots move its rotary positions: the runtime's window, as a rule.

A block is a chunk of latent frames. `cuts[i]` says that block i is the first of a new shot; cuts[0] is ignored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longtake.training.models.wan.slots import visible_blocks


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


def window_history(cuts: Sequence[bool], window: int) -> Tensor:
    """The runtime's window as a history, bool [N, N]."""
    history = torch.zeros(len(cuts), len(cuts), dtype=torch.bool)
    for block, seen in enumerate(visible_blocks(cuts, window)):
        history[block, list(seen)] = True
    return history


def block_mask(history: Tensor) -> Tensor:
    """Teacher-forcing mask over the blocks of [clean; noisy], bool [..., 2N, 2N], of a history [..., N, N].

    Clean block i sees clean history[i] (itself included); noisy block i sees clean history[i] without i, and itself.
    """
    own = torch.eye(history.shape[-1], dtype=torch.bool, device=history.device).expand_as(history)
    clean = torch.cat((history, torch.zeros_like(own)), -1)
    return torch.cat((clean, torch.cat((history & ~own, own), -1)), -2)
