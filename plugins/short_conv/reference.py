"""The short convolution of keys along time: the plain PyTorch truth. Exports to ONNX as it stands.

Symmetric inside a chunk and causal from chunk to chunk: seven taps over three frames of the chunk before, the chunk, and
three frames of zeros. Legend: T frames of a chunk, P tokens of a frame, C features.
"""

from __future__ import annotations

import torch
from torch import Tensor

TAIL = 3


def short_conv(k: Tensor, tail: Tensor, weight: Tensor) -> Tensor:
    """k [..., T,P,C] as projected; tail [..., 3,P,C], the last frames before it; weight [C,4], the present frame's last.

    Returns [..., T,P,C] in k's dtype, summed in fp32 from the oldest frame on.
    """
    frames = k.shape[-3]
    seen = torch.cat((tail.to(k.dtype), k, torch.zeros_like(tail, dtype=k.dtype)), -3).float()
    taps = weight.float().unbind(-1)
    out = seen[..., :frames, :, :] * taps[0]
    for shift, tap in enumerate((*taps[1:], *reversed(taps[:TAIL])), 1):
        out = out + seen[..., shift : shift + frames, :, :] * tap
    return out.to(k.dtype)
