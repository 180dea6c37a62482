"""Convolutions of a video stream in 8-bit codes, channels last: the plain PyTorch truth.

Exports to ONNX as it stands. The frame is padded by zeros, which are code 0, so that it keeps its size; time is not padded.
Legend: T frames that come in, Y, X sizes of a frame, C channels, N channels that come out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from longtake.plugins.codes import decode


def conv8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None = None, *, codes: str
) -> Tensor:
    """x int8 [T,Y,X,C], weight int8 [N,C,t,side,side], scale fp32 [N], bias [N] and residual in bf16 or fp32, to
    [T-t+1,Y,X,N] in bias's dtype: products of codes summed in fp32, times `scale`, plus bias and residual, rounded once."""
    side = weight.shape[-1]
    first = decode(x, codes).permute(3, 0, 1, 2)[None]
    product = functional.conv3d(first, decode(weight, codes), padding=(0, side // 2, side // 2))[0].permute(1, 2, 3, 0)
    out = product * scale + bias.to(torch.float32)
    return (out if residual is None else out + residual.to(torch.float32)).to(bias.dtype).contiguous()
