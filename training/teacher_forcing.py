"""Teacher forcing: every chunk of a clip denoised in one pass, given the clean chunks before it.

The network sees [clean ; noisy] as one sequence with the same positions in both halves; a block mask says which
clean history a noisy chunk may look at. Only the noisy half goes through the head.

Legend: B batch, N chunks (blocks), F = N * chunk latents frames, L tokens of the doubled sequence, E text length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from longtake.training.dit import Attend, CausalDiT
from longtake.training.noise import add_noise, sample_levels
from longtake.training.presets import Preset
from longtake.training.rope import rope_tables, timestep_sinusoid


@dataclass(frozen=True)
class Clips:
    """Clips as the loss needs them, all on one device.

    latents: normalized, [B, F, C, H, W]. tokens: one prompt a chunk, int32 [B, N, E].
    mask: block mask of [clean; noisy], bool [2N, 2N] or [B, 2N, 2N]. offsets: latent frames added to the temporal
    positions of each chunk, [B, N], or None.
    """

    latents: Tensor
    tokens: Tensor
    mask: Tensor
    offsets: Tensor | None = None

    @property
    def chunks(self) -> int:
        return self.tokens.shape[1]


@dataclass(frozen=True)
class Noise:
    """Noise of a batch: eps like the latents, levels (timestep, sigma, weight) a chunk, fp32 [B, N, 3]."""

    eps: Tensor
    levels: Tensor


def draw_noise(clips: Clips, shift: float, generator: torch.Generator) -> Noise:
    """Gaussian eps and one level a chunk, on the generator's device and moved to the clips'."""
    eps = torch.randn(clips.latents.shape, generator=generator, device=generator.device)
    levels = sample_levels((len(clips.latents), clips.chunks), shift, generator)
    return Noise(eps.to(clips.latents.device), levels.to(clips.latents.device))


def attention_bias(mask: Tensor, block_tokens: int, dtype: torch.dtype) -> Tensor:
    """0 where a token may look and -inf where not, [1 or B, 1, L, L], of a block mask [..., 2N, 2N]."""
    tokens = mask.repeat_interleave(block_tokens, -1).repeat_interleave(block_tokens, -2)
    bias = torch.zeros(tokens.shape, dtype=dtype, device=mask.device).masked_fill_(~tokens, float("-inf"))
    return bias.reshape(-1, 1, *bias.shape[-2:])


def masked_attention(bias: Tensor) -> Attend:
    """The self-attention strategy of teacher forcing; q, k, v [B, L, H, D]."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)).transpose(1, 2)

    return attend


def positions(clips: Clips, chunk_latents: int) -> Tensor:
    """Absolute temporal position of each latent frame, fp64 [F] or [B, F]."""
    frames = torch.arange(clips.latents.shape[1], dtype=torch.float64, device=clips.latents.device)
    if clips.offsets is None:
        return frames
    return frames + clips.offsets.to(torch.float64).repeat_interleave(chunk_latents, -1)


def predict_velocity(
    dit: CausalDiT, preset: Preset, embeddings: Tensor, clips: Clips, noise: Noise, amp: torch.dtype | None = None
) -> Tensor:
    """Velocity of the noisy half, fp32 [B, F, C, H, W].

    Args:
        embeddings: of each chunk's prompt, [B, N, E, text_dim].
        amp: autocast dtype of the caller, in which the attention bias is then prepared once.
    """
    chunk, n = preset.chunk_latents, clips.chunks
    per_frame = noise.levels.repeat_interleave(chunk, 1)
    noisy = add_noise(clips.latents, noise.eps, per_frame[..., 1, None, None, None])
    timesteps = torch.cat((torch.zeros_like(per_frame[..., 0]), per_frame[..., 0]), 1)
    cos, sin = rope_tables(preset.dit, positions(clips, chunk), preset.grid_hw)
    bias = attention_bias(clips.mask, preset.chunk_tokens, amp or dit.dtype)
    velocity = dit(
        torch.cat((clips.latents, noisy), 1).transpose(1, 2),
        timestep_sinusoid(timesteps, preset.dit.freq_dim),
        (torch.cat((cos, cos), -2), torch.cat((sin, sin), -2)),
        [torch.cat((c, c), 1) for c in dit.context(embeddings)],
        masked_attention(bias),
        skip_frames=n * chunk,
    )
    return velocity.transpose(1, 2)


def flow_loss(velocity: Tensor, clips: Clips, noise: Noise) -> tuple[Tensor, Tensor]:
    """Weighted and plain loss: per-frame MSE of v against eps - x0 in fp32, times the level's weight, then the mean."""
    error = (velocity.float() - (noise.eps - clips.latents).float()).square().mean((2, 3, 4))
    per_chunk = error.unflatten(1, (clips.chunks, -1)).mean(2)
    return (per_chunk * noise.levels[..., 2]).mean(), per_chunk.mean()
