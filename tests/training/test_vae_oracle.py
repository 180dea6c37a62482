"""Our VAE against diffusers' `AutoencoderKLWan` of the Wan 2.2 kind, with the same random weights, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.training.convert.vae_keys import WAN22_LATENT_MEAN, WAN22_LATENT_STD, from_diffusers
from longtake.training.models.checkpoint import copy_state
from longtake.training.models.presets import WAN22_TI2V_5B, VAEConfig
from longtake.training.models.wan.vae import (
    CausalVAE,
    DecoderFirst,
    DecoderSteady,
    Stream,
    VAEEncoderFirst,
    VAEEncoderSteady,
)

CONFIGS = {
    "like the release": VAEConfig(48, 8, 12, (1, 2, 4, 4), 2, (False, True, True)),
    "one block, odd widths": VAEConfig(16, 8, 8, (2, 1, 2, 1), 1, (False, True, True)),
    "time first": VAEConfig(4, 4, 8, (1, 2, 2, 2), 2, (True, True, False)),
}
FRAMES, LATENTS = 17, 5


@dataclass
class Pair:
    """Both models with the same weights, a clip, its latents' means and the latents' decoded frames, all diffusers'."""

    ours: CausalVAE
    state: dict[str, Tensor]
    video: Tensor
    latents: Tensor
    frames: Tensor


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture(scope="module", params=list(CONFIGS), ids=str)
@torch.no_grad()
def pair(request: pytest.FixtureRequest) -> Pair:
    from diffusers import AutoencoderKLWan

    config = CONFIGS[request.param]
    torch.manual_seed(0)
    theirs = AutoencoderKLWan(
        base_dim=config.encoder_dim, decoder_base_dim=config.decoder_dim, z_dim=config.z_channels,
        dim_mult=list(config.dim_mult), num_res_blocks=config.res_blocks, temperal_downsample=list(config.temporal_down),
        latents_mean=[0.0] * config.z_channels, latents_std=[1.0] * config.z_channels,
        is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16,
    ).eval()  # fmt: skip
    for name, weight in theirs.named_parameters():
        if name.endswith("gamma"):
            weight.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            weight.normal_(std=0.05)
    ours = CausalVAE(config).eval().requires_grad_(False)
    statistics = {"latent_mean": torch.zeros(config.z_channels), "latent_std": torch.ones(config.z_channels)}
    copy_state(ours, from_diffusers(theirs.state_dict()) | statistics, "diffusers' weights")
    video = torch.rand(1, 3, FRAMES, 32, 64) * 2 - 1
    latents = theirs.encode(video).latent_dist.mode()
    return Pair(ours, theirs.state_dict(), video, latents, theirs.decode(latents).sample)


def test_the_oracle_shows_differences(pair: Pair) -> None:
    """Frames that were mostly clamped, or latents near zero, would hide errors."""
    assert pair.latents.shape == (1, pair.ours.config.z_channels, LATENTS, 2, 4)
    assert (pair.frames.abs() < 1).float().mean() > 0.9
    assert pair.frames[:, :, 1:].std() > 0.01 and pair.latents.std() > 0.01
    assert pair.frames.diff(dim=2).abs().max() > 1e-3


@torch.no_grad()
def test_whole_clip(pair: Pair) -> None:
    assert relative(pair.ours.encode(pair.video).transpose(1, 2), pair.latents) < 1e-5
    assert relative(pair.ours.decode(pair.latents.transpose(1, 2)), pair.frames) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("in_place", [False, True])
def test_one_latent_at_a_time(pair: Pair, in_place: bool) -> None:
    """Through the modules that engines are made of; in place, the caches never move."""
    first, steady = VAEEncoderFirst(pair.ours), VAEEncoderSteady(pair.ours, in_place)
    latents = stream(first, steady, pair.video.split([1, 4, 4, 4, 4], 2), in_place)
    assert relative(torch.cat(latents, 2), pair.latents) < 1e-5
    frames = stream(DecoderFirst(pair.ours), DecoderSteady(pair.ours, in_place), pair.latents.split(1, 2), in_place)
    assert relative(torch.cat(frames, 2), pair.frames) < 1e-5


Step = Callable[..., tuple[Tensor, ...]]


def stream(first: Step, steady: Step, parts: tuple[Tensor, ...], in_place: bool) -> list[Tensor]:
    """The outputs of one step a part."""
    out, *caches = first(parts[0])
    caches, outputs = [cache.clone() for cache in caches], [out]
    for part in parts[1:]:
        out, *new = steady(part, *caches)
        assert all((a is b) == in_place for a, b in zip(new, caches, strict=True))
        caches = new
        outputs.append(out)
    return outputs


@torch.no_grad()
def test_every_weight_matters(pair: Pair) -> None:
    """A weight that a mistake in the key map left unused would pass every other test here."""
    pair.ours.requires_grad_(True)
    with torch.enable_grad():
        raw = pair.ours.encode_raw(pair.video, Stream())
        pair.ours.decode_raw(raw, Stream()).square().sum().backward()
    idle = [n for n, p in pair.ours.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    pair.ours.requires_grad_(False).zero_grad()
    assert idle == []


def test_shapes_of_the_release() -> None:
    """Keys of the released sizes, on the meta device: the map is onto, and the decoder has 555 M weights."""
    from diffusers import AutoencoderKLWan

    config = WAN22_TI2V_5B.vae
    with torch.device("meta"):
        theirs = AutoencoderKLWan(
            base_dim=160, decoder_base_dim=256, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
            temperal_downsample=[False, True, True], latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
            is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16,
        )  # fmt: skip
        ours = CausalVAE(config)
    shapes = {name: tensor.shape for name, tensor in from_diffusers(theirs.state_dict()).items()}
    wanted = {name: tensor.shape for name, tensor in ours.state_dict().items() if not name.startswith("latent_")}
    assert shapes == wanted
    assert round(sum(p.numel() for p in ours.decoder.parameters()) / 1e6) == 555
    assert len(WAN22_LATENT_MEAN) == len(WAN22_LATENT_STD) == config.z_channels and min(WAN22_LATENT_STD) > 0


def test_another_wan_vae_is_refused(pair: Pair) -> None:
    state = dict(pair.state)
    state["encoder.conv_in.weight"] = torch.zeros(8, 3, 3, 3, 3)
    with pytest.raises(LongtakeError, match="not of the Wan 2.2 kind") as caught:
        from_diffusers(state)
    assert "encoder.conv_in.conv.weight with shape [8, 3, 3, 3, 3]" in str(caught.value)
