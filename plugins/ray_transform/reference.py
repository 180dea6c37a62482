"""What makes the camera branch's queries, keys and values of its projections, and its way back: the plain PyTorch truth.

The first half of a head is groups of four that go through each token's 4x4 ray transform; the second half is rotated.

Legend: T frames of a chunk, P tokens of a frame, H heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from longtake.plugins.gdn_scan.reference import normalised
from longtake.plugins.pointwise import apply_rope

QK_EPS = 1e-5
SMALLEST, CLIP_EPS = 1e-12, 1e-6


def ray_prepare_gdn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rays: Tensor,
    inverse: Tensor,
    rope_cos: Tensor,
    rope_sin: Tensor,
    clip: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For gated delta networks: q and k are normalised, cut at zero, and keys scaled by 1/sqrt(D P) before they turn.

    q, k, v [..., T,P,H,D] as projected; weights [H*D]; rays and their inverses fp32 [..., T,P,4,4]; rope fp32 [T,P,D/4].
    Returns q, k and v in q's dtype, and by how much each key grew, squared, fp32 [..., T,P,H].
    """
    scale = (k.shape[-1] * k.shape[-3]) ** -0.5
    features_q = functional.relu(_normed(q, q_weight))
    features_k = functional.relu(_normed(k, k_weight)) * scale
    out_q, out_k, out_v = _turned(features_q, features_k, v.float(), rays, inverse, rope_cos, rope_sin, clip)
    growth = out_k.square().sum(-1).clamp(min=SMALLEST) / features_k.square().sum(-1).clamp(min=SMALLEST)
    return out_q.to(q.dtype), out_k.to(q.dtype), out_v.to(q.dtype), growth


def ray_prepare_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rays: Tensor,
    inverse: Tensor,
    rope_cos: Tensor,
    rope_sin: Tensor,
    clip: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """For softmax attention: q and k are normalised, nothing else. Arguments as in ray_prepare_gdn."""
    turned = _turned(_normed(q, q_weight), _normed(k, k_weight), v.float(), rays, inverse, rope_cos, rope_sin, clip)
    return turned[0].to(q.dtype), turned[1].to(q.dtype), turned[2].to(q.dtype)


def ray_restore(x: Tensor, rays: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
    """What attention gives, x [..., T,P,H,D], through the ray transforms and turned back; in x's dtype."""
    return ray_turn(x.float(), rays, rope_cos, -rope_sin).to(x.dtype)


def ray_turn(x: Tensor, matrices: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
    """x fp32 [..., T,P,H,D]: groups of four of the first half times `matrices` [..., T,P,4,4], the second half rotated."""
    half = x.shape[-1] // 2
    groups = x[..., :half].reshape(*x.shape[:-1], half // 4, 4) @ matrices.mT.unsqueeze(-3)
    return torch.cat((groups.flatten(-2), apply_rope(x[..., half:], rope_cos, rope_sin)), -1)


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    return normalised(x.flatten(-2), weight, QK_EPS).unflatten(-1, x.shape[-2:])


def _turned(
    q: Tensor, k: Tensor, v: Tensor, rays: Tensor, inverse: Tensor, cos: Tensor, sin: Tensor, clip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    turned = [ray_turn(x, m, cos, sin) for x, m in ((q, rays.mT), (k, inverse), (v, inverse))]
    if clip:
        turned = [_no_longer(before, after) for before, after in zip((q, k, v), turned)]
    return turned[0], turned[1], turned[2]


def _no_longer(before: Tensor, after: Tensor) -> Tensor:
    """`after`, no longer than `before`."""
    was, now = ((x.square().mean(-1, keepdim=True) + CLIP_EPS).sqrt() for x in (before, after))
    return after * (was / now.clamp(min=CLIP_EPS)).clamp(max=1.0)
