"""Layers of the causal LTX-2 VAE, and the stream that carries their tails from one call to the next.

Legend: B batch, C channels, T frames at a layer's own rate, H, W sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtake.training.models.sana_wm.config import DOWN

PAST = 2  # frames that a convolution over three sees of the past
NORM_EPS = 1e-8


class Stream:
    """Tails of the causal convolutions, consumed and produced in the order in which they run.

    At a clip's start the past is the first frame, repeated. tails: what the last call produced; None at the start.
    """

    def __init__(self, tails: Sequence[Tensor] | None = None) -> None:
        self.fresh = tails is None
        self._old = iter(tails or ())
        self.new: list[Tensor] = []

    def extend(self, x: Tensor) -> Tensor:
        """Put the last frames of the past before x [B,C,T,H,W], and keep those of the result."""
        past = torch.cat([x[:, :, :1]] * PAST, 2) if self.fresh else next(self._old).to(x.dtype)
        longer = torch.cat((past, x), 2)
        tail = longer[:, :, -PAST:]
        self.new.append(tail if tail.requires_grad else tail.contiguous())
        return longer


def norm(x: Tensor) -> Tensor:
    """Each place's features over their root mean square, in fp32."""
    wide = x.float()
    return (wide / (wide.square().mean(1, keepdim=True) + NORM_EPS).sqrt()).to(x.dtype)


class CausalConv(nn.Module):
    """3x3x3, looking back in time; in space around it are zeros, or the frame mirrored."""

    def __init__(self, before: int, after: int, mirrored: bool) -> None:
        super().__init__()
        self.mirrored = mirrored
        self.conv = nn.Conv3d(before, after, 3, padding=0)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        longer = stream.extend(x)
        if not self.mirrored:
            return functional.conv3d(longer, self.conv.weight, self.conv.bias, padding=(0, 1, 1))
        batch, channels, frames, height, width = longer.shape
        flat = functional.pad(longer.transpose(1, 2).reshape(-1, channels, height, width), (1, 1, 1, 1), "reflect")
        padded = flat.unflatten(0, (batch, frames)).transpose(1, 2)
        return functional.conv3d(padded, self.conv.weight, self.conv.bias)


class Residual(nn.Module):
    """norm, SiLU, convolution, twice; added to what came in."""

    def __init__(self, before: int, after: int, mirrored: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = CausalConv(before, after, mirrored), CausalConv(after, after, mirrored)
        self.norm3 = nn.LayerNorm(before, eps=1e-6) if before != after else None
        self.conv_shortcut = nn.Conv3d(before, after, 1) if before != after else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        y = self.conv1(functional.silu(norm(x)), stream)
        y = self.conv2(functional.silu(norm(y)), stream)
        if self.norm3 is not None and self.conv_shortcut is not None:
            x = self.conv_shortcut(self.norm3(x.movedim(1, -1)).movedim(-1, 1))
        return x + y


class Blocks(nn.Module):
    """Residual blocks of one width."""

    def __init__(self, width: int, count: int, mirrored: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Residual(width, width, mirrored) for _ in range(count))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        for block in self.resnets:
            x = block(x, stream)
        return x


def fold(x: Tensor, by: tuple[int, int, int]) -> Tensor:
    """[B,C,T,H,W] to [B, C * by, T/t, H/h, W/w], channels in the order (c, t, h, w)."""
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t // by[0], by[0], h // by[1], by[1], w // by[2], by[2])
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, c * math.prod(by), t // by[0], h // by[1], w // by[2])


def unfold(x: Tensor, by: tuple[int, int, int]) -> Tensor:
    """The inverse of `fold`."""
    b, c, t, h, w = x.shape
    x = x.reshape(b, c // math.prod(by), *by, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, c // math.prod(by), t * by[0], h * by[1], w * by[2])


class Downsampler(nn.Module):
    """A convolution, folded; added to the mean of groups of the folded input."""

    def __init__(self, before: int, after: int, kind: str, mirrored: bool) -> None:
        super().__init__()
        self.by = DOWN[kind]
        self.group = before * math.prod(self.by) // after
        self.conv = CausalConv(before, after // math.prod(self.by), mirrored)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if stream.fresh and self.by[0] > 1:  # a clip's first frame is a group of its own
            x = torch.cat((x[:, :, : self.by[0] - 1], x), 2)
        residual = fold(x, self.by).unflatten(1, (-1, self.group)).mean(2)
        return fold(self.conv(x, stream), self.by) + residual


class Upsampler(nn.Module):
    """A convolution, unfolded; added to the unfolded input, repeated."""

    def __init__(self, width: int, kind: str, factor: int, mirrored: bool) -> None:
        super().__init__()
        self.by = DOWN[kind]
        self.repeats = math.prod(self.by) // factor
        self.conv = CausalConv(width, width * math.prod(self.by) // factor, mirrored)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        residual = torch.cat([unfold(x, self.by)] * self.repeats, 1)
        y = unfold(self.conv(x, stream), self.by) + residual
        return y[:, :, self.by[0] - 1 :] if stream.fresh else y


class DownLevel(nn.Module):
    """Residual blocks, then a downsampling."""

    def __init__(self, before: int, after: int, count: int, kind: str) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Residual(before, before, False) for _ in range(count))
        self.downsamplers = nn.ModuleList([Downsampler(before, after, kind, False)])

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        for block in (*self.resnets, *self.downsamplers):
            x = block(x, stream)
        return x


class UpLevel(nn.Module):
    """Another width where it differs, an upsampling, then residual blocks."""

    def __init__(self, before: int, after: int, count: int, kind: str, factor: int) -> None:
        super().__init__()
        self.conv_in = Residual(before, after, True) if before != after else None
        self.upsamplers = nn.ModuleList([Upsampler(after * factor, kind, factor, True)])
        self.resnets = nn.ModuleList(Residual(after, after, True) for _ in range(count))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        for block in (*([self.conv_in] if self.conv_in is not None else []), *self.upsamplers, *self.resnets):
            x = block(x, stream)
        return x
