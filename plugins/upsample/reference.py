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


def _two_frames(x: Tensor) -> Tensor:
    """x [T,Y,X,C] to [2T,Y,X,C/2]: the first half of the channels is the earlier frame."""
    half = x.shape[-1] // 2
    return torch.stack((x[..., :half], x[..., half : 2 * half]), 1).flatten(0, 1)


def upsample_time(x: Tensor) -> Tensor:
    """x [T,Y,X,C] to [2T,2Y,2X,C/2]: the first half of the channels is the earlier frame."""
    return upsample_space(_two_frames(x))


def encode_frames(x: Tensor, factor: Tensor, *, time: int, codes: str) -> Tensor:
    """x [T,Y,X,C] to int8 codes of x times factor fp32 [1], of the same shape or, `time` 2, [2T,Y,X,C/2] as above."""
    return encode((x if time == 1 else _two_frames(x)).to(torch.float32) * factor, codes)


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
