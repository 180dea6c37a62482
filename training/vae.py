"""Causal video VAE of the Wan 2.2 kind: stride 4x16x16, one latent frame in, four pixel frames out, any length.

The first frame of a clip is its own group: latent 0 stands for 1 pixel frame, every later latent for 4. All
convolutions look back in time only, and every history they need travels through `Stream`. So one implementation serves
the whole clip in parallel (training), chunk after chunk, and one latent at a time with explicit caches (export);
the three are equal.

Legend: B batch, C channels, F latent frames, T pixel frames (T = 1 + 4 (F - 1) from the start of a clip), H, W sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.runtime.errors import LongtakeError
from longtake.training.presets import Preset, VAEConfig

PATCH = 2  # pixel unshuffle before the encoder, pixel shuffle after the decoder


class Stream:
    """Histories of the causal convolutions, consumed and produced in the order in which they run.

    Args:
        histories: what the previous call produced; None at the start of a clip, where the past is zeros.
    """

    def __init__(self, histories: Sequence[Tensor] | None = None) -> None:
        self.fresh = histories is None
        self._old = iter(histories or ())
        self.new: list[Tensor] = []

    def extend(self, x: Tensor, frames: int) -> Tensor:
        """Put the last `frames` frames of the past before `x` [B,C,T,H,W] and keep the last `frames` of the result."""
        x = F.pad(x, (0, 0, 0, 0, frames, 0)) if self.fresh else torch.cat([next(self._old), x], 2)
        self.new.append(x[:, :, -frames:])
        return x


class CausalConv3d(nn.Module):
    """3-D convolution that sees the present and `kernel[0] - 1` past frames."""

    def __init__(self, in_dim: int, out_dim: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        self.past = kernel[0] - 1
        self.conv = nn.Conv3d(in_dim, out_dim, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.conv(stream.extend(x, self.past) if self.past else x)


class RMSNorm(nn.Module):
    """Root-mean-square norm over channels, in fp32, with a learned gain per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        full = x.float()
        scale = torch.rsqrt((full * full).mean(1, keepdim=True) + 1e-12).to(x.dtype)
        return x * scale * self.gamma.to(x.dtype).view(-1, 1, 1, 1)


class ResBlock(nn.Module):
    """Norm, SiLU, conv, twice, around a shortcut (1x1x1 where the width changes)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = RMSNorm(in_dim), CausalConv3d(in_dim, out_dim, (3, 3, 3))
        self.norm2, self.conv2 = RMSNorm(out_dim), CausalConv3d(out_dim, out_dim, (3, 3, 3))
        self.shortcut = nn.Conv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)), stream)
        return self.conv2(F.silu(self.norm2(y)), stream) + self.shortcut(x)


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
        weights = torch.softmax((q @ k.transpose(1, 2)).float() * c**-0.5, -1).to(v.dtype)
        return x + self.proj((weights @ v).reshape(b, t, h, w, c).permute(0, 4, 1, 2, 3))


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.before, self.attention, self.after = ResBlock(dim, dim), FrameAttention(dim), ResBlock(dim, dim)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.after(self.attention(self.before(x, stream)), stream)


def average_down(x: Tensor, out_dim: int, time: int, fresh: bool) -> Tensor:
    """Parameter-free shortcut: fold a (time, 2, 2) block into channels and average groups down to `out_dim`."""
    if time > 1 and fresh:
        x = F.pad(x, (0, 0, 0, 0, time - 1, 0))
    b, c, t, h, w = x.shape
    x = x.view(b, c, t // time, time, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(b, out_dim, -1, t // time, h // 2, w // 2).mean(2)


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
        stream.new.append(x[:, :, -1:])
        return torch.cat([x[:, :, :1], self.time(x)], 2) if x.shape[2] > 1 else x


class Up(nn.Module):
    """Double space, and time if asked. The first frame of a clip stays one frame and is no history for the rest."""

    def __init__(self, dim: int, time: bool) -> None:
        super().__init__()
        self.time = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if time else None
        self.space = nn.Conv3d(dim, dim, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = x if self.time is None else self._double_time(x, stream, self.time)
        b, c, t, h, w = x.shape
        x = x.view(b, c, t, h, 1, w, 1).expand(b, c, t, h, 2, w, 2).reshape(b, c, t, h * 2, w * 2)
        return self.space(x)

    def _double_time(self, x: Tensor, stream: Stream, time: CausalConv3d) -> Tensor:
        if not stream.fresh:
            return self._two_for_one(x, stream, time)
        first, rest = x[:, :, :1], x[:, :, 1:]
        if rest.shape[2]:
            return torch.cat([first, self._two_for_one(rest, stream, time)], 2)
        nothing = first * 0  # computed, because an engine's output must not be a constant
        stream.new.append(torch.cat([nothing, nothing], 2))
        return first

    def _two_for_one(self, x: Tensor, stream: Stream, time: CausalConv3d) -> Tensor:
        b, c, t, h, w = x.shape
        return time(x, stream).view(b, 2, c, t, h, w).permute(0, 2, 3, 1, 4, 5).reshape(b, c, 2 * t, h, w)


class Level(nn.Module):
    """Residual blocks at one resolution, then a resampling step with its parameter-free shortcut."""

    def __init__(self, in_dim: int, out_dim: int, blocks: int, resample: Down | Up | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(blocks))
        self.resample = resample
        self.out_dim = out_dim

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        y = x
        for block in self.blocks:
            y = block(y, stream)
        if self.resample is None:
            return y
        shortcut = average_down if isinstance(self.resample, Down) else duplicate_up
        time = 1 if self.resample.time is None else 2
        return self.resample(y, stream) + shortcut(x, self.out_dim, time, stream.fresh)


class Coder(nn.Module):
    """What encoder and decoder have in common: conv, stages in order, norm, SiLU, conv."""

    def __init__(self, in_dim: int, first_dim: int, stages: list[nn.Module], last_dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(in_dim, first_dim, (3, 3, 3))
        self.stages = nn.ModuleList(stages)
        self.norm = RMSNorm(last_dim)
        self.conv_out = CausalConv3d(last_dim, out_dim, (3, 3, 3))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv_in(x, stream)
        for stage in self.stages:
            x = stage(x, stream)
        return self.conv_out(F.silu(self.norm(x)), stream)


def _encoder(config: VAEConfig) -> Coder:
    """Pixel patches [B,12,T,H/2,W/2] to latents [B,z,F,H/16,W/16]."""
    dims = [config.encoder_dim * m for m in (1, *config.dim_mult)]
    stages: list[nn.Module] = []
    for i, (a, b) in enumerate(zip(dims[:-1], dims[1:])):
        down = Down(b, config.temporal_down[i]) if i < len(config.temporal_down) else None
        stages.append(Level(a, b, config.res_blocks, down))
    return Coder(3 * PATCH**2, dims[0], [*stages, Middle(dims[-1])], dims[-1], config.z_channels)


def _decoder(config: VAEConfig) -> Coder:
    """Latents [B,z,F,H/16,W/16] to pixel patches [B,12,T,H/2,W/2]; one residual block a level more than the encoder."""
    dims = [config.decoder_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
    times = tuple(reversed(config.temporal_down))
    stages: list[nn.Module] = [Middle(dims[0])]
    for i, (a, b) in enumerate(zip(dims[:-1], dims[1:])):
        stages.append(Level(a, b, config.res_blocks + 1, Up(b, times[i]) if i < len(times) else None))
    return Coder(config.z_channels, dims[0], stages, dims[-1], 3 * PATCH**2)


def unshuffle(video: Tensor) -> Tensor:
    """Fold 2x2 pixels into channels: [B,3,T,H,W] to [B,12,T,H/2,W/2]."""
    b, c, t, h, w = video.shape
    x = video.reshape(b, c, t, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 1, 4, 6, 2, 3, 5)
    return x.reshape(b, c * PATCH**2, t, h // PATCH, w // PATCH)


def shuffle(patches: Tensor) -> Tensor:
    """Inverse of `unshuffle`: [B,12,T,H/2,W/2] to [B,3,T,H,W]."""
    b, c, t, h, w = patches.shape
    x = patches.reshape(b, c // PATCH**2, PATCH, PATCH, t, h, w).permute(0, 1, 4, 5, 2, 6, 3)
    return x.reshape(b, c // PATCH**2, t, h * PATCH, w * PATCH)


class CausalVAE(nn.Module):
    """Encoder, decoder, and the per-channel mean and std that bring latents to zero mean and unit std."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = _encoder(config), _decoder(config)
        self.register_buffer("latent_mean", torch.zeros(config.z_channels))
        self.register_buffer("latent_std", torch.ones(config.z_channels))

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """Video fp32 [B,3,T,H,W] in [-1,1], T = 1 + 4n, to normalized latents fp32 [B,F,C,H/16,W/16]: the mean.

        Raises:
            LongtakeError: the clip's length or size does not fit the stride.
        """
        return self.encode_chunk(video_BCTHW)[0]

    def encode_chunk(self, video: Tensor, histories: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Encode the next part of a clip: 1 + 4n frames at its start (histories None), 4n frames after that."""
        _check_video(video, self.config, first=histories is None)
        stream = Stream(histories)
        raw = self.encode_raw(video, stream).float()
        mean, std = (buffer.float().view(-1, 1, 1, 1) for buffer in (self.latent_mean, self.latent_std))
        return ((raw - mean) / std).transpose(1, 2), stream.new

    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        """Normalized latents [B,F,C,h,w] to video fp32 [B,3,1+4(F-1),16h,16w], clamped to [-1,1]."""
        return self.decode_chunk(latents_BFCHW)[0]

    def decode_chunk(self, latents: Tensor, histories: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Decode the next latents of a clip; `histories` is None at its start, then what the last call returned."""
        stream = Stream(histories)
        return decode_step(self, latents.transpose(1, 2), stream), stream.new

    def encode_raw(self, video: Tensor, stream: Stream) -> Tensor:
        """Video [B,3,T,H,W] to latents [B,z,F,h,w] before normalization."""
        return self.encoder(unshuffle(video).to(self.encoder.conv_in.conv.weight.dtype), stream)

    def decode_raw(self, raw: Tensor, stream: Stream) -> Tensor:
        """Latents [B,z,F,h,w] before normalization to video [B,3,T,H,W], not clamped."""
        return shuffle(self.decoder(raw.to(self.decoder.conv_in.conv.weight.dtype), stream))


def decode_step(vae: CausalVAE, latents: Tensor, stream: Stream) -> Tensor:
    """Normalized latents [B,z,F,h,w] to video fp32 [B,3,T,H,W] in [-1,1]."""
    mean, std = (buffer.float().view(-1, 1, 1, 1) for buffer in (vae.latent_mean, vae.latent_std))
    return vae.decode_raw(latents.float() * std + mean, stream).float().clamp(-1.0, 1.0)


class DecoderFirst(nn.Module):
    """latent fp32 [1,z,1,h,w] -> (frames fp32 [1,3,1,H,W], *caches): the start of a clip."""

    def __init__(self, vae: CausalVAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent: Tensor) -> tuple[Tensor, ...]:
        stream = Stream()
        return decode_step(self.vae, latent, stream), *stream.new


class DecoderSteady(nn.Module):
    """(latent fp32 [1,z,1,h,w], *caches) -> (frames fp32 [1,3,4,H,W], *new caches): every later latent."""

    def __init__(self, vae: CausalVAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        stream = Stream(caches)
        return decode_step(self.vae, latent, stream), *stream.new


@lru_cache
def decoder_cache_shapes(preset: Preset) -> list[tuple[int, ...]]:
    """Shapes of the decoder's caches, in binding order (found by a run without data)."""
    with torch.device("meta"):
        vae = CausalVAE(preset.vae)
        latent = torch.empty(1, preset.vae.z_channels, 1, *preset.latent_hw)
        return [tuple(cache.shape) for cache in DecoderFirst(vae)(latent)[1:]]


def _check_video(video: Tensor, config: VAEConfig, first: bool) -> None:
    time, height, width = config.stride
    frames = video.shape[2] - 1 if first else video.shape[2]
    if frames < 0 or frames % time or (not first and frames == 0):
        raise LongtakeError(
            "the number of frames does not fit the VAE",
            got=video.shape[2],
            expected=f"{'1 + ' if first else ''}a multiple of {time}",
            fix="cut the clip",
        )
    if video.shape[3] % height or video.shape[4] % width:
        raise LongtakeError(
            "the frame size does not fit the VAE",
            got=f"{video.shape[4]}x{video.shape[3]}",
            expected=f"multiples of {width}x{height}",
            fix="resize the clip",
        )
