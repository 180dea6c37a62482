"""The VAE: diffusers' decoder and encoder on the same weights, one latent at a time against the whole, and its keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_world import filled
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.training.models.presets import PRESETS
from longtake.training.models.sana_wm.config import LTX2Config
from longtake.training.models.sana_wm.keys import our_vae_key
from longtake.training.models.sana_wm.vae import LTX2VAE, tail_shapes
from longtake.training.models.sana_wm.vae_layers import Stream
from longtake.training.models.streaming_vae import decode_step, encode_step

FULL = LTX2Config(
    4, (8, 8, 16, 16), (8, 16, 32), (1, 2, 1, 1, 1), (1, 1, 2, 1),
    ("spatial", "temporal", "spatiotemporal", "spatiotemporal"), ("spatiotemporal",) * 3,
)  # fmt: skip
SMALL = LTX2Config(4, (4, 8, 8), (8, 16, 32), (1, 1, 1, 1), (1, 1, 1, 1), ("temporal", "spatiotemporal", "spatiotemporal"),
                   ("temporal", "spatiotemporal", "spatiotemporal"), stride=(8, 16, 16))  # fmt: skip


def theirs_of(config: LTX2Config) -> Any:
    diffusers = pytest.importorskip("diffusers")
    levels = len(config.down)
    return diffusers.AutoencoderKLLTX2Video(
        latent_channels=config.z_channels, block_out_channels=config.encoder_widths,
        down_block_types=("LTX2VideoDownBlock3D",) * levels, decoder_block_out_channels=config.decoder_widths,
        layers_per_block=config.encoder_layers, decoder_layers_per_block=config.decoder_layers,
        spatio_temporal_scaling=(True,) * levels, decoder_spatio_temporal_scaling=(True,) * len(config.up),
        decoder_inject_noise=(False,) * (len(config.up) + 1), downsample_type=config.down, upsample_type=config.up,
        upsample_residual=(True,) * len(config.up), upsample_factor=(config.factor,) * len(config.up),
    ).eval()  # fmt: skip


def latents_of(config: LTX2Config, frames: int) -> Tensor:
    return torch.randn(1, frames, config.z_channels, 2, 3, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("config", [FULL, SMALL], ids=["real levels", "one level less"])
def test_it_is_that_of_diffusers(config: LTX2Config) -> None:
    theirs = filled(theirs_of(config))
    vae = LTX2VAE(config).eval()
    vae.load_state_dict({our_vae_key(key): tensor for key, tensor in theirs.state_dict().items()})
    latents = latents_of(config, 3)
    wanted = theirs.decoder(latents.transpose(1, 2))
    got = vae.decode_raw(latents.transpose(1, 2), Stream())
    assert got.shape == wanted.shape == (1, 3, 17, 2 * config.stride[1], 3 * config.stride[2])
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-5
    video = wanted.clamp(-1, 1)
    wanted = theirs.encode(video).latent_dist.mode()
    got = vae.encode(video).transpose(1, 2)
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("config", [FULL, SMALL], ids=["real levels", "one level less"])
def test_one_latent_at_a_time_is_the_whole(config: LTX2Config) -> None:
    vae = filled(LTX2VAE(config).eval())
    latents = latents_of(config, 4)
    whole, parts, tails = vae.decode(latents), [], None
    for latent in latents.split(1, 1):
        frames, tails = vae.decode_chunk(latent, tails)
        parts.append(frames)
    assert [part.shape[2] for part in parts] == [1, 8, 8, 8]
    assert float((torch.cat(parts, 2) - whole).abs().max()) < 2e-5
    again, histories, encoded = vae.encode(whole), None, []
    for group in whole.split([1, 8, 8, 8], 2):
        latent, histories = vae.encode_chunk(group, histories)
        encoded.append(latent)
    assert float((torch.cat(encoded, 1) - again).abs().max()) < 1e-4
    height, width = 2 * config.stride[1], 3 * config.stride[2]
    for encoder, kept in ((False, tails), (True, histories)):
        assert tail_shapes(config, height, width, encoder) == [tuple(tail.shape) for tail in kept or ()]


def test_normalization_is_undone_by_decoding() -> None:
    vae = LTX2VAE(SMALL)
    vae.latent_mean.fill_(0.5)
    vae.latent_std.fill_(2.0)
    frames = torch.zeros(1, 3, 1, 32, 32)
    raw = vae.encode_raw(frames, Stream())
    assert torch.allclose(encode_step(vae, frames, Stream()) * 2 + 0.5, raw, atol=1e-6)
    wanted = vae.decode_raw(raw, Stream()).clamp(-1, 1)
    assert torch.allclose(decode_step(vae, (raw - 0.5) / 2, Stream()), wanted, atol=2e-5)


def test_the_released_one_has_184_keys_and_its_size() -> None:
    with torch.device("meta"):
        vae = LTX2VAE(PRESETS["sana-wm"].vae)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (vae.encoder, vae.decoder)]
    assert [round(size / 1e6) for size in sizes] == [694, 528]


def test_a_clip_of_another_length_or_size_is_refused() -> None:
    vae = LTX2VAE(SMALL)
    with pytest.raises(LongtakeError, match="(?s)frames does not fit the VAE.*1 \\+ a multiple of 8"):
        vae.encode(torch.zeros(1, 3, 8, 32, 32))
    with pytest.raises(LongtakeError, match="(?s)size does not fit the VAE.*multiples of 16x16"):
        vae.encode(torch.zeros(1, 3, 1, 32, 40))
