"""Causal video VAE of the Wan 2.2 kind: stride 4x16x16, one latent frame in, four pixel frames out, any length.

The first frame of a clip is its own group: latent 0 stands for 1 pixel frame, every later latent for 4. All
convolutions look back in time only, and every history they need travels through `Stream`. So one implementation serves
the whole clip in parallel (training), chunk after chunk, and one latent at a time with explicit caches (export);
the three are equal.

Legend: B batch, C channels, F latent frames, T pixel frames (T = 1 + 4 (F - 1) from the start of a clip), H, W sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from longtake.training.models.presets import VAEConfig
from longtake.training.models.streaming_vae import StreamingVAE, StreamStep
from longtake.training.models.wan.vae_caches import PATCH
from longtake.training.models.wan.vae_layers import (
    CausalConv3d,
    Down,
    FirstStream,
    Level,
    Middle,
    RMSNorm,
    Stream,
    Up,
)


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
        return self.conv_out(x, stream, self.norm)


def _encoder(config: VAEConfig) -> Coder:
    """Pixel patches [B,12,T,H/2,W/2] to latents [B,z,F,H/16,W/16]; to their mean and log variance, [B,2z,...], where
    `quant_convs` says that a convolution mixes the two."""
    dims = [config.encoder_dim * m for m in (1, *config.dim_mult)]
    stages: list[nn.Module] = []
    for i, (a, b) in enumerate(zip(dims[:-1], dims[1:])):
        down = Down(b, config.temporal_down[i]) if i < len(config.temporal_down) else None
        stages.append(Level(a, b, config.res_blocks, down, config.last_shortcut))
    moments = config.z_channels * (2 if config.quant_convs else 1)
    return Coder(3 * PATCH**2, dims[0], [*stages, Middle(dims[-1])], dims[-1], moments)


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


class CausalVAE(StreamingVAE):
    """See `StreamingVAE`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        self.encoder, self.decoder = _encoder(config), _decoder(config)
        z = config.z_channels
        self.quant = nn.Conv3d(2 * z, z, 1) if config.quant_convs else nn.Identity()
        self.post_quant = nn.Conv3d(z, z, 1) if config.quant_convs else nn.Identity()

    @staticmethod
    def stream(histories: Sequence[Tensor] | None = None) -> Stream:
        """A clip's start, or its continuation."""
        return Stream(histories)

    def encode_raw(self, video: Tensor, stream: Stream) -> Tensor:
        """Video [B,3,T,H,W] to latents [B,z,F,h,w] before normalization."""
        return self.quant(self.encoder(unshuffle(video).to(self.encoder.conv_in.conv.weight.dtype), stream))

    def decode_raw(self, raw: Tensor, stream: Stream) -> Tensor:
        """Latents [B,z,F,h,w] before normalization to video [B,3,T,H,W], not clamped."""
        return shuffle(self.decoder(self.post_quant(raw.to(self.decoder.conv_in.conv.weight.dtype)), stream))


class _Step(StreamStep):
    """See `StreamStep`.

    Caches are the histories of the causal convolutions, in the order in which they run. A new cache is the end of
    [old cache, input], which the convolution reads, and nothing else in the call reads either: an executor may write it
    over the old one as soon as that tensor is there, as PyTorch does if `in_place`.
    """

    encodes = False

    def __init__(self, vae: CausalVAE, in_place: bool = False, ops: bool = False) -> None:
        """`in_place`: see `vae_layers.Stream`. `ops`: of a first step, caches [T,H,W,C] as ops want them."""
        super().__init__(vae, self.encodes)
        self.in_place = in_place
        self.stream = FirstStream if ops else Stream


class DecoderFirst(_Step):
    """latent fp32 [1,z,F,h,w] -> (frames fp32 [1,3,1+4(F-1),H,W], *caches): the start of a clip, usually F = 1."""

    def forward(self, latent: Tensor) -> tuple[Tensor, ...]:
        return self.run(latent, self.stream())


class DecoderSteady(_Step):
    """(latent fp32 [1,z,F,h,w], *caches) -> (frames fp32 [1,3,4F,H,W], *new caches): later latents, any F.

    The caches' shapes don't depend on F. With `in_place` the new caches are the old ones, overwritten.
    """

    def forward(self, latent: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        return self.run(latent, self.stream(caches, self.in_place))


class VAEEncoderFirst(_Step):
    """frames fp32 [1,3,1+4(F-1),H,W] -> (latent fp32 [1,z,F,h,w], *caches): the start of a clip, usually F = 1."""

    encodes = True

    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        return self.run(frames, self.stream())


class VAEEncoderSteady(_Step):
    """(frames fp32 [1,3,4F,H,W], *caches) -> (latent fp32 [1,z,F,h,w], *new caches): later groups of four frames."""

    encodes = True

    def forward(self, frames: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        return self.run(frames, self.stream(caches, self.in_place))
