"""What samples are conditioned on: dropped prompts, for classifier-free guidance, and given first frames, for I2V."""

from __future__ import annotations

from dataclasses import replace

import torch

from longtake.training.objective.teacher_forcing import Clips


def drop_text(clips: Clips, share: float, generator: torch.Generator) -> Clips:
    """Empty all prompts of some samples, so that the model also learns to go without (for CFG)."""
    device = clips.tokens.device
    keep = torch.rand(len(clips.tokens), 1, 1, generator=generator, device=device)
    return replace(clips, tokens=clips.tokens * (keep >= share))


def give_pictures(clips: Clips, share: float, generator: torch.Generator) -> Clips:
    """Give the first frame of some samples (image to video); with share 0 nothing is drawn."""
    if not share:
        return clips
    device = clips.latents.device
    drawn = torch.rand(len(clips.tokens), generator=generator, device=device)
    given = torch.zeros(clips.latents.shape[:2], dtype=torch.bool, device=device)
    given[:, 0] = drawn < share
    return replace(clips, given=given)
