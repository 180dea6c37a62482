"""Convolutions of a video stream in 8-bit codes, channels last: the plain PyTorch truth.

Exports to ONNX as it stands. The frame is padded by zeros, which are code 0, so that it keeps its size; time is not padded.
Folded: every position twice in both directions and then a 1x3x3 convolution are, for each of the four places (py, px) that a
position becomes, a convolution of 2x2 positions of the small frame, whose weights are sums of the nine. Four sets of weights
and scales, [4N, ...], stand one after the other, that of (0, 1) second; the one of py reads rows y - 1 + py and y + py.
Legend: T frames that come in, Y, X sizes of a frame, C channels, N channels that come out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from longtake.plugins.codes import coded_weight, decode

FOLDS, FOLDED = (1, 3, 3), (1, 2, 2)  # kernels behind an upsampling; folded: 4/9 of the products, 16/9 of the weights
SUMS = [[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]  # of rows, by place and row of two


def folded(weight: Tensor) -> Tensor:
    """A weight [N,C,1,3,3], behind an upsampling, to fp32 [4N,C,1,2,2] in front of it; any other as it is."""
    if tuple(weight.shape[2:]) != FOLDS:
        return weight
    sums = torch.tensor(SUMS, device=weight.device)
    return torch.einsum("pai,qbj,nctij->pqnctab", sums, sums, weight.detach().float()).flatten(0, 2).contiguous()


def stored_weight(weight: Tensor, codes: str) -> tuple[Tensor, Tensor]:
    """`coded_weight` of a convolution [N,C,t,y,x], folded where that can be."""
    return coded_weight(folded(weight), codes)


def spread(sets: Tensor) -> Tensor:
    """What four sets of 2x2 weights give with a border of one on all sides, [T,Y+1,X+1,4N], to the large frame [T,2Y,2X,N]."""
    t, y, x, n = sets.shape[0], sets.shape[1] - 1, sets.shape[2] - 1, sets.shape[3] // 4
    places = [sets[:, p // 2 : y + p // 2, p % 2 : x + p % 2, p * n : (p + 1) * n] for p in range(4)]
    rows = [torch.stack(places[i : i + 2], 3).reshape(t, y, 2 * x, n) for i in (0, 2)]
    return torch.stack(rows, 2).reshape(t, 2 * y, 2 * x, n)


def conv8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None = None, *, codes: str
) -> Tensor:
    """x int8 [T,Y,X,C], weight int8 [N,C,t,side,side], scale fp32 [N], bias [N] and residual in bf16 or fp32, to
    [T-t+1,Y,X,N] in bias's dtype: products of codes summed in fp32, times `scale`, plus bias and residual, rounded once.
    With sides of two: folded, weight [4N,C,1,2,2] and scale [4N] to [T,2Y,2X,N]."""
    side = weight.shape[-1]
    first = decode(x, codes).permute(3, 0, 1, 2)[None]
    product = functional.conv3d(first, decode(weight, codes), padding=(0, side // 2, side // 2))[0].permute(1, 2, 3, 0)
    scaled = product * scale
    out = (spread(scaled) if side == FOLDED[-1] else scaled) + bias.to(torch.float32)
    return (out if residual is None else out + residual.to(torch.float32)).to(bias.dtype).contiguous()
