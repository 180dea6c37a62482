"""The DiT's memory-bound arithmetic, all in fp32 between compute-dtype tensors.

Legend: F latent frames, T tokens = F * frame tokens, H heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

QK_NORM_EPS = 1e-6


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalised in fp32, cast back, then multiplied by the weight: the order the reference rounds in."""
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normal.to(x.dtype) * weight.to(x.dtype)


def layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """LayerNorm over the last dimension in fp32; the result stays fp32."""
    wide = [None if p is None else p.float() for p in (weight, bias)]
    return functional.layer_norm(x.float(), x.shape[-1:], wide[0], wide[1], eps)


def modulate(x: Tensor, eps: float, scale: Tensor, shift: Tensor) -> Tensor:
    """LN(x) * (1 + scale) + shift in fp32, returned in x's dtype; scale, shift [..., F, dim], x [..., T, dim]."""
    frames = layer_norm(x, eps).unflatten(-2, (scale.shape[-2], -1))
    out = frames * (1 + scale.float().unsqueeze(-2)) + shift.float().unsqueeze(-2)
    return out.flatten(-3, -2).to(x.dtype)


def gated_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y in fp32, returned in x's dtype; gate [..., F, dim], x and y [..., T, dim]."""
    frames = y.float().unflatten(-2, (gate.shape[-2], -1)) * gate.float().unsqueeze(-2)
    return (x.float() + frames.flatten(-3, -2)).to(x.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2j, 2j+1) of `x` [..., T, H, D] by angle j of its token, in fp32; returns x's dtype.

    cos, sin: fp32 [..., T, D/2].
    """
    pairs = x.float().reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.reshape(x.shape).to(x.dtype)
