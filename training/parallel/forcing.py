"""Teacher forcing of which a rank computes a part: the blocks that a layout gives it.

Equal to `teacher_forcing`, on any number of ranks: the gathered sequence is attended to by the rule of `window`, and
the loss is the sum over all ranks divided by the number of frames that count on all ranks.

Legend: B samples of a rank, N chunks, F latent frames of a chunk, E text length; a rank holds c clean and n noisy blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longtake.training.models.presets import Preset
from longtake.training.models.ulysses import gather_heads, gather_tokens
from longtake.training.models.wan.dit import RECOMPUTED, Attend, Attention, CausalDiT, Rope, plain_norm_rope
from longtake.training.models.wan.rope import rope_tables, timestep_sinusoid
from longtake.training.objective.teacher_forcing import Clips, Noise, noisy_part
from longtake.training.parallel.attention import attend_seen
from longtake.training.parallel.layout import Layout
from longtake.training.parallel.ranks import Ranks

Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """What a rank feeds to the network, clean blocks before noisy ones.

    latents: [B, (c+n) F, C, H, W]. timesteps: fp32 [B, (c+n) F]. positions: temporal ones, fp64 [B or none, (c+n) F].
    tokens: a prompt for each different chunk, int32 [B, m, E]; prompt_of: which one a block reads. clean_frames: c F.
    """

    latents: Tensor
    timesteps: Tensor
    positions: Tensor
    tokens: Tensor
    prompt_of: tuple[int, ...]
    clean_frames: int


def part_of(clips: Clips, noise: Noise, layout: Layout, place: int, frames: int) -> Part:
    """The part of rank `place` of a sequence group. `frames`: latent frames of a chunk."""
    clean, noisy = layout.clean(place), layout.noisy(place)
    mixed, timesteps = (blocks(x, noisy, frames) for x in noisy_part(clips, noise))
    shown = blocks(clips.latents if noise.context is None else noise.context, clean, frames)
    chunks = sorted({*clean, *noisy})
    return Part(
        latents=torch.cat((shown, mixed), 1),
        timesteps=torch.cat((timesteps.new_zeros(shown.shape[:2]), timesteps), 1),
        positions=positions(clips, clean + noisy, frames),
        tokens=clips.tokens[:, chunks],
        prompt_of=tuple(chunks.index(chunk) for chunk in clean + noisy),
        clean_frames=shown.shape[1],
    )


def blocks(x: Tensor, chunks: Sequence[int], frames: int) -> Tensor:
    """The frames of some chunks of x [B, N F, ...]."""
    return x.unflatten(1, (-1, frames))[:, list(chunks)].flatten(1, 2)


def per_frame(x: Tensor, frames: int) -> Tensor:
    """[B, N, ...] to [B, N F, ...]."""
    return x.repeat_interleave(frames, 1)


def positions(clips: Clips, chunks: Sequence[int], frames: int) -> Tensor:
    """Absolute temporal positions of the frames of some chunks, shot offsets added: fp64 [..., len(chunks) F]."""
    start = torch.tensor(chunks, dtype=torch.float64, device=clips.latents.device) * frames
    if clips.offsets is not None:
        start = start + clips.offsets[..., list(chunks)].to(torch.float64)
    within = torch.arange(frames, dtype=torch.float64, device=start.device)
    return (start[..., None] + within).flatten(-2)


def attention(
    layout: Layout,
    history: Tensor,
    group: dist.ProcessGroup | None,
    complete: bool = False,
    whole: Attend | None = None,
) -> Attend:
    """Self-attention of the gathered sequence: all tokens and some heads on each rank.

    Args:
        history: bool [N, N] or [B, N, N] (see `window`).
        complete: see `Layout.seen`.
        whole: what attends in the gathered sequence, in the layout's order; `attend_seen` if None.
    """
    rows = history.cpu()  # one wait a step, before any of its layers
    seen = [layout.seen(row, complete) for row in (rows[None] if rows.dim() == 2 else rows)]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (gather_tokens(x, group) for x in (q, k, v))
        return gather_heads(whole(layer, q, k, v) if whole else attend_seen(q, k, v, seen), group)

    return attend


def part_velocity(dit: CausalDiT, preset: Preset, embed: Embed, part: Part, attend: Attend) -> Tensor:
    """Velocity of the rank's noisy blocks, fp32 [B, n F, C, H, W]. `embed`: tokens int32 [P, E] to embeddings."""
    embeddings = embed(part.tokens.flatten(0, 1)).unflatten(0, part.tokens.shape[:2])
    prompts, total = list(part.prompt_of), part.latents.shape[1]
    skipped = min(part.clean_frames, total - 1)  # a rank without noisy blocks sends a frame through the head, too
    velocity = dit(
        part.latents.transpose(1, 2),
        timestep_sinusoid(part.timesteps, preset.dit.freq_dim),
        rope_tables(preset.dit, part.positions, preset.grid_hw),
        [c[:, prompts] for c in dit.context(embeddings)],
        attend,
        skip_frames=skipped,
        norm_rope=lean_norm_rope if dit.checkpointing else plain_norm_rope,
    )
    return velocity.transpose(1, 2)[:, part.clean_frames - skipped :]


def lean_norm_rope(own: Attention, q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """`plain_norm_rope`, computed once more by the backward pass: otherwise that would hold four fp32 copies of q or k,
    a fifth of what a block takes while it is computed again."""
    found: tuple[Tensor, Tensor] = checkpoint(plain_norm_rope, own, q, k, rope, **RECOMPUTED)  # type: ignore[no-untyped-call]
    return found


def part_loss(
    velocity: Tensor, clips: Clips, noise: Noise, layout: Layout, ranks: Ranks, frames: int
) -> tuple[Tensor, Tensor]:
    """Weighted and plain flow loss of the whole batch; the gradient is this rank's share of it, times `ranks.world`.

    Averaging gradients over all ranks, as FSDP does, then gives the gradient of the loss, however unevenly the frames
    that count are spread over the ranks. Both values are the same on all ranks.

    Args:
        velocity: from `part_velocity`.
        clips, noise: the samples of this rank's sequence group, whole.
    """
    chunks = layout.noisy(ranks.place)
    target = blocks(noise.eps, chunks, frames) - blocks(clips.latents, chunks, frames)
    error = (velocity.float() - target.float()).square().mean((2, 3, 4))
    counted = torch.ones_like(error)
    if clips.counted is not None:
        mask = blocks(clips.counted, chunks, frames)
        error, counted = error.where(mask, 0.0), mask.to(error.dtype)
    sums = torch.stack(((error * per_frame(noise.levels[:, chunks, 2], frames)).sum(), error.sum()))
    totals = ranks.total(torch.cat((sums, counted.sum()[None])))
    count = totals[2].clamp(min=1)
    own = sums[0] * (ranks.world / count)
    weighted, plain = totals[:2] / count
    return own + (weighted - own.detach()), plain


def whole_velocity(velocity: Tensor, layout: Layout, ranks: Ranks, frames: int) -> Tensor:
    """The velocities of all ranks of a sequence group put together, [B, N F, C, H, W], without gradient."""
    shape = (len(velocity), layout.chunks * frames, *velocity.shape[2:])
    put = velocity.new_zeros(shape).unflatten(1, (-1, frames))
    put[:, layout.noisy(ranks.place)] = velocity.detach().unflatten(1, (-1, frames))
    if ranks.group is not None:
        dist.all_reduce(put, group=ranks.group)
    return put.flatten(1, 2)
