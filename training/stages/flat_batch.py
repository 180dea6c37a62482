"""A batch as a flat tuple of tensors, which is what a CUDA graph takes, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.training.objective.teacher_forcing import Clips, Noise

OF_CLIPS, OF_NOISE = ("given", "valid"), ("start", "context")  # what a batch may have besides the rest


def tensors_of(clips: Clips, noise: Noise) -> tuple[Tensor, ...]:
    """What varies from step to step: latents, tokens, history, offsets, eps, levels, and the rest by `extras_of`."""
    offsets = torch.zeros_like(clips.tokens[..., 0]) if clips.offsets is None else clips.offsets
    more = (getattr(noise if name in OF_NOISE else clips, name) for name in extras_of(clips, noise))
    return clips.latents, clips.tokens, clips.history, offsets, noise.eps, noise.levels, *more


def extras_of(clips: Clips, noise: Noise) -> tuple[str, ...]:
    """Names of what this batch has besides; a run's batches agree in it."""
    pairs = [(clips, name) for name in OF_CLIPS] + [(noise, name) for name in OF_NOISE]
    return tuple(name for owner, name in pairs if getattr(owner, name) is not None)


def batch_of_tensors(tensors: tuple[Tensor, ...], extras: tuple[str, ...], unmasked: int) -> tuple[Clips, Noise]:
    """`tensors_of` back. unmasked: see `Clips`."""
    latents, tokens, history, offsets, eps, levels, *rest = tensors
    more = dict(zip(extras, rest))
    clips = Clips(latents, tokens, history, unmasked, offsets, *(more.get(name) for name in OF_CLIPS))
    return clips, Noise(eps, levels, *(more.get(name) for name in OF_NOISE))
