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

from longtake.training.models.presets import Preset
from longtake.training.models.sampler import UniPC, schedule_of
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.models.wan.rope import frame_positions, rope_tables, timestep_sinusoid
from longtake.training.models.wan.slots import visible_blocks
from longtake.training.objective.chunk_pass import ChunkPass


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
    checkpointing) has to find what it saw. A chunk that no later one sees is let go.
    """

    def __init__(self, preset: Preset, cuts: Sequence[Sequence[bool]]) -> None:
        self.chunks: dict[int, tuple[Tensor, ...]] = {}  # each layer's [B, 2, L, H, D]
        self.layers = preset.dit.layers
        self.visible = [visible_blocks(story, preset.window_chunks) for story in cuts]

    def before(self, chunk: int) -> list[Tensor]:
        """What chunk `chunk` sees besides itself: each layer's chunks, one after the other, [B, 2, L, H, D] each."""
        needed = {seen for story in self.visible for later in story[chunk:] for seen in later}
        self.chunks = {seen: kept for seen, kept in self.chunks.items() if seen in needed}
        places = list(zip(*(blocks[chunk][:-1] for blocks in self.visible)))
        gathers = [self._gather(place) for place in places]
        return [self._gathered(layer, *gather) for layer in range(self.layers) for gather in gathers]

    def _gather(self, place: Sequence[int]) -> tuple[list[int], Tensor | None]:
        """The chunks among `place` [B], and which of them each story sees; None: all see the one."""
        ids = sorted(set(place))
        if len(ids) == 1:
            return ids, None
        return ids, torch.tensor([ids.index(seen) for seen in place], device=self.chunks[ids[0]][0].device)

    def _gathered(self, layer: int, ids: list[int], rows: Tensor | None) -> Tensor:
        """Row b of the chunk ids[rows[b]]."""
        found = [self.chunks[seen][layer] for seen in ids]
        return found[0] if rows is None else torch.stack(found)[rows, torch.arange(len(rows), device=rows.device)]


@dataclass(frozen=True)
class Rollout:
    """How a student generates. steps: of the student. cache: "bf16" (as computed) or "nvfp4" (4 bits)."""

    preset: Preset
    steps: int
    cache: str = "nvfp4"

    def __call__(
        self,
        dit: CausalDiT,
        story: Story,
        exit_step: int,
        gradient: bool = False,
        passes: ChunkPass | None = None,
        learnt: int | None = None,
    ) -> Tensor:
        """Latents fp32 [B, N F, C, h, w], each chunk as predicted at `exit_step` (0-based).

        gradient: keep it through the exit passes. passes: those of `dit`, if they are not to be plain ones. learnt: the
        last so many chunks alone have that exit and that gradient; those before are what a session generates. None: all.
        """
        begin = 0 if learnt is None else story.chunks - learnt
        frames, device = self.preset.chunk_latents, story.noise.device
        passes = passes or ChunkPass(dit, self.cache, self.kept_dtype(dit, device))
        cache = KeptChunks(self.preset, story.cuts)
        with torch.set_grad_enabled(gradient):
            context = dit.context(story.embeddings)
        done = []
        for chunk, noise in enumerate(story.noise.split(frames, 1)):
            own = [layer[:, chunk : chunk + 1] for layer in context]
            learns = chunk >= begin
            exits = exit_step if learns else self.steps - 1
            with_gradient = gradient and learns
            x0 = self._chunk(passes, cache, chunk, noise.transpose(1, 2), own, story, exits, with_gradient, begin)
            done.append(x0)
        return torch.cat(done, 2).transpose(1, 2)

    def kept_dtype(self, dit: CausalDiT, device: torch.device) -> torch.dtype:
        """Of K and V: that of the passes."""
        return torch.bfloat16 if torch.is_autocast_enabled(device.type) else dit.dtype

    def _chunk(
        self,
        passes: ChunkPass,
        cache: KeptChunks,
        chunk: int,
        sample: Tensor,
        context: list[Tensor],
        story: Story,
        exit_step: int,
        gradient: bool,
        begin: int,
    ) -> Tensor:
        rope = rope_tables(self.preset.dit, self.positions(story.cuts, chunk, sample.device), self.preset.grid_hw)
        detached, past = [layer.detach() for layer in context], cache.before(chunk)
        first = story.first if chunk == 0 else None

        def velocity(x: Tensor, timestep: int, learn: bool = False) -> Tensor:
            sinusoid = self._sinusoid(timestep, first is not None, x)
            if learn:
                return passes.learn(chunk - begin, x, sinusoid, *rope, *context, *past)
            return passes.look(x, sinusoid, *rope, *detached, *past)

        x0 = self._denoise(pinned_first(sample, first), first, velocity, exit_step, gradient)
        if chunk + 1 < story.chunks:
            clean = x0.detach()
            cache.chunks[chunk] = passes.write(clean, self._sinusoid(0, False, clean), *rope, *detached, *past)
        return x0

    def _denoise(
        self, sample: Tensor, first: Tensor | None, velocity: Callable[..., Tensor], exit_step: int, gradient: bool
    ) -> Tensor:
        """The chunk as predicted at the exit step: [B, C, F, h, w]."""
        solver = UniPC(schedule_of(self.steps, self.preset.sampling.shift))
        with torch.no_grad():
            for step in solver.steps[:exit_step]:
                sample = pinned_first(solver.step(velocity(sample, step.timestep), sample), first)
        last = solver.steps[exit_step]
        with torch.set_grad_enabled(gradient):
            return pinned_first(sample - last.sigma * velocity(sample, last.timestep, gradient), first)

    def positions(self, cuts: Sequence[Sequence[bool]], chunk: int, device: torch.device) -> Tensor:
        """Temporal positions of a chunk's frames, fp64 [B, F], each shot begun so far offset as in a session."""
        shots = [sum(map(bool, story[1 : chunk + 1])) for story in cuts]
        found = [frame_positions(self.preset, chunk, shot) for shot in shots]
        return torch.tensor(found, dtype=torch.float64).to(device, non_blocking=True)

    def _sinusoid(self, timestep: int, pinned: bool, sample: Tensor) -> Tensor:
        frames = self.preset.chunk_latents
        times = [0.0 if pinned and frame == 0 else float(timestep) for frame in range(frames)]
        row = timestep_sinusoid(times, self.preset.dit.freq_dim)[None].to(sample.device, non_blocking=True)
        return row.expand(len(sample), -1, -1)


def pinned_first(sample: Tensor, first: Tensor | None) -> Tensor:
    """`sample` [B, C, F, h, w] with frame 0 replaced by `first` [B, C, h, w]; no gradient reaches that frame."""
    return sample if first is None else torch.cat((first[:, :, None], sample[:, :, 1:]), 2)
