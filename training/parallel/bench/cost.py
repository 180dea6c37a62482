"""What an iteration of `training.parallel.bench` should take, and which length should fit: to plan a run, not results.

Legend: N chunks of T tokens, teacher-forced as 2N blocks; P ranks.
"""

from __future__ import annotations

import math

from longtake.training.models.presets import Preset

# FLOP/s assumed of one H100 for each kind of work, launches and memory-bound operations included
LINEAR, ATTENTION, CONVOLUTION = 450e12, 400e12, 210e12
KEPT_FREE = 3e9  # bytes of a GPU that are not torch's: CUDA context, NCCL's and cuDNN's own
PASSES_LINEAR, PASSES_ATTENTION = 4.0, 4.5  # forward, again for the backward pass, and that pass


def iteration_seconds(preset: Preset, chunks: int, sharing: int, latents: int) -> float:
    """Expected seconds of an iteration on H100s. sharing: ranks that share the sample; latents: that a rank encodes."""
    dit, tokens = preset.dit, preset.chunk_tokens
    elements = dit.layers * (6 * dit.dim**2 + 2 * dit.dim * dit.ffn_dim)
    linear = PASSES_LINEAR * 2 * (2 * chunks * tokens) * elements
    pairs = chunks * (chunks + 1) - chunks  # blocks times blocks that they see, without the last clean one's
    attention = PASSES_ATTENTION * 4 * pairs * tokens**2 * dit.dim * dit.layers
    return (linear / LINEAR + attention / ATTENTION) / sharing + latents * encode_flops(preset) / CONVOLUTION


def encode_flops(preset: Preset) -> float:
    """Operations of encoding one latent: the residual blocks' convolutions."""
    vae = preset.vae
    dims = [vae.encoder_dim * m for m in (1, *vae.dim_mult)]
    frames, pixels, work = vae.stride[0], preset.height * preset.width // 4, 0.0
    for level, (inputs, outputs) in enumerate(zip(dims[:-1], dims[1:])):
        taps = inputs * outputs + (2 * vae.res_blocks - 1) * outputs**2
        work += 54.0 * frames * pixels * taps
        if level < len(vae.temporal_down):
            pixels //= 4
            frames //= 2 if vae.temporal_down[level] else 1
    return work


def longest_fitting(points: list[tuple[float, float]], memory: float) -> float | None:
    """Seconds of clip at which the peak would reach `memory` bytes, of (seconds, peak bytes): it grows linearly.

    None where fewer than two lengths are known.
    """
    points = sorted(set(points))
    if len(points) < 2 or points[0][0] == points[-1][0]:
        return None
    (first, low), (last, high) = points[0], points[-1]
    if high <= low:
        return math.inf
    return last + (memory - KEPT_FREE - high) * (last - first) / (high - low)
