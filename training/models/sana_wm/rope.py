"""Rotary tables of any even head size, and the shorter ones of the camera branch.

A head of D has D/2 pairs: D//6 each for height and width, the rest for time. The camera's half of a head has its pairs by
the same rule, and takes the first, fastest frequencies of each axis of the whole head's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longtake.training.models.wan.rope import axis_angles


def pairs(head_dim: int) -> tuple[int, int, int]:
    """Pairs of time, height and width in a head."""
    side = head_dim // 6
    return head_dim // 2 - 2 * side, side, side


def angles(head_dim: int, frames: Sequence[int], grid_hw: tuple[int, int], theta: float, used: int = 0) -> Tensor:
    """float64 [F, P, used/2]: the angle of each pair; `used`: the head size whose pairs are taken, all if 0.

    frames: absolute index of each latent frame.
    """
    counts, kept = pairs(head_dim), pairs(used or head_dim)
    height, width = grid_hw
    axes = (torch.as_tensor(frames, dtype=torch.float64), torch.arange(height), torch.arange(width))
    t, h, w = (axis_angles(axis, count, theta)[:, :keep] for axis, count, keep in zip(axes, counts, kept))
    shape = (len(t), height, width)
    parts = (t[:, None, None], h[None, :, None], w[None, None, :])
    return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1).flatten(1, 2)


def tables(
    head_dim: int, frames: Sequence[int], grid_hw: tuple[int, int], theta: float, used: int = 0
) -> tuple[Tensor, Tensor]:
    """cos and sin of `angles`, fp32 [F, P, used/2]."""
    turned = angles(head_dim, frames, grid_hw, theta, used)
    return turned.cos().float(), turned.sin().float()
