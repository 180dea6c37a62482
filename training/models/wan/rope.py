"""3-D rotary positions and timestep sinusoids: tables computed in float64 (`pointwise.apply_rope` uses them).

Legend: F frames, T tokens = F * grid height * grid width in (f, h, w) order, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longtake.training.models.presets import DiTConfig, Preset


def frame_positions(preset: Preset, chunk: int, shot: int) -> list[float]:
    """Absolute temporal RoPE position of each latent frame; every shot begun so far inserts a gap."""
    start = preset.first_frame(chunk) + shot * preset.shot_rope_offset
    return [float(start + frame) for frame in range(preset.frames_of(chunk))]


def pair_split(head_dim: int) -> tuple[int, int, int]:
    """How many of the head_dim / 2 pairs turn with time, height and width (128 -> 22, 21, 21)."""
    spatial = head_dim // 6
    return head_dim // 2 - 2 * spatial, spatial, spatial


def axis_angles(positions: Tensor, pairs: int, theta: float) -> Tensor:
    """Angle position * theta^(-i / pairs) of every pair i, float64 [..., pairs]."""
    exponent = torch.arange(pairs, dtype=torch.float64, device=positions.device) / pairs
    return positions.to(torch.float64)[..., None] * theta**-exponent


def rope_angles(config: DiTConfig, positions: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Angles in float64, [..., T, D/2], of frames at absolute temporal `positions` [..., F] on a token grid."""
    pairs = pair_split(config.head_dim)
    height, width = grid_hw
    device = positions.device
    t = axis_angles(positions, pairs[0], config.rope_theta)
    h = axis_angles(torch.arange(height, device=device), pairs[1], config.rope_theta)
    w = axis_angles(torch.arange(width, device=device), pairs[2], config.rope_theta)
    grid = (*positions.shape, height, width)
    parts = (
        t[..., :, None, None, :].expand(*grid, -1),
        h[:, None, :].expand(*grid, -1),
        w[None, :, :].expand(*grid, -1),
    )
    return torch.cat(parts, dim=-1).flatten(-4, -2)


def rope_tables(
    config: DiTConfig, positions: Sequence[float] | Tensor, grid_hw: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """cos and sin of the 3-D rotary angles, computed in float64, fp32 [..., T, D/2].

    Args:
        positions: one absolute temporal position a frame, any shot offset already added; [F] or [..., F].
        grid_hw: height and width of a latent frame in tokens.
    """
    angles = rope_angles(config, torch.as_tensor(positions, dtype=torch.float64), grid_hw)
    return angles.cos().float(), angles.sin().float()


def timestep_sinusoid(timesteps: Tensor | Sequence[float], freq_dim: int) -> Tensor:
    """[cos | sin] of t * 10000^(-i / (freq_dim/2)), computed in float64, fp32 [..., F, freq_dim]; t is 0..1000."""
    angles = axis_angles(torch.as_tensor(timesteps, dtype=torch.float64), freq_dim // 2, 10000.0)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()
