"""Put a causal convolution's history before its input, and keep the new history: the plain PyTorch truth.

Functional: new tensors come out. Exports to ONNX as it stands. Channels last, because the norm is over channels.
Legend: T frames of a step, F frames of history, Y, X sizes of a frame, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from longtake.plugins.codes import encode

CHANNEL_NORM_EPS = 1e-24  # on the mean square: only keeps zeros zero


def norm_silu_extend(x: Tensor, gamma: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    """x [T,Y,X,C]; gamma [C]; cache [F,Y,X,C], activated frames. Returns y [T+F,Y,X,C] and its last F frames.

    y = [cache, silu(x / rms(x) * gamma)], computed in fp32 and rounded once.
    """
    return stream_extend(_norm_silu(x, gamma).to(x.dtype), cache)


def _norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """In fp32, not rounded."""
    full = x.to(torch.float32)
    scale = torch.rsqrt((full * full).mean(-1, keepdim=True) + CHANNEL_NORM_EPS)
    return functional.silu(full * scale * gamma.to(torch.float32))


def coded_norm_silu_extend(
    x: Tensor, gamma: Tensor, factor: Tensor, cache: Tensor, *, codes: str
) -> tuple[Tensor, Tensor]:
    """The same in 8-bit codes of the numbers times factor fp32 [1]: cache int8 [F,Y,X,C], y int8 [T+F,Y,X,C]."""
    return stream_extend(encode(_norm_silu(x, gamma) * factor, codes), cache)


def coded_stream_extend(x: Tensor, factor: Tensor, cache: Tensor, *, codes: str) -> tuple[Tensor, Tensor]:
    """x [T,Y,X,C] in codes likewise, behind the history."""
    return stream_extend(encode(x.to(torch.float32) * factor, codes), cache)


def stream_extend(x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    """x [T,Y,X,C]; cache [F,Y,X,C]. Returns y = [cache, x] [T+F,Y,X,C] and its last F frames."""
    y = torch.cat((cache.to(x.dtype), x))
    return y, y[x.shape[0] :].clone()
