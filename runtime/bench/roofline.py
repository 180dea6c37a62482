"""The least time a chunk can take: its floating-point work and bytes against the best rates measured on the machine.

Work is counted by formula (multiply and add are two operations) and checked in the tests against torch's
FlopCounterMode. Legend: T tokens of a chunk, W window in chunks, E text length, F latent frames of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from longtake.dtypes import stored_bytes
from longtake.formats.recipe import Recipe
from longtake.machine.memory_rate import memory_rate
from longtake.training.models.presets import Preset, VAEConfig

# Best library rates measured on one H100 SXM, FLOP/s (docs/benchmark.md says how): GEMM 7040x3072x3072 through
# cuBLASLt in bf16 and, K = 14336, in FP8; attention 7040 x 28160 through cuDNN (whose FP8 sums are wrong, but as fast as that); 3x3x3 convolution, channels last.
# No library convolves in 8 bits as fast as our kernel: that one over a whole latent, on an H200 (measurements/conv8_kernels_h200.json).
HOPPER_RATES = {
    "gemm": {"bf16": 772e12, "fp8": 1398e12},
    "attention": {"bf16": 667e12, "fp8": 1056e12},
    "convolution": {"bf16": 764e12, "fp8": 1431e12, "int8": 1628e12, "calibrated": 1628e12},
}
GEMM_IN = {"bf16": "bf16", "w4a16": "bf16", "fp8": "fp8", "nvfp4": "fp8"}


@dataclass(frozen=True)
class Work:
    """Floating-point operations by kind, and bytes that must cross the device's memory at least once."""

    gemm: float = 0.0
    attention: float = 0.0
    convolution: float = 0.0
    bytes: float = 0.0

    @property
    def flops(self) -> float:
        return self.gemm + self.attention + self.convolution

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(value * times for value in self.values()))

    def values(self) -> tuple[float, float, float, float]:
        return self.gemm, self.attention, self.convolution, self.bytes


def linear_elements(preset: Preset) -> int:
    """Weight elements of the linears that a pass runs and recipes quantize (cross-attention's k and v run once a prompt)."""
    dit = preset.dit
    return dit.layers * (6 * dit.dim**2 + 2 * dit.dim * dit.ffn_dim)


def dit_pass(preset: Preset, precision: str = "bf16", cache: str = "bf16") -> Work:
    """One DiT pass over a chunk with a full window in view, itself included."""
    dit, tokens, frames, blocks = preset.dit, preset.chunk_tokens, preset.chunk_latents, preset.window_chunks
    patch = dit.channels * math.prod(dit.patch)
    edges = 2 * tokens * dit.dim * 2 * patch
    time = 2 * frames * dit.dim * (dit.freq_dim + 7 * dit.dim)
    gemm = 2 * tokens * linear_elements(preset) + edges + time
    attention = 4 * tokens * dit.dim * dit.layers * (blocks * tokens + dit.text_len)
    read = linear_elements(preset) * stored_bytes(precision) + 2 * dit.dim * (2 * patch + 7 * dit.dim)
    history = 2 * dit.layers * dit.dim * (blocks - 1) * tokens * stored_bytes(cache)
    return Work(gemm, attention, 0.0, read + history + 4 * dit.layers * dit.text_len * dit.dim)


def vae_latent(preset: Preset, folded: bool = False) -> Work:
    """Decoding one steady latent: four pixel frames. folded: upsampling and the convolution behind it are in one."""
    config, (height, width) = preset.vae, preset.latent_hw
    dims = [config.decoder_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
    ups, frames = tuple(reversed(config.temporal_down)), 1
    weights = work = scores = 0.0

    def convolve(inputs: int, outputs: int, kernel: int, sets: int = 1) -> None:
        nonlocal weights, work
        weights += inputs * outputs * kernel * sets
        work += 2.0 * inputs * outputs * kernel * frames * height * width

    if config.quant_convs:
        convolve(config.z_channels, config.z_channels, 1)
    convolve(config.z_channels, dims[0], 27)
    for _ in range(4):  # two residual blocks around the frame attention
        convolve(dims[0], dims[0], 27)
    convolve(dims[0], 4 * dims[0], 1)
    scores = 4.0 * (height * width) ** 2 * dims[0] * frames
    for level, (inputs, outputs) in enumerate(zip(dims[:-1], dims[1:])):
        for block in range(config.res_blocks + 1):
            convolve(inputs if block == 0 else outputs, outputs, 27)
            convolve(outputs, outputs, 27)
        if inputs != outputs:
            convolve(inputs, outputs, 1)
        if level < len(ups):
            if ups[level]:
                convolve(outputs, 2 * outputs, 3)
                frames *= 2
            height, width = 2 * height, 2 * width
            convolve(outputs, outputs, 4 if folded else 9, sets=4 if folded else 1)
    convolve(dims[-1], 12, 27)
    return Work(0.0, scores, work, 2.0 * weights)


def chunk_work(recipe: Recipe, steps: int) -> dict[str, Work]:
    """Work of a steady chunk: "dit" (all passes and the clean one) and "vae"."""
    passes = dit_pass(recipe.model, recipe.precision, recipe.cache) * (steps + 1)
    return {"dit": passes, "vae": vae_latent(recipe.model, recipe.vae_conv != "bf16") * recipe.model.chunk_latents}


def floor_seconds(work: Work, recipe: Recipe, gpu: str | None) -> float | None:
    """Least time of `work` on `gpu` at the recipe's arithmetic; None for a GPU whose rates were not measured."""
    bandwidth = memory_rate(gpu)
    if bandwidth is None:
        return None
    compute = (
        work.gemm / HOPPER_RATES["gemm"][GEMM_IN[recipe.precision]]
        + work.attention / HOPPER_RATES["attention"][recipe.attention]
        + work.convolution / HOPPER_RATES["convolution"][recipe.vae_conv]
    )
    return max(compute, work.bytes / bandwidth)


def roofline(recipe: Recipe, steps: int, gpu: str | None, stage_ms: dict[str, float]) -> dict[str, Any]:
    """For "dit" and "vae" of a steady chunk: tflop, gb, floor_ms, measured_ms, share of the floor reached, tflop_s.

    {} for models whose work no formula here counts.
    """
    rows: dict[str, Any] = {}
    if not isinstance(recipe.model.vae, VAEConfig):
        return rows
    for name, work in chunk_work(recipe, steps).items():
        floor, spent = floor_seconds(work, recipe, gpu), stage_ms.get(f"{name}_chunk")
        rows[name] = {
            "tflop": round(work.flops / 1e12, 4),
            "gemm_tflop": round(work.gemm / 1e12, 4),
            "attention_tflop": round(work.attention / 1e12, 4),
            "convolution_tflop": round(work.convolution / 1e12, 4),
            "gb": round(work.bytes / 1e9, 4),
            "floor_ms": None if floor is None else round(1e3 * floor, 2),
            "measured_ms": spent,
            "share": round(1e3 * floor / spent, 4) if floor and spent else None,
            "tflop_s": round(work.flops / 1e9 / spent, 2) if spent else None,
        }
    return rows
