"""A student's own video, chunk by chunk, by the runtime's rules, with a gradient where distillation wants one.

A chunk is denoised without gradient up to the exit step; that pass keeps its gradient, and its x0 prediction is the
chunk. A clean pass at timestep 0 on it writes K and V, without gradient: a chunk's loss reaches the weights through its
own exit pass only, never through the cache of chunks before it.

Slots, window, sinks, positions (with the offset of every cut), timesteps and solver are those of a session, so with the
last step as the exit the rollout is what a session generates.

Legend: B stories, N chunks, F latent frames of a chunk, L tokens of a chunk, H heads, D head_dim, E text length, C, h, w latent sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from longtake.runtime.conditions import frame_positions
from longtake.runtime.sampler import UniPC
from longtake.runtime.slots import visible_blocks
from longtake.training.dit import Attend, CausalDiT
from longtake.training.experiment.batched import round_trip_kv
from longtake.training.presets import Preset
from longtake.training.rope import rope_tables, timestep_sinusoid


@dataclass(frozen=True)
class Story:
    """What a batch of stories is generated from.

    embeddings: of each chunk's prompt, [B, N, E, text_dim]. cuts: [B][N]. noise: fp32 [B, N F, C, h, w].
    first: the latent frame that each video starts from, fp32 [B, C, h, w], or None.
    """

    embeddings: Tensor
    cuts: Sequence[Sequence[bool]]
    noise: Tensor
    first: Tensor | None = None

    @property
    def chunks(self) -> int:
        return self.embeddings.shape[1]


class KeptChunks:
    """K and V of all layers and stories, chunk by chunk; which of them a chunk sees is the slot table's word.

    They are not kept in slots that are written over: a backward pass that computes a block again (gradient
    checkpointing) has to find what it saw. A chunk that no later one sees is let go. `fmt` "nvfp4" keeps what the 4-bit
    cache would give back.
    """

    def __init__(self, preset: Preset, cuts: Sequence[Sequence[bool]], dtype: torch.dtype, fmt: str) -> None:
        self.fmt, self.dtype = fmt, dtype
        self.layers: list[dict[int, Tensor]] = [{} for _ in range(preset.dit.layers)]  # by chunk: [B, 2, L, H, D]
        self.visible = [visible_blocks(story, preset.window_chunks) for story in cuts]

    def attend(self, chunk: int, write: bool) -> Attend:
        """Self-attention of chunk `chunk` over the chunks it sees and itself, which is kept if `write`."""
        needed = {seen for story in self.visible for later in story[chunk:] for seen in later}
        self.layers = [{seen: kept for seen, kept in layer.items() if seen in needed} for layer in self.layers]
        rows = [(story, seen) for story, blocks in enumerate(self.visible) for seen in blocks[chunk][:-1]]
        held, stories = [dict(layer) for layer in self.layers], len(self.visible)

        def run(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if write:
                fresh = torch.stack((k, v), 1).detach()
                kept = round_trip_kv(fresh) if self.fmt == "nvfp4" else fresh
                self.layers[layer][chunk] = kept.to(self.dtype)
            own = k.to(q.dtype), v.to(q.dtype)
            if rows:
                past = torch.stack([held[layer][seen][story] for story, seen in rows]).to(q.dtype)
                past = past.unflatten(0, (stories, -1))
                own = tuple(torch.cat((past[:, :, i].flatten(1, 2), x), 1) for i, x in enumerate(own))  # type: ignore[assignment]
            queries, keys, values = (x.transpose(1, 2) for x in (q, *own))
            return functional.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)

        return run


@dataclass(frozen=True)
class Rollout:
    """How a student generates. steps: of the student. cache: "bf16" (as computed) or "nvfp4" (4 bits)."""

    preset: Preset
    steps: int
    cache: str = "nvfp4"

    def __call__(self, dit: CausalDiT, story: Story, exit_step: int, gradient: bool = False) -> Tensor:
        """Latents fp32 [B, N F, C, h, w], each chunk as predicted at `exit_step` (0-based).

        gradient: keep it through the exit passes.
        """
        frames, device = self.preset.chunk_latents, story.noise.device
        dtype = torch.bfloat16 if torch.is_autocast_enabled(device.type) else dit.dtype
        cache = KeptChunks(self.preset, story.cuts, dtype, self.cache)
        with torch.set_grad_enabled(gradient):
            context = dit.context(story.embeddings)
        done = []
        for chunk, noise in enumerate(story.noise.split(frames, 1)):
            own = [layer[:, chunk : chunk + 1] for layer in context]
            first = story.first if chunk == 0 else None
            x0 = self._chunk(dit, cache, chunk, noise.transpose(1, 2), own, story, first, exit_step, gradient)
            done.append(x0)
        return torch.cat(done, 2).transpose(1, 2)

    def _chunk(
        self,
        dit: CausalDiT,
        cache: KeptChunks,
        chunk: int,
        sample: Tensor,
        context: list[Tensor],
        story: Story,
        first: Tensor | None,
        exit_step: int,
        gradient: bool,
    ) -> Tensor:
        rope = rope_tables(self.preset.dit, self.positions(story.cuts, chunk, sample.device), self.preset.grid_hw)
        detached = [layer.detach() for layer in context]

        def velocity(x: Tensor, timestep: int, write: bool = False, pinned: bool = first is not None) -> Tensor:
            text = context if torch.is_grad_enabled() else detached
            sinusoid = self._sinusoid(timestep, pinned, x.device).expand(len(x), -1, -1)
            return dit(x, sinusoid, rope, text, cache.attend(chunk, write)).float()

        x0 = self._denoise(pinned_first(sample, first), first, velocity, exit_step, gradient)
        if chunk + 1 < story.chunks:
            with torch.no_grad():
                velocity(x0.detach(), 0, write=True, pinned=False)
        return x0

    def _denoise(
        self, sample: Tensor, first: Tensor | None, velocity: Callable[..., Tensor], exit_step: int, gradient: bool
    ) -> Tensor:
        """The chunk as predicted at the exit step: [B, C, F, h, w]."""
        solver = UniPC(self.steps, self.preset.sampling.shift)
        with torch.no_grad():
            for step in solver.schedule[:exit_step]:
                sample = pinned_first(solver.step(velocity(sample, step.timestep), sample), first)
        last = solver.schedule[exit_step]
        with torch.set_grad_enabled(gradient):
            return pinned_first(sample - last.sigma * velocity(sample, last.timestep), first)

    def positions(self, cuts: Sequence[Sequence[bool]], chunk: int, device: torch.device) -> Tensor:
        """Temporal positions of a chunk's frames, fp64 [B, F], each shot begun so far offset as in a session."""
        shots = [sum(map(bool, story[1 : chunk + 1])) for story in cuts]
        found = [frame_positions(self.preset, chunk, shot) for shot in shots]
        return torch.tensor(found, dtype=torch.float64).to(device, non_blocking=True)

    def _sinusoid(self, timestep: int, pinned: bool, device: torch.device) -> Tensor:
        frames = self.preset.chunk_latents
        times = [0.0 if pinned and frame == 0 else float(timestep) for frame in range(frames)]
        return timestep_sinusoid(times, self.preset.dit.freq_dim)[None].to(device, non_blocking=True)


def pinned_first(sample: Tensor, first: Tensor | None) -> Tensor:
    """`sample` [B, C, F, h, w] with frame 0 replaced by `first` [B, C, h, w]; no gradient reaches that frame."""
    return sample if first is None else torch.cat((first[:, :, None], sample[:, :, 1:]), 2)
