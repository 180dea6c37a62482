"""Distribution matching: what the two scores say about a generated video, the generator's gradient, the critic's loss.

Scores look at the noised video by the teacher's own rules: each chunk noised on its own, given the clean chunks before
it in the runtime's window ("clean"); the chain rule makes a joint distribution of that. Or, as LongLive 2.0 does, at the
noised video alone, every chunk seeing the noised chunks before it ("noisy"), at one noise level a sample. Both with the
positions of the rollout, offsets of cuts included.

Legend: B stories, N chunks, F latent frames of all chunks, C, H, W latent sizes, E text length.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from longtake.training.models.presets import Preset
from longtake.training.models.wan.dit import Attend, CausalDiT
from longtake.training.models.wan.rope import rope_tables, timestep_sinusoid
from longtake.training.objective.graphed import GraphedLoss, GraphedPass
from longtake.training.objective.teacher_forcing import Clips, Noise, noisy_part, positions, predict_velocity
from longtake.training.stages.flat_batch import batch_of_tensors, extras_of, tensors_of

CONTEXTS = ("clean", "noisy")
LOWEST, HIGHEST = 20.0, 980.0  # timesteps outside say too little, or nothing


def draw_levels(shape: tuple[int, int], shift: float, generator: torch.Generator, per_block: bool) -> Tensor:
    """(timestep, sigma, 1) of each block, fp32 [B, N, 3] on the generator's device: t = 1000 shift u / (1 + (shift - 1) u),
    u uniform over 0, 0.001 .. 0.999, clamped to 20..980; alike for all blocks of a sample unless `per_block`."""
    size = shape if per_block else (shape[0], 1)
    u = torch.randint(0, 1000, size, generator=generator, device=generator.device).double() / 1000
    t = (1000 * shift * u / (1 + (shift - 1) * u)).clamp(LOWEST, HIGHEST).float().expand(shape)
    return torch.stack((t, t / 1000, torch.ones_like(t)), -1)


@dataclass
class Scorer:
    """Predicts with a score network. context: "clean" or "noisy", see above."""

    preset: Preset
    context: str = "clean"

    def velocity(self, dit: CausalDiT, embeddings: Tensor, clips: Clips, noise: Noise) -> Tensor:
        """fp32 [B, F, C, H, W]; embeddings [B, N, E, text_dim]."""
        if self.context == "clean":
            return predict_velocity(dit, self.preset, embeddings, clips, noise)
        noisy, levels = noisy_part(clips, noise)
        rope = rope_tables(self.preset.dit, positions(clips, self.preset.chunk_latents), self.preset.grid_hw)
        sinusoid = timestep_sinusoid(levels, self.preset.dit.freq_dim)
        attend = causal_attention(clips, self.preset.chunk_tokens)
        return dit(noisy.transpose(1, 2), sinusoid, rope, dit.context(embeddings), attend).transpose(1, 2)

    def x0(self, dit: CausalDiT, embeddings: Tensor, clips: Clips, noise: Noise) -> Tensor:
        """The denoised video, fp32 [B, F, C, H, W]."""
        noisy, _ = noisy_part(clips, noise)
        return noisy - sigmas(clips, noise) * self.velocity(dit, embeddings, clips, noise)

    def guided_x0(
        self, dit: CausalDiT, embeddings: Tensor, nothing: Tensor, clips: Clips, noise: Noise, scale: float
    ) -> Tensor:
        """c + scale (c - u), c with the prompts and u with `nothing` [E, text_dim], both in one pass."""
        if scale == 0:
            return self.x0(dit, embeddings, clips, noise)
        both = torch.cat((embeddings, nothing.to(embeddings.dtype).expand_as(embeddings)))
        c, u = self.x0(
            dit, both, twice(clips), Noise(noise.eps.repeat(2, 1, 1, 1, 1), noise.levels.repeat(2, 1, 1))
        ).chunk(2)
        return c + scale * (c - u)


class GraphedScorer(Scorer):
    """The same from CUDA graphs. The networks must stay those that were captured, changed in place only."""

    def __init__(self, preset: Preset, context: str, autocast: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__(preset, context)
        self.autocast = autocast
        self.captured: dict[tuple[int, int, tuple[str, ...]], tuple[GraphedPass, GraphedLoss]] = {}

    def velocity(self, dit: CausalDiT, embeddings: Tensor, clips: Clips, noise: Noise) -> Tensor:
        """See Scorer."""
        extras, plain = extras_of(clips, noise), super().velocity
        key = id(dit), clips.unmasked, extras
        if key not in self.captured:

            def run(embeddings: Tensor, *tensors: Tensor) -> tuple[Tensor]:
                with self.autocast():
                    return (plain(dit, embeddings, *batch_of_tensors(tensors, extras, clips.unmasked)),)

            self.captured[key] = GraphedPass(run), GraphedLoss({"dit": dit}, run, enabled=True)
        look, learn = self.captured[key]
        with torch.autocast("cuda", enabled=False):  # a backward pass is captured, too
            tensors = (embeddings, *tensors_of(clips, noise))
            return (learn if torch.is_grad_enabled() else look)(*tensors)[0]


def causal_attention(clips: Clips, block_tokens: int) -> Attend:
    """Every block sees itself and all blocks before it, as noised as itself: q, k, v [B, N T, H, D]."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        for block in range(clips.chunks):
            own, end = slice(block * block_tokens, (block + 1) * block_tokens), (block + 1) * block_tokens
            queries, keys, values = (x.transpose(1, 2) for x in (q[:, own], k[:, :end], v[:, :end]))
            out.append(functional.scaled_dot_product_attention(queries, keys, values).transpose(1, 2))
        return torch.cat(out, 1)

    return attend


def twice(clips: Clips) -> Clips:
    """The same clips two times, one after the other."""

    def two(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.cat((x, x))

    history = clips.history if clips.history.dim() == 2 else torch.cat((clips.history, clips.history))
    latents, tokens = (torch.cat((x, x)) for x in (clips.latents, clips.tokens))
    return Clips(latents, tokens, history, clips.unmasked, two(clips.offsets), two(clips.given), two(clips.valid))


def sigmas(clips: Clips, noise: Noise) -> Tensor:
    """Each frame's sigma, fp32 [B, F, 1, 1, 1]; given frames are clean."""
    found = noise.levels[..., 1].repeat_interleave(clips.latents.shape[1] // clips.chunks, 1)
    if clips.given is not None:
        found = found.masked_fill(clips.given, 0.0)
    return found[..., None, None, None]


def dmd_gradient(x: Tensor, real: Tensor, fake: Tensor, chunks: int, counted: Tensor | None = None) -> Tensor:
    """(fake - real) / mean |x - real|, the mean over each chunk's frames that count; 0 where that isn't a number.

    Args:
        x, real, fake: fp32 [B, F, C, H, W].
        counted: frames that count, bool [B, F]; None: all. The gradient of the others is 0.
    """
    keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if counted is None else counted
    weights = keep[..., None, None, None].to(x.dtype)
    distance = ((x - real).abs() * weights).unflatten(1, (chunks, -1)).mean((3, 4, 5)).sum(2)
    normal = distance / keep.unflatten(1, (chunks, -1)).sum(2).clamp(min=1)
    normal = normal.repeat_interleave(x.shape[1] // chunks, 1)[..., None, None, None]
    return torch.nan_to_num((fake - real) / normal * weights, nan=0.0, posinf=0.0, neginf=0.0)


def dmd_loss(x: Tensor, gradient: Tensor, counted: Tensor | None = None) -> Tensor:
    """0.5 MSE(x, x - gradient) in fp64, over the frames that count: its gradient in x is `gradient` / their elements."""
    square = (x.double() - (x - gradient).detach().double()).square()
    if counted is None:
        return 0.5 * square.mean()
    return 0.5 * square.mean((2, 3, 4)).where(counted, 0.0).sum() / counted.sum().clamp(min=1)


def critic_loss(velocity: Tensor, clips: Clips, noise: Noise) -> Tensor:
    """mean (v - (eps - x))^2 over the frames that count, unweighted."""
    error = (velocity.float() - (noise.eps - clips.latents)).square().mean((2, 3, 4))
    if clips.counted is None:
        return error.mean()
    return error.where(clips.counted, 0.0).sum() / clips.counted.sum().clamp(min=1)
