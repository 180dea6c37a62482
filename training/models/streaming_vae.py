"""What the families' causal video VAEs have in common: a clip at once, or part after part through a stream, all equal.

A family's VAE gives encoder, decoder, its stream (what carries the pasts of its convolutions from one call to the next), and
`encode_raw` and `decode_raw`. Legend: B batch, C channels, F latent frames, T video frames (1 + stride (F - 1) from a clip's
start), H, W sizes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from longtake.errors import LongtakeError


class AnyStream(Protocol):
    """new: what this call leaves for the next one, in the order in which convolutions run."""

    new: list[Tensor]


class StreamingVAE(nn.Module):
    """Encoder, decoder, and the per-channel mean and std that bring latents to zero mean and unit std."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("latent_mean", torch.zeros(config.z_channels))
        self.register_buffer("latent_std", torch.ones(config.z_channels))

    @staticmethod
    @abstractmethod
    def stream(histories: Sequence[Tensor] | None = None) -> Any:
        """A clip's start, or its continuation."""

    @abstractmethod
    def encode_raw(self, video: Tensor, stream: Any) -> Tensor:
        """Video [B,3,T,H,W] to latents [B,z,F,h,w] before normalization."""

    @abstractmethod
    def decode_raw(self, raw: Tensor, stream: Any) -> Tensor:
        """Latents [B,z,F,h,w] before normalization to video [B,3,T,H,W], not clamped."""

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """Video fp32 [B,3,T,H,W] in [-1,1], T = 1 + stride n, to normalized latents fp32 [B,F,C,h,w]: the mean.

        Raises:
            LongtakeError: the clip's length or size does not fit the stride.
        """
        return self.encode_chunk(video_BCTHW)[0]

    def encode_chunk(self, video: Tensor, histories: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Encode the next part of a clip: 1 + stride n frames at its start (histories None), stride n after that."""
        check_video(video, self.config.stride, first=histories is None)
        stream = self.stream(histories)
        return encode_step(self, video, stream).transpose(1, 2), stream.new

    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        """Normalized latents [B,F,C,h,w] to video fp32 [B,3,T,H,W], clamped to [-1,1]."""
        return self.decode_chunk(latents_BFCHW)[0]

    def decode_chunk(self, latents: Tensor, histories: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Decode the next latents of a clip; `histories` is None at its start, then what the last call returned."""
        stream = self.stream(histories)
        return decode_step(self, latents.transpose(1, 2), stream), stream.new


def encode_step(vae: StreamingVAE, video: Tensor, stream: Any) -> Tensor:
    """Video [B,3,T,H,W] in [-1,1] to normalized latents fp32 [B,z,F,h,w]."""
    mean, std = (buffer.float().view(-1, 1, 1, 1) for buffer in (vae.latent_mean, vae.latent_std))
    return (vae.encode_raw(video, stream).float() - mean) / std


def decode_step(vae: StreamingVAE, latents: Tensor, stream: Any) -> Tensor:
    """Normalized latents [B,z,F,h,w] to video fp32 [B,3,T,H,W] in [-1,1]."""
    mean, std = (buffer.float().view(-1, 1, 1, 1) for buffer in (vae.latent_mean, vae.latent_std))
    return vae.decode_raw(latents.float() * std + mean, stream).float().clamp(-1.0, 1.0)


class StreamStep(nn.Module):
    """A step of a stream as a pure function of tensors: what engines are made of."""

    def __init__(self, vae: Any, encoder: bool) -> None:
        super().__init__()
        self.vae, self.step = vae, encode_step if encoder else decode_step

    def run(self, x: Tensor, stream: AnyStream) -> tuple[Tensor, ...]:
        """One step through `stream`: the frames or the latent, then what it leaves."""
        return self.step(self.vae, x, stream), *stream.new


class VAEStep(StreamStep):
    """(latent or frames, *pasts) -> (frames or latent, *new pasts); without pasts it is a clip's first."""

    def forward(self, x: Tensor, *pasts: Tensor) -> tuple[Tensor, ...]:
        return self.run(x, self.vae.stream(pasts or None))


def check_video(video: Tensor, stride: tuple[int, int, int], first: bool) -> None:
    """Raise LongtakeError for video [B,3,T,H,W] of a length or size that does not fit. first: it begins a clip."""
    time, height, width = stride
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
