"""Plausible random values for any weight by its name, from a seed: what full-size benchmarks run on."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

NORM_NAMES = (
    *("gamma", "layer_norm.weight", "norm_cam.weight", "norm_q.weight", "norm_k.weight"),
    *("norm.weight", "norm1.weight", "norm2.weight", "norm3.weight"),
)
FIXED = {"A_log": 0.0, "dt_bias": -3.0, "latent_std": 1.0}  # gates would forget everything at once otherwise
INLINE_BYTES = 1024  # formats.onnx_file.INLINE_BYTES, of bf16 values


def seed_of(name: str) -> int:
    """63 bits of the name's digest."""
    return int.from_bytes(hashlib.sha256(f"longtake bench 1:{name}".encode()).digest()[:8], "little") >> 1


def random_weight(
    name: str,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    inline: int = INLINE_BYTES,
) -> Tensor:
    """The weight called `name` (a state-dict key), rounded to bf16, in `dtype`. The same on every call on one device.

    inline: what takes no more bytes is ones, as it is in a skeleton's graph; 0 for checkpoints, since a small model of
    nothing but ones has rows that are constant, which a LayerNorm makes noise of.
    """
    if (last := name.rpartition(".")[2]) in FIXED:
        return torch.full(shape, FIXED[last], device=device, dtype=dtype)
    if 2 * math.prod(shape) <= inline or name.endswith(NORM_NAMES):
        return torch.ones(shape, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed_of(name))
    values = torch.empty(shape, device=device, dtype=torch.bfloat16)
    return values.uniform_(-bound(name, shape), bound(name, shape), generator=generator).to(dtype)


def bound(name: str, shape: tuple[int, ...]) -> float:
    """Largest magnitude of a weight: sqrt(3 / fan_in), which gives variance 1 / fan_in."""
    if name.endswith(".bias") or len(shape) < 2:
        return 0.02
    fan_in = shape[-1] if name.endswith("modulation") else math.prod(shape[1:])
    return math.sqrt(3.0 / fan_in)


@torch.no_grad()
def fill(module: nn.Module, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Give a module made on the meta device random weights on `device`; keys are the names."""
    module.to_empty(device=device)
    for name, tensor in module.state_dict(keep_vars=True).items():
        tensor.data = random_weight(name, tuple(tensor.shape), device, dtype)
    return module.eval().requires_grad_(False)
