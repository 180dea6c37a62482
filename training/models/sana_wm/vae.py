"""The causal LTX-2 VAE: stride 8x32x32 (a preset's may be less), one latent frame in, eight video frames out, any length.

The first frame of a clip is its own group. All convolutions look back in time only, and the two frames each needs of the
past travel through `Stream`: the whole clip at once and one latent at a time are equal, bit for bit. Keys are the
publisher's, but for the names of latents_mean and latents_std.

Legend: B batch, C channels, F latent frames, T video frames (1 + stride (F - 1) from a clip's start), H, W sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtake.training.models.sana_wm.config import LTX2Config
from longtake.training.models.sana_wm.vae_layers import Blocks, CausalConv, DownLevel, Stream, UpLevel, norm
from longtake.training.models.streaming_vae import StreamingVAE, decode_step, encode_step


class Encoder(nn.Module):
    """Patches of pixels to the mean of latents, and one log variance for all, which nothing here uses."""

    def __init__(self, config: LTX2Config) -> None:
        super().__init__()
        widths = (config.z_channels, *config.encoder_widths)
        self.conv_in = CausalConv(3 * config.patch**2, widths[0], False)
        levels = zip(widths, widths[1:], config.encoder_layers, config.down)
        self.down_blocks = nn.ModuleList(DownLevel(*level) for level in levels)
        self.mid_block = Blocks(widths[-1], config.encoder_layers[-1], False)
        self.conv_out = CausalConv(widths[-1], config.z_channels + 1, False)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv_in(x, stream)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x, stream)
        return self.conv_out(functional.silu(norm(x)), stream)[:, :-1]


class Decoder(nn.Module):
    """Latents to patches of pixels."""

    def __init__(self, config: LTX2Config) -> None:
        super().__init__()
        widths, layers = config.decoder_widths[::-1], config.decoder_layers[::-1]
        self.conv_in = CausalConv(config.z_channels, widths[0], True)
        self.mid_block = Blocks(widths[0], layers[0], True)
        self.up_blocks = nn.ModuleList()
        before = widths[0]
        for width, count, kind in zip(widths, layers[1:], config.up):
            after = width // config.factor
            self.up_blocks.append(UpLevel(before // config.factor, after, count, kind, config.factor))
            before = after
        self.conv_out = CausalConv(before, 3 * config.patch**2, True)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.mid_block(self.conv_in(x, stream), stream)
        for block in self.up_blocks:
            x = block(x, stream)
        return self.conv_out(functional.silu(norm(x)), stream)


def patches_of(video: Tensor, size: int) -> Tensor:
    """Video [B,3,T,H,W] to patches [B, 3 * size^2, T, H/size, W/size], channels in the order (colour, column, row)."""
    b, c, t, h, w = video.shape
    x = video.reshape(b, c, t, h // size, size, w // size, size).permute(0, 1, 6, 4, 2, 3, 5)
    return x.reshape(b, c * size**2, t, h // size, w // size)


def video_of(patches: Tensor, size: int) -> Tensor:
    """The inverse of `patches_of`."""
    b, c, t, h, w = patches.shape
    x = patches.reshape(b, c // size**2, size, size, t, h, w).permute(0, 1, 4, 5, 3, 6, 2)
    return x.reshape(b, c // size**2, t, h * size, w * size)


class LTX2VAE(StreamingVAE):
    """See `StreamingVAE`."""

    def __init__(self, config: LTX2Config) -> None:
        super().__init__(config)
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    @staticmethod
    def stream(histories: Sequence[Tensor] | None = None) -> Stream:
        """A clip's start, or its continuation."""
        return Stream(histories)

    def encode_raw(self, video: Tensor, stream: Stream) -> Tensor:
        """Video [B,3,T,H,W] to latents [B,z,F,h,w] before normalization."""
        return self.encoder(patches_of(video, self.config.patch).to(self.encoder.conv_in.conv.weight.dtype), stream)

    def decode_raw(self, raw: Tensor, stream: Stream) -> Tensor:
        """Latents [B,z,F,h,w] before normalization to video [B,3,T,H,W], not clamped."""
        return video_of(self.decoder(raw.to(self.decoder.conv_in.conv.weight.dtype), stream), self.config.patch)


def tail_shapes(config: LTX2Config, height: int, width: int, encoder: bool) -> list[tuple[int, ...]]:
    """Shapes of the tails, in the order of the stream: two frames of every convolution's input, [1,C,2,H,W]."""
    with torch.device("meta"):
        vae, stream = LTX2VAE(config), Stream()
        if encoder:
            encode_step(vae, torch.empty(1, 3, 1, height, width), stream)
        else:
            decode_step(
                vae, torch.empty(1, config.z_channels, 1, height // config.stride[1], width // config.stride[2]), stream
            )
    return [tuple(tail.shape) for tail in stream.new]


@lru_cache
def largest_activation(config: LTX2Config, height: int, width: int) -> int:
    """Elements of the largest tensor that a convolution of the decoder gives for one later latent."""
    sizes: list[int] = []
    with torch.device("meta"):
        vae, stream = LTX2VAE(config), Stream()
        for layer in vae.decoder.modules():
            if isinstance(layer, CausalConv):
                layer.register_forward_hook(lambda layer, given, out: sizes.append(out.numel()))
        latent = torch.empty(1, config.z_channels, 1, height // config.stride[1], width // config.stride[2])
        decode_step(vae, latent, stream)
        sizes.clear()
        decode_step(vae, latent, Stream(stream.new))
    return max(sizes)
