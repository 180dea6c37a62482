"""Upsampling of frames, channels last, and the parameter-free shortcut beside it: the plain PyTorch truth.

Functional: new tensors come out. Exports to ONNX as it stands.
Legend: T frames, Y, X sizes of a frame, C channels, N channels that come out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.plugins.codes import encode


def upsample_space(x: Tensor) -> Tensor:
    """x [T,Y,X,C] to [T,2Y,2X,C]: every position four times."""
    t, y, w, c = x.shape
    return x[:, :, None, :, None].expand(t, y, 2, w, 2, c).reshape(t, 2 * y, 2 * w, c).contiguous()


def upsample_time(x: Tensor) -> Tensor:
    """x [T,Y,X,C] to [2T,2Y,2X,C/2]: the first half of the channels is the earlier frame."""
    half = x.shape[-1] // 2
    frames = torch.stack((x[..., :half], x[..., half : 2 * half]), 1)
    return upsample_space(frames.flatten(0, 1))


def encode_frames(x: Tensor, factor: Tensor, *, codes: str) -> Tensor:
    """x [T,Y,X,C] to int8 codes of x times factor fp32 [1], of the same shape."""
    return encode(x.to(torch.float32) * factor, codes)


def coded_upsample(x: Tensor, factor: Tensor, *, time: int, codes: str) -> Tensor:
    """`upsample_space` or, `time` 2, `upsample_time` of such codes: int8."""
    return (upsample_space if time == 1 else upsample_time)(encode_frames(x, factor, codes=codes))


def _duplicate_up(x: Tensor, y: Tensor, time: int) -> Tensor:
    """Of x's channels, each repeated n = 4 time N / C times, channel (o, t, y, x) of [N, time, 2, 2] goes to output
    channel o at that place of the block of positions."""
    n, places = y.shape[-1], 4 * time
    blocks = []
    for place in range(places):
        source = (torch.arange(n, device=x.device) * places + place) * x.shape[-1] // (n * places)
        blocks.append(torch.index_select(x, 3, source))
    rows = [torch.stack((blocks[i], blocks[i + 1]), 3).flatten(2, 3) for i in range(0, places, 2)]
    frames = [torch.stack((rows[i], rows[i + 1]), 2).flatten(1, 2) for i in range(0, len(rows), 2)]
    spread = torch.stack(frames, 1).flatten(0, 1)
    return (spread.to(torch.float32) + y.to(torch.float32)).to(x.dtype)


def duplicate_up(x: Tensor, y: Tensor) -> Tensor:
    """x [T,Y,X,C], y [T,2Y,2X,N] to their sum like y, x unfolded; C divides 4 N."""
    return _duplicate_up(x, y, 1)


def duplicate_up_time(x: Tensor, y: Tensor) -> Tensor:
    """x [T,Y,X,C], y [2T,2Y,2X,N] to their sum like y, x unfolded; C divides 8 N."""
    return _duplicate_up(x, y, 2)
