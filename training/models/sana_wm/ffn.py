"""The feed-forward network: gated, with a depthwise convolution over each frame and one of three frames along time.

Legend: F latent frames of a chunk, P tokens of a frame, h, w its sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtake.training.models.sana_wm.attention import rows
from longtake.training.models.sana_wm.config import SanaWMConfig
from longtake.training.models.sana_wm.kit import Kit


class _Wrapped(nn.Module):
    """A module under the name `conv`, as the publisher's keys have it."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class FeedForward(nn.Module):
    """2 x ffn_dim up, depthwise 3x3, gate, down, then a kernel of three frames of which the first may be the last chunk's."""

    def __init__(self, config: SanaWMConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, config.ffn_dim
        self.inverted_conv = _Wrapped(nn.Linear(dim, 2 * hidden))
        self.depth_conv = _Wrapped(nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden))
        self.point_conv = _Wrapped(nn.Linear(hidden, dim, bias=False))
        self.t_conv = nn.Conv2d(dim, dim, (3, 1), padding=(1, 0), bias=False)

    def forward(self, x: Tensor, tail: Tensor, grid: tuple[int, int], kit: Kit) -> tuple[Tensor, Tensor]:
        """x [..., F,P,dim], tail [..., P,dim] of the frame before; the result and the next chunk's tail."""
        up = rows(self.inverted_conv, x).unflatten(-2, grid)
        depth: Any = self.depth_conv.conv
        y = kit.gated_ffn(up, depth.weight.flatten(1), depth.bias)
        y = rows(self.point_conv, y.flatten(-3, -2))
        return self.along_time(y, tail.to(y.dtype)), y[..., -1, :, :]

    def along_time(self, y: Tensor, tail: Tensor) -> Tensor:
        """y plus what the temporal convolution makes of each frame and its neighbours; after the chunk there is nothing."""
        before = torch.cat((tail.unsqueeze(-3), y[..., :-1, :, :]), -3)
        after = torch.cat((y[..., 1:, :, :], torch.zeros_like(y[..., :1, :, :])), -3)
        taps = self.t_conv.weight.squeeze(-1).permute(0, 2, 1).flatten(1)  # [o, 3 * i]
        return y + functional.linear(torch.cat((before, y, after), -1), taps)
