"""Held-out stories: the seed of the noise they are measured at, and what the model makes of one of them.

Legend: N chunks, T frames.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longtake.training.distill.rollout import Rollout, Story
from longtake.training.models.sampler import noise_for_chunk
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.models.wan.vae import CausalVAE
from longtake.training.objective.chunk_pass import ChunkPass
from longtake.training.objective.teacher_forcing import Clips, Noise, draw_noise
from longtake.training.stages.options import StageOptions
from longtake.training.stages.precompute import Stories

EVALUATION_SEED = 20_000_003
Velocity = Callable[[Clips, Noise], Tensor]


class Guided(ChunkPass):
    """Passes of stories in pairs, with a prompt and without, which are taken on by one guided velocity."""

    guidance = 1.0

    def look(self, *tensors: Tensor) -> Tensor:
        """See ChunkPass."""
        prompted, without = super().look(*tensors).chunk(2)
        return (without + self.guidance * (prompted - without)).repeat(2, 1, 1, 1, 1)


@torch.no_grad()
def sampled_video(
    dit: CausalDiT, embed: Callable[[Tensor], Tensor], vae: CausalVAE, held_out: Stories, chunks: int
) -> Tensor:
    """A held-out story, and under it what the model makes of its prompts as a session would: uint8 [2, T, 3, H, W]."""
    preset, device = held_out.preset, held_out.tokens.device
    clips = held_out.clips(torch.zeros(1, dtype=torch.long, device=device), chunks)
    tokens = torch.cat((clips.tokens, torch.zeros_like(clips.tokens)))
    embeddings = embed(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
    noise = torch.cat([noise_for_chunk(preset, 0, chunk) for chunk in range(chunks)], 1).to(device)
    cuts = [held_out.cuts[0, :chunks].tolist()] * 2
    rollout = Rollout(preset, preset.sampling.steps, "bf16")
    passes = Guided(dit, "bf16", rollout.kept_dtype(dit, device))
    passes.guidance = preset.sampling.guidance
    made = rollout(dit, Story(embeddings, cuts, noise.repeat(2, 1, 1, 1, 1)), rollout.steps - 1, passes=passes)
    video = vae.decode(torch.cat((clips.latents, made[:1].float())))
    return ((video * 0.5 + 0.5) * 255).round().to(torch.uint8).transpose(1, 2)


@torch.no_grad()
def one_step_video(
    velocity: Velocity, vae: CausalVAE, held_out: Stories, options: StageOptions, device: torch.device
) -> Tensor:
    """A held-out story, and under it what the model makes of it in one step from 80 % noise: uint8 [2, T, 3, H, W]."""
    clips = held_out.clips(torch.zeros(1, dtype=torch.long, device=device), max(options.chunks))
    noise = draw_noise(clips, options.preset.sampling.shift, torch.Generator().manual_seed(EVALUATION_SEED))
    noise.levels[..., 0], noise.levels[..., 1] = 800.0, 0.8
    noisy = 0.2 * clips.latents + 0.8 * noise.eps
    guess = noisy - 0.8 * velocity(clips, noise)
    video = vae.decode(torch.cat((clips.latents, guess)))
    return ((video * 0.5 + 0.5) * 255).round().to(torch.uint8).transpose(1, 2)
