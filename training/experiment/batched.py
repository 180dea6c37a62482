"""Many stories generated at once in PyTorch, by the rules of a runtime session: slots, positions, noise, solver, CFG.

Legend: B stories (2 B with CFG: prompted ones, then unprompted ones), N chunks, F latent frames of a chunk, L tokens
of a chunk, S slots, W window, H heads, D head_dim, E text length, C, h, w latent sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from longtake.training.models.load import Models
from longtake.training.models.sampler import UniPC, noise_for_chunk, schedule_of
from longtake.training.models.wan.rope import frame_positions, rope_tables, timestep_sinusoid
from longtake.training.models.wan.slots import Sinks, plans_of
from longtake.training.objective.chunk_pass import ChunkPass, GraphedChunkPass

# The slot table with either sink left out; with both it is the runtime's.
SINKS = {
    "both": Sinks(),
    "global": Sinks(shot=False),
    "shot": Sinks(globally=False),
    "none": Sinks(globally=False, shot=False),
}


@dataclass(frozen=True)
class Script:
    """One story to generate. prompts: one a chunk, with the cut prefix where training has it. cuts: one flag a chunk."""

    prompts: tuple[str, ...]
    cuts: tuple[bool, ...]
    seed: int = 0


@dataclass(frozen=True)
class Sampling:
    """How stories are generated. cache: "bf16" (not quantized) or "nvfp4". sinks: see `SINKS`.

    attention: "bf16", or "fp8" as our Hopper kernel computes it. compute: on a GPU, what passes run in, "bf16" (autocast,
    as in training) or "fp32".
    """

    steps: int = 16
    guidance: float = 1.0
    shift: float = 5.0
    cache: str = "nvfp4"
    sinks: str = "both"
    attention: str = "bf16"
    compute: str = "bf16"


class KVSlots:
    """The slots of all layers and stories. It holds what a reader of the cache's format would get."""

    def __init__(self, models: Models, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        preset = models.preset
        shape = (batch, preset.window_chunks, 2, preset.chunk_tokens, preset.dit.heads, preset.dit.head_dim)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(preset.dit.layers)]
        self.rows = torch.arange(batch, device=device)

    def read(self, table: Tensor) -> list[Tensor]:
        """Each layer's slots `table` [B, W], one after the other: [B, 2, L, H, D] each."""
        return [layer[self.rows, column] for layer in self.layers for column in table.unbind(1)]

    def write(self, slots: Tensor, kept: Sequence[Tensor]) -> None:
        """Put each layer's K and V [B, 2, L, H, D] into slots `slots` [B]."""
        for layer, fresh in zip(self.layers, kept, strict=True):
            layer[self.rows, slots] = fresh


class Rollout:
    """Iterates over the chunks of a batch of scripts of one length: latents fp32 [B, F, C, h, w], normalized."""

    def __init__(
        self,
        models: Models,
        scripts: Sequence[Script],
        sampling: Sampling,
        device: torch.device,
        given: Tensor | None = None,
        committed: Tensor | None = None,
    ) -> None:
        """`models` must be on `device`.

        given: the first chunks' latents fp32 [B, k F, C, h, w], which are then not generated, only written to the cache.
        committed: all chunks' latents [B, N F, C, h, w], which are written to the cache in place of what is generated.
        """
        self.given = () if given is None else given.split(models.preset.chunk_latents, 1)
        self.models, self.scripts, self.sampling, self.device = models, scripts, sampling, device
        self.copies = 1 if sampling.guidance == 1.0 else 2
        self.committed = None if committed is None else committed.split(models.preset.chunk_latents, 1)
        half = device.type == "cuda" and sampling.compute == "bf16"
        dtype = torch.bfloat16 if half else torch.float32
        # No cache of casts, for capture; no method of this object, which its graphs would then keep alive.
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=half, cache_enabled=False)
        self.slots = KVSlots(models, self.copies * len(scripts), dtype, device)
        if device.type == "cuda":
            self.passes: ChunkPass = GraphedChunkPass(
                models.dit, sampling.cache, dtype, self.autocast, sampling.attention
            )
        else:
            self.passes = ChunkPass(models.dit, sampling.cache, dtype, sampling.attention)
        capacity = models.preset.window_chunks
        self.plans = [plans_of(script.cuts, capacity, SINKS[sampling.sinks]) for script in scripts]
        self.shots = [[sum(script.cuts[1 : i + 1]) for i in range(len(script.cuts))] for script in scripts]
        timesteps = schedule_of(sampling.steps, sampling.shift).timesteps
        self.sinusoids = {t: self.sinusoid(t) for t in {0, *timesteps}}

    def __iter__(self) -> Iterator[Tensor]:
        for chunk in range(len(self.scripts[0].prompts)):
            yield self.generate(chunk)

    @torch.no_grad()
    def generate(self, chunk: int) -> Tensor:
        """Denoise chunk `chunk` of every story, then write its K and V."""
        write = self.repeat(torch.tensor([plans[chunk].write_slot for plans in self.plans]))
        fixed = self.fixed(chunk)
        sample, solver = self.noise(chunk), UniPC(schedule_of(self.sampling.steps, self.sampling.shift))
        if chunk < len(self.given):
            sample = self.given[chunk].to(sample).transpose(1, 2)
        for step in solver.steps if chunk >= len(self.given) else ():
            sample = solver.step(self.velocity(sample, step.timestep, fixed), sample)
        kept = sample if self.committed is None else self.committed[chunk].to(sample).transpose(1, 2)
        self.slots.write(write, self.passes.write(*self.inputs(kept, 0), *fixed))
        return sample.transpose(1, 2).contiguous()

    def fixed(self, chunk: int) -> tuple[Tensor, ...]:
        """What all passes of a chunk have in common: positions, prompts, and K and V of the blocks it sees."""
        table = self.repeat(torch.tensor([plans[chunk].table[:-1] for plans in self.plans], dtype=torch.long))
        return (*self.rope(chunk), *self.context(chunk), *self.slots.read(table))

    def velocity(self, sample: Tensor, timestep: float, fixed: tuple[Tensor, ...]) -> Tensor:
        """One pass over samples [B, C, F, h, w], guided if so told. fixed: the other tensors of a `ChunkPass`."""
        out = self.passes.look(*self.inputs(sample, timestep), *fixed)
        if self.copies == 1:
            return out
        wanted, base = out.chunk(2)
        return torch.lerp(base, wanted, self.sampling.guidance)

    def inputs(self, sample: Tensor, timestep: float) -> tuple[Tensor, Tensor]:
        """Samples [B, C, F, h, w] and sinusoids [B, F, freq_dim] of a pass, one row a copy."""
        twice = torch.cat([sample] * self.copies)
        return twice, self.sinusoids[timestep].expand(len(twice), -1, -1)

    def context(self, chunk: int) -> list[Tensor]:
        """Each layer's cross-attention K and V, [B, 1, 2, E, H, D]."""
        prompts = [script.prompts[chunk] for script in self.scripts] + [""] * (len(self.scripts) * (self.copies - 1))
        known = sorted(set(prompts))
        text = self.models.text
        with self.autocast():
            embeddings = text(text.tokenize(known).to(self.device))
            layers = self.models.dit.context(embeddings[:, None])
        rows = torch.tensor([known.index(prompt) for prompt in prompts], device=self.device)
        return [layer[rows] for layer in layers]

    def rope(self, chunk: int) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 [B, L, D/2]."""
        preset = self.models.preset
        positions = torch.tensor([frame_positions(preset, chunk, shots[chunk]) for shots in self.shots])
        cos, sin = rope_tables(preset.dit, positions, preset.grid_hw)
        return self.repeat(cos), self.repeat(sin)

    def noise(self, chunk: int) -> Tensor:
        """fp32 [B, C, F, h, w]; a story's noise is what a session of its seed would draw."""
        drawn = [noise_for_chunk(self.models.preset, script.seed, chunk) for script in self.scripts]
        return torch.cat(drawn).transpose(1, 2).contiguous().to(self.device)

    def sinusoid(self, timestep: float) -> Tensor:
        preset = self.models.preset
        times = [float(timestep)] * preset.chunk_latents
        return timestep_sinusoid(times, preset.dit.freq_dim).to(self.device)[None]

    def repeat(self, rows: Tensor) -> Tensor:
        """One row a story to one a row of the batch."""
        return torch.cat([rows] * self.copies).to(self.device)


def decode(vae: torch.nn.Module, latents: Tensor, history: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
    """Frames fp32 [B, 3, T, H, W] in [-1, 1] of a chunk's latents [B, F, C, h, w] after `history`, and the history after it."""
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=latents.is_cuda):
        frames, history = vae.decode_chunk(latents, history)  # type: ignore[operator]
    return frames.float(), history


@torch.no_grad()
def decoded(
    vae: torch.nn.Module, chunks: Iterator[Tensor] | Rollout, batch: int = 32
) -> Iterator[tuple[Tensor, Tensor]]:
    """(latents, frames) of each chunk; frames fp32 [B, 3, T, H, W] in [-1, 1], decoded as a stream, `batch` stories at a time."""
    histories: dict[int, list[Tensor]] = {}
    for latents in chunks:
        parts = []
        for number, part in enumerate(latents.split(batch)):
            frames, histories[number] = decode(vae, part, histories.get(number))
            parts.append(frames)
        yield latents, torch.cat(parts)
