"""What a world's transformer learns from: walks whose chunks are noised, each after the clean ones before it.

A chunk's own pass, at its noise level, reads what the clean pass of the chunk before it left, as in a session. Or all of a
walk is one chunk at one level, which every layer looks at forwards and backwards ("whole"): a teacher that is no session's.

Legend: B walks, N chunks, C channels, F latent frames of all chunks, h, w latent size, E text length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from longtake.training.data.rooms.latents import Walks
from longtake.training.models.presets import Preset
from longtake.training.models.sana_wm.attention import Camera, Carried
from longtake.training.models.sana_wm.camera import chunk_maps
from longtake.training.models.sana_wm.dit import Chunk, SanaWMDiT
from longtake.training.models.sana_wm.memory import Memory
from longtake.training.models.sana_wm.networks import MASKED
from longtake.training.models.sana_wm.rope import tables
from longtake.training.models.wan.rope import timestep_sinusoid

GRID, SHIFT = 1000, 9.95  # of the noise levels, as published
FIRST_GIVEN = 0.9  # share of walks whose first frame is given, as published
CONTEXTS = ("full", "window", "whole")


@dataclass(frozen=True)
class Levels:
    """Of each frame: timestep, sigma and weight in the loss, fp32 [B, F, 3]. A given frame is at 0 and does not count."""

    frames: Tensor

    @property
    def times(self) -> Tensor:
        return self.frames[..., 0]

    @property
    def sigmas(self) -> Tensor:
        """[B, 1, F, 1, 1]."""
        return self.frames[..., 1][:, None, :, None, None]


def bell(sigma: Tensor) -> Tensor:
    """`noise.grid_weights` of any sigma, but for a mean of 1 over this grid."""
    grid = torch.arange(GRID, dtype=torch.float64) / GRID
    grid = SHIFT * grid / (1 + (SHIFT - 1) * grid)
    low = torch.exp(torch.tensor(-0.5, dtype=torch.float64))
    mean = (torch.exp(-2 * (grid - 0.5) ** 2) - low).mean()
    return ((torch.exp(-2 * (sigma.double() - 0.5) ** 2) - low) / mean).float()


def draw_levels(
    spans: Sequence[range], batch: int, given: float, generator: torch.Generator, weighting: str = "uniform"
) -> Levels:
    """A level for each chunk, on the generator's device: logit-normal over a grid of 1000, shifted; timesteps are whole.

    given: share of walks whose first frame is given.
    """
    device = generator.device
    u = torch.randn(batch, len(spans), generator=generator, device=device).sigmoid()
    u = (GRID * u).floor() / GRID
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    rows = torch.stack((GRID * sigma, sigma, torch.ones_like(sigma) if weighting == "uniform" else bell(sigma)), -1)
    rows[..., 0].floor_()
    frames = rows.repeat_interleave(torch.tensor([len(span) for span in spans], device=device), 1)
    pinned = torch.rand(batch, generator=generator, device=device) < given
    frames[:, 0] = torch.where(pinned[:, None], torch.zeros_like(frames[:, 0]), frames[:, 0])
    return Levels(frames)


def spans_of(preset: Preset, chunks: int, whole: bool = False) -> list[range]:
    """The latent frames of each chunk; of the one chunk that all of them are."""
    if whole:
        return [range(preset.first_frame(chunks))]
    return [range(preset.first_frame(n), preset.first_frame(n + 1)) for n in range(chunks)]


class Walk:
    """A batch of walks as the transformer goes through it, chunk by chunk, with what every chunk reads of it."""

    def __init__(self, dit: SanaWMDiT, preset: Preset, walks: Walks, embeddings: Tensor, window: int = -1) -> None:
        """`embeddings` [B, E, text_dim], rows of padding zero. window: earlier chunks that softmax attention sees."""
        self.dit, self.preset = dit, preset
        batch, frames = len(walks), walks.latents.shape[2]
        intrinsics = walks.intrinsics[:, None].expand(-1, walks.poses.shape[1], -1)
        grid, stride = preset.latent_hw, preset.vae.stride[0]
        rays, inverse, self.maps = chunk_maps(walks.poses, intrinsics, range(frames), stride, grid)
        self.rays, self.inverse = rays, inverse
        config, self.device = dit.config, walks.latents.device
        of_head = partial(tables, config.head_dim, range(frames), preset.grid_hw, config.rope_theta)
        whole, half = of_head(), of_head(config.head_dim // 2)
        self.rope, self.half = ([x.to(self.device) for x in pair] for pair in (whole, half))
        there = embeddings.abs().amax(-1) > 0
        self.mask = torch.where(there, 0.0, MASKED)
        self.context = dit.context(embeddings)
        like = torch.empty(0, device=self.device, dtype=dit.dtype)
        self.memory = Memory(config, preset.frame_tokens, window, batch=(batch,), like=like)

    def chunk(self, span: range) -> Chunk:
        """What the blocks read of a chunk, besides its tokens."""
        at = slice(span.start, span.stop)
        half = self.half[0][at], self.half[1][at]
        camera = Camera(self.rays[:, at], self.inverse[:, at], half)
        maps = self.dit.plucker(self.maps[:, :, at])
        return Chunk((self.rope[0][at], self.rope[1][at]), camera, maps, self.memory.attend, self.memory.carried)

    def look(
        self, span: range, latents: Tensor, times: Tensor, chunk: Chunk | None = None
    ) -> tuple[Tensor, list[Carried]]:
        """A pass over a chunk: latents [B, C, f, h, w], times [B, f]; velocity likewise, and what it leaves."""
        sinusoid = timestep_sinusoid(times, self.preset.dit.freq_dim)
        return self.dit(latents, sinusoid, self.context, self.mask, chunk or self.chunk(span))

    def clean(self, span: range, latents: Tensor) -> None:
        """The pass at timestep 0 that the next chunk's state comes from."""
        _, kept = self.look(span, latents, torch.zeros(len(latents), len(span), device=self.device))
        self.memory.commit(kept)


def predict(
    dit: SanaWMDiT, preset: Preset, walks: Walks, embeddings: Tensor, eps: Tensor, levels: Levels, context: str
) -> Tensor:
    """Velocity fp32 [B, C, F, h, w] of walks noised by `eps`, like their latents. context: one of CONTEXTS."""
    frames = walks.latents.shape[2]
    spans = spans_of(preset, preset.whole_chunks(frames), context == "whole")
    window = preset.window_chunks - 1 if context == "window" else -1
    walk = Walk(dit, preset, walks, embeddings, window)
    noisy = (1 - levels.sigmas) * walks.latents + levels.sigmas * eps
    out = []
    for span in spans:
        at = slice(span.start, span.stop)
        chunk = walk.chunk(span)
        out.append(walk.look(span, noisy[:, :, at], levels.times[:, at], chunk)[0])
        if span.stop < frames:
            walk.clean(span, walks.latents[:, :, at])
    return torch.cat(out, 2)


def flow_loss(velocity: Tensor, walks: Walks, eps: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Weighted and plain mean of (v - (eps - x0))^2 in fp32 over the frames that are noised."""
    error = (velocity.float() - (eps - walks.latents)).square().mean((1, 3, 4))
    counted = (levels.frames[..., 1] > 0).float()
    total = counted.sum().clamp(min=1)
    return (error * counted * levels.frames[..., 2]).sum() / total, (error * counted).sum() / total
