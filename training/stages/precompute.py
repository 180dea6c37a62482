"""What is computed before the first step: clips as latents, kept in memory, or on disk where there is a folder for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.training.data.base import Dataset
from longtake.training.data.latent_cache import LatentCache, cache_from_dataset
from longtake.training.data.stored_stories import StoredStories, stored_from_dataset
from longtake.training.models.presets import Preset
from longtake.training.models.text.words import AnyTextEncoder
from longtake.training.models.wan.vae import CausalVAE

Stories = LatentCache | StoredStories


def stories_from_dataset(
    dataset: Dataset,
    vae: CausalVAE,
    vae_digest: str,
    text: AnyTextEncoder,
    preset: Preset,
    *,
    cache_dir: Path | None,
    workers: int,
    **which: Any,
) -> Stories:
    """Encoded stories on the VAE's device.

    Args:
        which: stories, chunks, context, seed and what, as in `latent_cache.cache_from_dataset`.
    """
    if cache_dir is None:
        return cache_from_dataset(dataset, vae, text, preset, **which)
    return stored_from_dataset(dataset, vae, vae_digest, text, preset, cache_dir=cache_dir, workers=workers, **which)


def prompts_of(*stories: Stories) -> Tensor:
    """The tokens of every chunk, int32 [R, E], on the CPU."""
    return torch.cat([some.tokens.flatten(0, 1).cpu() for some in stories])
