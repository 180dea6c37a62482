"""Noise of a chunk: from seed and index alone, the same on every device."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from longtake.training.models.presets import Preset


def noise_for_chunk(preset: Preset, seed: int, index: int) -> Tensor:
    """Gaussian noise fp32 [1, F, C, H, W] of chunk `index`, drawn on the CPU: the same for every device and length."""
    digest = hashlib.sha256(f"longtake noise 1:{seed}:{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    shape = (1, preset.frames_of(index), preset.vae.z_channels, *preset.latent_hw)
    return torch.randn(shape, generator=generator)
