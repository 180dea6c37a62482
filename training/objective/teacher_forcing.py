"""Teacher forcing: every chunk of a clip denoised in one pass, given the clean chunks before it.

The network sees [clean ; noisy] as one sequence with the same positions in both parts; a history says which clean
chunks a chunk may look at. Only the noisy part goes through the head. No chunk looks at the last clean one, so that
one is left out: the result is the same.

Image to video: a sample's first frame may be given. It then stands clean in the noisy part, too, at timestep 0, and
doesn't count in the loss, as the runtime clamps it.

Legend: B batch, N chunks (blocks), F = N * chunk latents frames, T tokens of a block, H heads, D head_dim,
E text length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from longtake.training.models.presets import Preset
from longtake.training.models.wan.dit import Attend, CausalDiT
from longtake.training.models.wan.rope import rope_tables, timestep_sinusoid
from longtake.training.objective.noise import add_noise, sample_levels


@dataclass(frozen=True)
class Clips:
    """Clips as the loss needs them, all on one device.

    latents: normalized, [B, F, C, H, W]. tokens: one prompt a chunk, int32 [B, N, E].
    history: which clean blocks each block sees, bool [N, N] or [B, N, N] (see `window`). unmasked: blocks before this
    number see all blocks before them in every sample. offsets: latent frames added to the temporal positions of each
    chunk, [B, N], or None. given: frames that the noisy part holds clean, bool [B, F], or None: none. valid: frames
    that are no padding, bool [B, F], or None: all.
    """

    latents: Tensor
    tokens: Tensor
    history: Tensor
    unmasked: int = 0
    offsets: Tensor | None = None
    given: Tensor | None = None
    valid: Tensor | None = None

    @property
    def chunks(self) -> int:
        return self.tokens.shape[1]

    @property
    def counted(self) -> Tensor | None:
        """Frames that count in the loss, bool [B, F]; None: all."""
        if self.given is None:
            return self.valid
        return ~self.given if self.valid is None else self.valid & ~self.given


@dataclass(frozen=True)
class Noise:
    """Noise of a batch: eps like the latents, levels (timestep, sigma, weight) a chunk, fp32 [B, N, 3].

    start: what is noised, context: what the clean part shows; both like the latents, which they are if None. Errors of
    earlier steps may be in them (see `error_recycling`), and in eps: the target is eps - latents all the same.
    """

    eps: Tensor
    levels: Tensor
    start: Tensor | None = None
    context: Tensor | None = None


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


def noisy_part(clips: Clips, noise: Noise) -> tuple[Tensor, Tensor]:
    """Noised latents like the latents, and each frame's timestep, fp32 [B, F]; given frames are clean, at 0."""
    per_frame = noise.levels.repeat_interleave(clips.latents.shape[1] // clips.chunks, 1)
    start = clips.latents if noise.start is None else noise.start
    noisy = add_noise(start, noise.eps, per_frame[..., 1, None, None, None])
    if clips.given is None:
        return noisy, per_frame[..., 0]
    return (
        torch.where(clips.given[..., None, None, None], clips.latents, noisy),
        per_frame[..., 0].masked_fill(clips.given, 0.0),
    )


def predict_velocity(
    dit: CausalDiT, preset: Preset, embeddings: Tensor, clips: Clips, noise: Noise, attend: Attend | None = None
) -> Tensor:
    """Velocity of the noisy part, fp32 [B, F, C, H, W].

    Args:
        embeddings: of each chunk's prompt, [B, N, E, text_dim].
        attend: self-attention of [clean ; noisy] without the last clean block; `block_attention` if None.
    """
    chunk, clean = preset.chunk_latents, (clips.chunks - 1) * preset.chunk_latents
    noisy, levels = noisy_part(clips, noise)
    context = clips.latents if noise.context is None else noise.context
    timesteps = torch.cat((torch.zeros_like(levels[:, :clean]), levels), 1)
    rope = rope_tables(preset.dit, positions(clips, chunk), preset.grid_hw)
    cos, sin = (torch.cat((table[..., : clean * preset.frame_tokens, :], table), -2) for table in rope)
    velocity = dit(
        torch.cat((context[:, :clean], noisy), 1).transpose(1, 2),
        timestep_sinusoid(timesteps, preset.dit.freq_dim),
        (cos, sin),
        [torch.cat((c[:, :-1], c), 1) for c in dit.context(embeddings)],
        attend or block_attention(clips, preset.chunk_tokens),
        skip_frames=clean,
    )
    return velocity.transpose(1, 2)


def flow_loss(velocity: Tensor, clips: Clips, noise: Noise) -> tuple[Tensor, Tensor]:
    """Weighted and plain loss: per-frame MSE of v against eps - x0 in fp32, times the level's weight, then the mean.

    The mean is over the frames that count (`Clips.counted`); where none does, it is 0.
    """
    error = (velocity.float() - (noise.eps - clips.latents).float()).square().mean((2, 3, 4))
    counted = clips.counted
    if counted is not None:
        weights, total = noise.levels[..., 2].repeat_interleave(error.shape[1] // clips.chunks, 1), counted.sum()
        error = error.where(counted, 0.0)
        return (error * weights).sum() / total.clamp(min=1), error.sum() / total.clamp(min=1)
    per_chunk = error.unflatten(1, (clips.chunks, -1)).mean(2)
    return (per_chunk * noise.levels[..., 2]).mean(), per_chunk.mean()
