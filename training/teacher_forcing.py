"""Teacher forcing: every chunk of a clip denoised in one pass, given the clean chunks before it.

The network sees [clean ; noisy] as one sequence with the same positions in both parts; a history says which clean
chunks a chunk may look at. Only the noisy part goes through the head. No chunk looks at the last clean one, so that
one is left out: the result is the same.

Legend: B batch, N chunks (blocks), F = N * chunk latents frames, T tokens of a block, H heads, D head_dim,
E text length.
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
    history: which clean blocks each block sees, bool [N, N] or [B, N, N] (see `window`). unmasked: blocks before this
    number see all blocks before them in every sample. offsets: latent frames added to the temporal positions of each
    chunk, [B, N], or None.
    """

    latents: Tensor
    tokens: Tensor
    history: Tensor
    unmasked: int = 0
    offsets: Tensor | None = None

    @property
    def chunks(self) -> int:
        return self.tokens.shape[1]


@dataclass(frozen=True)
class Noise:
    """Noise of a batch: eps like the latents, levels (timestep, sigma, weight) a chunk, fp32 [B, N, 3]."""

    eps: Tensor
    levels: Tensor


def draw_noise(clips: Clips, shift: float, generator: torch.Generator, weighting: str = "bell") -> Noise:
    """Gaussian eps and one level a chunk, on the generator's device and moved to the clips'."""
    eps = torch.randn(clips.latents.shape, generator=generator, device=generator.device)
    levels = sample_levels((len(clips.latents), clips.chunks), shift, generator, weighting)
    return Noise(eps.to(clips.latents.device), levels.to(clips.latents.device))


def block_attention(clips: Clips, block_tokens: int) -> Attend:
    """The self-attention of teacher forcing, equal to `window.block_mask` without the last clean block.

    q, k, v [B, (2N-1) T, H, D]: clean blocks 0..N-2, then noisy blocks 0..N-1. Block i of either part looks at the
    clean blocks of history[i] before it and at itself, so both are one call with the same mask and different last keys.
    """

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(1, (-1, block_tokens)) for x in (q, k, v))
        last = clips.chunks - 1
        out = [attend_block(q, k, v, block, [block, last + block], clips) for block in range(last)]
        clean, noisy = [x[:, 0] for x in out], [x[:, 1] for x in out]
        noisy.append(attend_block(q, k, v, last, [2 * last], clips)[:, 0])
        return torch.stack([*clean, *noisy], 1).flatten(1, 2)

    return attend


def attend_block(q: Tensor, k: Tensor, v: Tensor, block: int, places: list[int], clips: Clips) -> Tensor:
    """Block `block`, which stands at `places` of q, k, v [B, 2N-1, T, H, D]: its output, [B, places, T, H, D]."""
    copies = len(places)

    def pick(x: Tensor) -> Tensor:
        return torch.stack([x[:, place] for place in places], 1)

    def seen(x: Tensor) -> Tensor:
        past = x[:, None, :block].flatten(2, 3).expand(-1, copies, -1, -1, -1)
        return torch.cat((past, pick(x)), 2).flatten(0, 1).transpose(1, 2)

    mask = None
    if block >= clips.unmasked:
        mask = clips.history[..., block, : block + 1].reshape(-1, 1, block + 1)
        mask = mask.expand(len(q), copies, -1).flatten(0, 1).repeat_interleave(q.shape[2], -1)[:, None, None]
    queries = pick(q).flatten(0, 1).transpose(1, 2)
    out = functional.scaled_dot_product_attention(queries, seen(k), seen(v), attn_mask=mask)
    return out.transpose(1, 2).unflatten(0, (-1, copies))


def positions(clips: Clips, chunk_latents: int) -> Tensor:
    """Absolute temporal position of each latent frame, fp64 [F] or [B, F]."""
    frames = torch.arange(clips.latents.shape[1], dtype=torch.float64, device=clips.latents.device)
    if clips.offsets is None:
        return frames
    return frames + clips.offsets.to(torch.float64).repeat_interleave(chunk_latents, -1)


def predict_velocity(dit: CausalDiT, preset: Preset, embeddings: Tensor, clips: Clips, noise: Noise) -> Tensor:
    """Velocity of the noisy part, fp32 [B, F, C, H, W].

    Args:
        embeddings: of each chunk's prompt, [B, N, E, text_dim].
    """
    chunk, clean = preset.chunk_latents, (clips.chunks - 1) * preset.chunk_latents
    per_frame = noise.levels.repeat_interleave(chunk, 1)
    noisy = add_noise(clips.latents, noise.eps, per_frame[..., 1, None, None, None])
    timesteps = torch.cat((torch.zeros_like(per_frame[:, :clean, 0]), per_frame[..., 0]), 1)
    rope = rope_tables(preset.dit, positions(clips, chunk), preset.grid_hw)
    cos, sin = (torch.cat((table[..., : clean * preset.frame_tokens, :], table), -2) for table in rope)
    velocity = dit(
        torch.cat((clips.latents[:, :clean], noisy), 1).transpose(1, 2),
        timestep_sinusoid(timesteps, preset.dit.freq_dim),
        (cos, sin),
        [torch.cat((c[:, :-1], c), 1) for c in dit.context(embeddings)],
        block_attention(clips, preset.chunk_tokens),
        skip_frames=clean,
    )
    return velocity.transpose(1, 2)


def flow_loss(velocity: Tensor, clips: Clips, noise: Noise) -> tuple[Tensor, Tensor]:
    """Weighted and plain loss: per-frame MSE of v against eps - x0 in fp32, times the level's weight, then the mean."""
    error = (velocity.float() - (noise.eps - clips.latents).float()).square().mean((2, 3, 4))
    per_chunk = error.unflatten(1, (clips.chunks, -1)).mean(2)
    return (per_chunk * noise.levels[..., 2]).mean(), per_chunk.mean()
