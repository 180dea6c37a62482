"""Convolutions of a video stream as a library computes them, channels last: the plain PyTorch truth.

Exports to ONNX as it stands. The frame is padded by zeros so that it keeps its size; time is not padded.
Legend: T frames that come in, Y, X sizes of a frame, C channels, N channels that come out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def _conv(x: Tensor, weight: Tensor, bias: Tensor, side: int, residual: Tensor | None = None) -> Tensor:
    """x [T,Y,X,C], weight [N,C,t,side,side], bias [N] to [T-t+1,Y,X,N] in x's dtype: summed in fp32, rounded once."""
    first = x.to(torch.float32).permute(3, 0, 1, 2)[None]
    padding = (0, side // 2, side // 2)
    out = functional.conv3d(first, weight.to(torch.float32), bias.to(torch.float32), padding=padding)[0]
    out = out.permute(1, 2, 3, 0)
    return (out if residual is None else out + residual.to(torch.float32)).to(x.dtype).contiguous()


def conv_3x3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [T,Y,X,C], weight [N,C,3,3,3], bias [N] to [T-2,Y,X,N]."""
    return _conv(x, weight, bias, 3)


def conv_3x3x3_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """The same plus residual [T-2,Y,X,N], added before the one rounding."""
    return _conv(x, weight, bias, 3, residual)


def conv_3x1x1(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [T,Y,X,C], weight [N,C,3,1,1], bias [N] to [T-2,Y,X,N]."""
    return _conv(x, weight, bias, 1)


def conv_1x3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [T,Y,X,C], weight [N,C,1,3,3], bias [N] to [T,Y,X,N]."""
    return _conv(x, weight, bias, 3)


def conv_1x1x1(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [T,Y,X,C], weight [N,C,1,1,1], bias [N] to [T,Y,X,N]."""
    return _conv(x, weight, bias, 1)


def library_weight(weight: Tensor) -> Tensor:
    """[N,C,kt,kh,kw] as stored to [N,kt,kh,kw,C], contiguous."""
    return weight.permute(0, 2, 3, 4, 1).contiguous()
