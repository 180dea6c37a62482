"""Many stories generated at once in PyTorch, by the rules of a runtime session: slots, positions, noise, solver, CFG.

Legend: B stories (2 B with CFG: prompted ones, then unprompted ones), N chunks, F latent frames of a chunk, L tokens
of a chunk, S slots, W window, H heads, D head_dim, E text length, C, h, w latent sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from longtake.plugins.kv_cache_write.reference import quantize_kv
from longtake.plugins.sink_attention.reference import attention_fp8, dequantize_kv
from longtake.runtime.conditions import frame_positions, noise_for_chunk
from longtake.runtime.sampler import UniPC, unipc_steps
from longtake.training.experiment.sinks import slot_plans
from longtake.training.networks import Models
from longtake.training.rope import rope_tables, timestep_sinusoid


@dataclass(frozen=True)
class Script:
    """One story to generate. prompts: one a chunk, with the cut prefix where training has it. cuts: one flag a chunk."""

    prompts: tuple[str, ...]
    cuts: tuple[bool, ...]
    seed: int = 0


@dataclass(frozen=True)
class Sampling:
    """How stories are generated. cache: "bf16" (not quantized) or "nvfp4". sinks: see `sinks.slot_plans`.

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


def round_trip_kv(kv: Tensor) -> Tensor:
    """K and V [B, 2, L, H, D] as the NVFP4 cache gives them back, fp32: an amax for K and one for V of every story."""
    flat = kv.float().flatten(0, 1)
    values, scales, amax = quantize_kv(flat)
    return dequantize_kv(*(part.unflatten(0, kv.shape[:2]) for part in (values, scales, amax)))


class KVSlots:
    """The slots of all layers and stories. It holds what a reader of the cache's format would get."""

    def __init__(
        self, models: Models, batch: int, fmt: str, dtype: torch.dtype, device: torch.device, attention: str = "bf16"
    ) -> None:
        preset = models.preset
        shape = (batch, preset.window_chunks, 2, preset.chunk_tokens, preset.dit.heads, preset.dit.head_dim)
        self.fmt = fmt
        self.attention = attention_fp8 if attention == "fp8" else functional.scaled_dot_product_attention
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(preset.dit.layers)]
        self.rows = torch.arange(batch, device=device)

    def attend(self, table: Tensor, write: Tensor | None) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
        """Self-attention over the slots `table` [B, W] and the block itself, which goes to slots `write` [B], if any."""

        def run(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache = self.layers[layer]
            past = cache[self.rows[:, None], table]  # [B, W, 2, L, H, D]
            if write is not None:
                fresh = torch.stack((k, v), 1)
                kept = round_trip_kv(fresh) if self.fmt == "nvfp4" else fresh
                cache[self.rows, write] = kept.to(cache.dtype)
            keys = torch.cat((past[:, :, 0].flatten(1, 2).to(q.dtype), k.to(q.dtype)), 1)
            values = torch.cat((past[:, :, 1].flatten(1, 2).to(q.dtype), v.to(q.dtype)), 1)
            out = self.attention(q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
            return out.transpose(1, 2).to(q.dtype)

        return run


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
        self.half = device.type == "cuda" and sampling.compute == "bf16"
        dtype = torch.bfloat16 if self.half else torch.float32
        self.slots = KVSlots(models, self.copies * len(scripts), sampling.cache, dtype, device, sampling.attention)
        capacity = models.preset.window_chunks
        self.plans = [slot_plans(script.cuts, sampling.sinks, capacity) for script in scripts]
        self.shots = [[sum(script.cuts[1 : i + 1]) for i in range(len(script.cuts))] for script in scripts]
        steps = unipc_steps(sampling.steps, sampling.shift)
        self.sinusoids = {t: self.sinusoid(t) for t in {0, *(step.timestep for step in steps)}}

    def __iter__(self) -> Iterator[Tensor]:
        for chunk in range(len(self.scripts[0].prompts)):
            yield self.generate(chunk)

    @torch.no_grad()
    def generate(self, chunk: int) -> Tensor:
        """Denoise chunk `chunk` of every story, then write its K and V."""
        context, rope = self.context(chunk), self.rope(chunk)
        table = self.repeat(torch.tensor([plans[chunk][0] for plans in self.plans], dtype=torch.long))
        write = self.repeat(torch.tensor([plans[chunk][1] for plans in self.plans]))
        sample, solver = self.noise(chunk), UniPC(self.sampling.steps, self.sampling.shift)
        if chunk < len(self.given):
            sample = self.given[chunk].to(sample).transpose(1, 2)
        for step in solver.schedule if chunk >= len(self.given) else ():
            velocity = self.velocity(sample, step.timestep, rope, context, self.slots.attend(table, None))
            sample = solver.step(velocity, sample)
        kept = sample if self.committed is None else self.committed[chunk].to(sample).transpose(1, 2)
        self.velocity(kept, 0, rope, context, self.slots.attend(table, write))
        return sample.transpose(1, 2).contiguous()

    def velocity(
        self,
        sample: Tensor,
        timestep: int,
        rope: tuple[Tensor, Tensor],
        context: list[Tensor],
        attend: Callable[..., Tensor],
    ) -> Tensor:
        """One pass over samples [B, C, F, h, w], guided if so told."""
        twice = torch.cat([sample] * self.copies)
        sinusoid = self.sinusoids[timestep].expand(len(twice), -1, -1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            out = self.models.dit(twice, sinusoid, rope, context, attend).float()
        if self.copies == 1:
            return out
        wanted, base = out.chunk(2)
        return torch.lerp(base, wanted, self.sampling.guidance)

    def context(self, chunk: int) -> list[Tensor]:
        """Each layer's cross-attention K and V, [B, 1, 2, E, H, D]."""
        prompts = [script.prompts[chunk] for script in self.scripts] + [""] * (len(self.scripts) * (self.copies - 1))
        known = sorted(set(prompts))
        text = self.models.text
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
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

    def sinusoid(self, timestep: int) -> Tensor:
        preset = self.models.preset
        times = [float(timestep)] * preset.chunk_latents
        return timestep_sinusoid(times, preset.dit.freq_dim).to(self.device)[None]

    def repeat(self, rows: Tensor) -> Tensor:
        """One row a story to one a row of the batch."""
        return torch.cat([rows] * self.copies).to(self.device)


@torch.no_grad()
def decoded(
    vae: torch.nn.Module, chunks: Iterator[Tensor] | Rollout, batch: int = 32
) -> Iterator[tuple[Tensor, Tensor]]:
    """(latents, frames) of each chunk; frames fp32 [B, 3, T, H, W] in [-1, 1], decoded as a stream, `batch` stories at a time."""
    histories: dict[int, list[Tensor]] = {}
    for latents in chunks:
        parts = []
        for number, part in enumerate(latents.split(batch)):
            with torch.autocast(part.device.type, torch.bfloat16, enabled=part.is_cuda):
                frames, histories[number] = vae.decode_chunk(part, histories.get(number))  # type: ignore[operator]
            parts.append(frames.float())
        yield latents, torch.cat(parts)
