"""Layers of the causal video VAE, and the stream that carries their histories from one call to the next.

Legend: B batch, C channels, T frames at a layer's own rate, H, W sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.plugins.stream_extend.reference import CHANNEL_NORM_EPS


class Stream:
    """Histories of the causal convolutions, consumed and produced in the order in which they run.

    A new history is the end of [old history, input], the very tensor the convolution reads, and nothing else reads the
    old one: so it may be written over the old one, if not before that tensor is there.

    Args:
        histories: what the previous call produced; None at the start of a clip, where the past is zeros.
        in_place: write the new histories into `histories` instead of returning new tensors. Not for autograd.
    """

    def __init__(self, histories: Sequence[Tensor] | None = None, in_place: bool = False) -> None:
        self.fresh, self.in_place = histories is None, in_place
        self._old = iter(histories or ())
        self.new: list[Tensor] = []

    def extend(self, x: Tensor, frames: int, norm: RMSNorm | None = None) -> Tensor:
        """Put the last `frames` frames of the past before `x` [B,C,T,H,W] and keep the last `frames` of the result.

        With `norm`, `x` goes through it and SiLU first.
        """
        if norm is not None:
            x = F.silu(norm(x))
        old = None if self.fresh else next(self._old)
        longer = F.pad(x, (0, 0, 0, 0, frames, 0)) if old is None else torch.cat([old, x], 2)
        self.keep(longer[:, :, -frames:], old)
        return longer

    def keep(self, history: Tensor, old: Tensor | None = None) -> None:
        """Keep `history` for the next call, written over `old` if that is how this stream works."""
        if self.in_place and old is not None:
            self.new.append(old.copy_(history))
        else:  # a copy, lest a few frames keep the whole input alive; in training autograd keeps that anyway
            self.new.append(history if history.requires_grad else history.contiguous())


def channels_last(x: Tensor) -> Tensor:
    """[1,C,T,H,W] to [T,H,W,C]."""
    return x[0].permute(1, 2, 3, 0)


def channels_first(x: Tensor) -> Tensor:
    """[T,H,W,C] to [1,C,T,H,W]."""
    return x.permute(3, 0, 1, 2)[None]


class FirstStream(Stream):
    """The start of a clip whose histories are kept as the ops have them, [T,H,W,C]."""

    def keep(self, history: Tensor, old: Tensor | None = None) -> None:
        """Keep `history` channels last."""
        self.new.append(channels_last(history).contiguous())


class CausalConv3d(nn.Module):
    """3-D convolution that sees the present and `kernel[0] - 1` past frames."""

    def __init__(self, in_dim: int, out_dim: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        self.past = kernel[0] - 1
        self.conv = nn.Conv3d(in_dim, out_dim, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, stream: Stream, norm: RMSNorm | None = None) -> Tensor:
        """`norm`: applied to `x` first, then SiLU; for a convolution that sees the past."""
        return self.conv(stream.extend(x, self.past, norm) if self.past else x)


RMS_EPS = CHANNEL_NORM_EPS  # in the place of the reference's clamp of the norm at 1e-12


class RMSNorm(nn.Module):
    """Root-mean-square norm over channels, in fp32, with a learned gain per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        full = x.float()
        scale = torch.rsqrt((full * full).mean(1, keepdim=True) + RMS_EPS).to(x.dtype)
        return x * scale * self.gamma.to(x.dtype).view(-1, 1, 1, 1)


class ResBlock(nn.Module):
    """Norm, SiLU, conv, twice, around a shortcut (1x1x1 where the width changes)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = RMSNorm(in_dim), CausalConv3d(in_dim, out_dim, (3, 3, 3))
        self.norm2, self.conv2 = RMSNorm(out_dim), CausalConv3d(out_dim, out_dim, (3, 3, 3))
        self.shortcut = nn.Conv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        y = self.conv1(x, stream, self.norm1)
        return self.conv2(y, stream, self.norm2) + self.shortcut(x)


class FrameAttention(nn.Module):
    """Single-head self-attention among the positions of one frame; frames do not see each other."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.qkv = nn.Conv3d(dim, 3 * dim, 1)
        self.proj = nn.Conv3d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 4, 1).reshape(b * t, h * w, 3 * c)
        q, k, v = qkv.chunk(3, -1)
        k, v = self.everywhere(k), self.everywhere(v)
        weights = torch.softmax((q @ k.transpose(1, 2)).float() * c**-0.5, -1).to(v.dtype)
        return x + self.proj((weights @ v).reshape(b, t, h, w, c).permute(0, 4, 1, 2, 3))

    def everywhere(self, x: Tensor) -> Tensor:
        """Keys or values [B T, positions, C] of the whole frame; where ranks share its rows, `runtime.parallel` gathers."""
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.before, self.attention, self.after = ResBlock(dim, dim), FrameAttention(dim), ResBlock(dim, dim)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.after(self.attention(self.before(x, stream)), stream)


def average_down(x: Tensor, out_dim: int, time: int, space: int, fresh: bool) -> Tensor:
    """Parameter-free shortcut: fold a (time, space, space) block into channels, average groups down to `out_dim`."""
    if time > 1 and fresh:
        x = F.pad(x, (0, 0, 0, 0, time - 1, 0))
    b, c, t, h, w = x.shape
    t, h, w = t // time, h // space, w // space
    x = x.view(b, c, t, time, h, space, w, space).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(b, out_dim, -1, t, h, w).mean(2)


def duplicate_up(x: Tensor, out_dim: int, time: int, fresh: bool) -> Tensor:
    """Parameter-free shortcut: repeat channels and unfold them into a (time, 2, 2) block; inverse of `average_down`."""
    b, c, t, h, w = x.shape
    repeats = out_dim * time * 4 // c
    x = x.unsqueeze(2).expand(b, c, repeats, t, h, w).reshape(b, out_dim, time, 2, 2, t, h, w)
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, out_dim, t * time, h * 2, w * 2)
    return x[:, :, time - 1 :] if time > 1 and fresh else x


class Down(nn.Module):
    """Halve space, and time if asked. The first frame of a clip has no partner: it passes the time step unchanged."""

    def __init__(self, dim: int, time: bool) -> None:
        super().__init__()
        self.space = nn.Conv3d(dim, dim, (1, 3, 3), stride=(1, 2, 2))
        self.time = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.space(F.pad(x, (0, 1, 0, 1)))
        if self.time is None:
            return x
        if not stream.fresh:
            return self.time(stream.extend(x, 1))
        stream.keep(x[:, :, -1:])
        return torch.cat([x[:, :, :1], self.time(x)], 2) if x.shape[2] > 1 else x


class UpConv(nn.Conv3d):
    """Nearest 2x upsampling of space, then a 1x3x3 convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        x = x.view(b, c, t, h, 1, w, 1).expand(b, c, t, h, 2, w, 2).reshape(b, c, t, h * 2, w * 2)
        return super().forward(x)


class Up(nn.Module):
    """Double space, and time if asked. The first frame of a clip stays one frame and is no history for the rest."""

    def __init__(self, dim: int, time: bool) -> None:
        super().__init__()
        self.time = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if time else None
        self.space = UpConv(dim)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.space(x if self.time is None else self._double_time(x, stream, self.time))

    def _double_time(self, x: Tensor, stream: Stream, time: CausalConv3d) -> Tensor:
        if not stream.fresh:
            return self._two_for_one(x, stream, time)
        first, rest = x[:, :, :1], x[:, :, 1:]
        if rest.shape[2]:
            return torch.cat([first, self._two_for_one(rest, stream, time)], 2)
        nothing = first * 0  # computed, because an engine's output must not be a constant
        stream.keep(torch.cat([nothing, nothing], 2))
        return first

    def _two_for_one(self, x: Tensor, stream: Stream, time: CausalConv3d) -> Tensor:
        b, c, t, h, w = x.shape
        return time(x, stream).view(b, 2, c, t, h, w).permute(0, 2, 3, 1, 4, 5).reshape(b, c, 2 * t, h, w)


class Level(nn.Module):
    """Residual blocks at one resolution, then a resampling step with its parameter-free shortcut.

    A level that doesn't resample has a shortcut only if `shortcut` says so: the mean over groups of channels.
    """

    def __init__(
        self, in_dim: int, out_dim: int, blocks: int, resample: Down | Up | None, shortcut: bool = False
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(blocks))
        self.resample, self.shortcut = resample, shortcut
        self.out_dim = out_dim

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        y = x
        for block in self.blocks:
            y = block(y, stream)
        if self.resample is None:
            return y + average_down(x, self.out_dim, 1, 1, stream.fresh) if self.shortcut else y
        time = 1 if self.resample.time is None else 2
        y = self.resample(y, stream)
        if isinstance(self.resample, Down):
            return y + average_down(x, self.out_dim, time, 2, stream.fresh)
        return y + duplicate_up(x, self.out_dim, time, stream.fresh)
