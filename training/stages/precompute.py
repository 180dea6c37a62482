"""What is computed before the first step: clips as latents, kept in memory, or on disk where there is a folder for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longtake.training.data.embedding_cache import CachedText, embeddings_from_cache
from longtake.training.data.latent_cache import LatentCache, cache_from_dataset
from longtake.training.data.stored_stories import StoredStories, stored_from_dataset

Stories = LatentCache | StoredStories


def stories_of(stage: Any, split: str, stories: int, seed: int, chunks: int, context: str) -> Stories:
    """Encoded stories of a split of a stage's data set, on its VAE's device; see `latent_cache.cache_from_dataset`."""
    options, dataset = stage.options, stage.clips if split == "train" else stage.held_out_clips
    which = dict[str, Any](stories=stories, chunks=chunks, context=context, seed=seed, what=f"{split} stories")
    if options.cache_dir is None:
        return cache_from_dataset(dataset, stage.vae, stage.text, stage.preset, **which)
    which |= {"cache_dir": options.cache_dir, "workers": options.workers}
    return stored_from_dataset(dataset, stage.vae, stage.vae_digest, stage.text, stage.preset, **which)


def embeddings_of(stage: Any, *more: Tensor) -> CachedText | None:
    """Embeddings of all prompts of a stage's stories, and of tokens [R, E], on disk, where there is a folder for them."""
    options, device = stage.options, stage.device
    if options.cache_dir is None:
        return None
    tokens = torch.cat([*(stories.tokens.flatten(0, 1).cpu() for stories in (stage.train, stage.held_out)), *more])
    how: dict[str, Any] = {"cache_dir": options.cache_dir, "device": device, "autocast": stage.autocast}
    bf16 = options.computes_in_bf16(device)
    return embeddings_from_cache(stage.text, stage.text_digest, tokens, stage.preset, **how, bf16=bf16)
