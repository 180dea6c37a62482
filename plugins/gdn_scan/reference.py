"""Gated delta networks over frames, inside one chunk and from the chunk before: the plain PyTorch truth.

A frame's tokens all predict from the same decayed state, and their corrections are summed: it is a step of gradient
descent a frame. Inside a chunk a second scan runs backwards, from zero, and is never carried. All of it is fp32.

Legend: T frames of a chunk, P tokens of a frame, H heads, D head_dim; rows of a state are keys, columns values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from longtake.plugins.pointwise import apply_rope

MOST_FRAMES = 4  # of a chunk whose length is not known when the op is exported
EPS = 1e-8  # of the denominators


def gdn_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gate: Tensor,
    rope_cos: Tensor,
    rope_sin: Tensor,
    state: Tensor,
    norm: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [..., T,P,H,D], q and k not negative and not yet rotated; beta fp32 [..., T,P,H]; gate fp32 [..., T,H];
    rope fp32 [T,P,D/2]; state fp32 [..., H,D,D] and norm fp32 [..., H,D] after the frame before.

    Returns the values [..., T,P,H,D] in q's dtype, and state and norm after the last frame.
    """
    q, k, dtype = q.float(), k.float(), q.dtype
    turned_q, turned_k = apply_rope(q, rope_cos, rope_sin), apply_rope(k, rope_cos, rope_sin)
    seen, state = _scan(turned_k, v.float(), beta, gate, state)
    ones = torch.ones_like(beta).unsqueeze(-1)
    sums, norm = _scan(k, ones, beta, gate, norm.unsqueeze(-1))
    top, below = _heads_first(turned_q) @ seen, _heads_first(q) @ sums
    return (top / (below + EPS)).transpose(-3, -2).contiguous().to(dtype), state, norm.squeeze(-1)


def gdn_scan_camera(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The camera branch's: as they come out of ray_prepare, and without a denominator."""
    seen, state = _scan(k.float(), v.float(), beta, gate, state)
    out = _heads_first(q.float()) @ seen
    return out.transpose(-3, -2).contiguous().to(q.dtype), state


def _heads_first(x: Tensor) -> Tensor:
    """[..., T,P,H,D] to [..., T,H,P,D]."""
    return x.transpose(-3, -2)


def _scan(k: Tensor, v: Tensor, beta: Tensor, gate: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """k [..., T,P,H,D], v [..., T,P,H,E], start [..., H,D,E]: what each frame reads, [..., T,H,D,E], and the last state."""
    keys, weighted = _heads_first(k), _heads_first(k * beta.unsqueeze(-1)).mT
    keep = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) - weighted @ keys
    add, decay = weighted @ _heads_first(v), gate[..., None, None]
    frames = k.shape[-4]
    known = isinstance(frames, int)
    if not known:  # while it is exported: frames beyond the last leave everything as it is
        decay, keep, add = _padded(decay, 1.0), _padded(keep, 0.0, torch.eye(k.shape[-1])), _padded(add, 0.0)
    count = frames if known else MOST_FRAMES
    before, after = [], []
    state = start
    for frame in range(count):
        state = decay[..., frame, :, :, :] * (keep[..., frame, :, :, :] @ state) + add[..., frame, :, :, :]
        before.append(state)
    later = torch.zeros_like(add[..., 0, :, :, :])
    for frame in reversed(range(count)):
        after.append(later)
        later = decay[..., frame, :, :, :] * (keep[..., frame, :, :, :] @ later) + add[..., frame, :, :, :]
    seen = torch.stack(before, -4) + torch.stack(after[::-1], -4)
    return (seen if known else seen[:frames]), state


def _padded(x: Tensor, value: float, extra: Tensor | None = None) -> Tensor:
    """[T, ...] to [MOST_FRAMES, ...], filled up with `value`, or with `extra`."""
    filled = (
        x.new_full((MOST_FRAMES, *x.shape[1:]), value) if extra is None else extra.expand(MOST_FRAMES, *x.shape[1:])
    )
    return torch.cat((x, filled))[:MOST_FRAMES]


def feature_map(x: Tensor, weight: Tensor, eps: float, scale: float = 1.0) -> Tensor:
    """relu(RMSNorm(x)) * scale in fp32, in x's dtype; normalised over the last dimension, which holds all heads."""
    return (functional.relu(normalised(x, weight, eps)) * scale).to(x.dtype)


def normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, fp32 throughout."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
