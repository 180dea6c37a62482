"""The gated depthwise convolution inside the feed-forward network: the plain PyTorch truth. Exports to ONNX as it stands.

Legend: T frames, Y, X sizes of a frame, C features that come out, twice as many go in.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def gated_ffn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [..., T,Y,X,2*C]; weight [2*C,9], a 3x3 filter a feature; bias [2*C].

    silu, the filter over each frame (zeros around it), then the first half of the features times silu of the second.
    Returns [..., T,Y,X,C] in x's dtype; between the first silu, which rounds, and the end all is fp32.
    """
    active = functional.silu(x.float()).to(x.dtype).float()
    frames = active.flatten(0, -4).permute(0, 3, 1, 2)
    channels = weight.shape[0]
    if isinstance(channels, int):
        filters = weight.float().reshape(-1, 1, 3, 3)
        mixed = functional.conv2d(frames, filters, bias.float(), padding=1, groups=channels)
    else:  # while it is exported: a convolution's groups would be those of the example
        mixed = _nine_taps(frames, weight.float(), bias.float())
    mixed = mixed.permute(0, 2, 3, 1).reshape(x.shape)
    half = channels // 2
    a, b = mixed[..., :half], mixed[..., half:]
    return (a * functional.silu(b)).contiguous().to(x.dtype)


def _nine_taps(frames: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same filter as shifted products; frames [T,C,Y,X]."""
    height, width = frames.shape[-2:]
    padded = functional.pad(frames, (1, 1, 1, 1))
    mixed = bias.reshape(1, -1, 1, 1)
    for i in range(9):
        y, x = divmod(i, 3)
        mixed = mixed + padded[..., y : y + height, x : x + width] * weight[:, i].reshape(1, -1, 1, 1)
    return mixed
