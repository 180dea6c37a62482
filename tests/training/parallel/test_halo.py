from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.training.models.presets import TINY, WAN22_TI2V_5B, VAEConfig
from longtake.training.models.wan.vae import CausalVAE
from longtake.training.models.wan.vae_layers import Stream
from longtake.training.parallel.halo import (
    Window,
    encode_window,
    encoded,
    evened,
    halo_needed,
    share,
    window_of,
)

# One block and two, with and without what the released VAE has: the look-back differs
NARROW = replace(TINY.vae, z_channels=4, encoder_dim=4, decoder_dim=4, dim_mult=(1, 1, 1, 1))
RELEASED = replace(WAN22_TI2V_5B.vae, z_channels=4, encoder_dim=4, decoder_dim=4, dim_mult=(1, 1, 1, 1))

REFERENCE_HALO = 28  # what LongLive takes for the Wan 2.2 VAE, one more than its structure needs


def encode_share(vae: CausalVAE, video: Tensor, ranks: int, rank: int, halo: int | None = None) -> Tensor:
    """The latents that are `rank`'s, [B, F / ranks, C, h, w], of video [B, 3, T, H, W] in [-1, 1].

    Args:
        halo: latents to encode before them; None: `halo_needed`.
    """
    stride = vae.config.stride[0]
    latents = 1 + (video.shape[2] - 1) // stride
    start, stop = share(latents, ranks, rank)
    window = window_of(start, stop, halo_needed(vae.config) if halo is None else halo, stride)
    return encode_window(vae, video[:, :, window.start : window.stop], window)


def vae_of(config: VAEConfig) -> CausalVAE:
    torch.manual_seed(0)
    return CausalVAE(config).eval().double()


def test_the_windows_are_the_reference_s() -> None:
    """96 latents on 4 ranks with a halo of 28: the worked example of the reference."""
    windows = [window_of(*share(96, 4, rank), 28) for rank in range(4)]
    assert windows == [Window(0, 93, 0), Window(0, 189, 24), Window(76, 285, 29), Window(172, 381, 29)]


def test_the_wan_vae_needs_one_latent_less_than_the_reference_takes() -> None:
    assert halo_needed(WAN22_TI2V_5B.vae) == 27


@pytest.mark.parametrize("config", [NARROW, RELEASED], ids=["tiny", "released"])
def test_the_needed_halo_is_how_far_a_latent_looks_back(config: VAEConfig) -> None:
    """The first pixel frame that a latent's gradient reaches lies in the window of the needed halo, and only of that."""
    vae, halo = vae_of(config), halo_needed(config)
    latent = halo + 3
    video = (torch.rand(1, 3, 1 + 4 * latent, 16, 16, dtype=torch.float64) * 2 - 1).requires_grad_()
    vae.encode_raw(video, Stream())[:, :, latent].sum().backward()
    assert video.grad is not None
    first = int(video.grad.abs().amax((0, 1, 3, 4)).nonzero()[0])
    assert window_of(latent, latent + 1, halo).start <= first < window_of(latent, latent + 1, halo - 1).start


@pytest.mark.parametrize("config", [NARROW, RELEASED], ids=["tiny", "released"])
@torch.no_grad()
def test_a_window_with_the_needed_halo_gives_the_whole_clip_s_latents_and_with_little_does_not(
    config: VAEConfig,
) -> None:
    vae, halo = vae_of(config), halo_needed(config)
    latents = halo + 8
    video = torch.rand(1, 3, 1 + 4 * (latents - 1), 16, 16, dtype=torch.float64) * 2 - 1
    whole = vae.encode(video)
    keep = (latents - 4, latents)
    for used, equal in ((halo, True), (max(halo, REFERENCE_HALO), True), (2, False)):
        window = window_of(*keep, used)
        got = encode_window(vae, video[:, :, window.start : window.stop], window)
        assert got.shape == whole[:, keep[0] :].shape
        error = float((got - whole[:, keep[0] :]).abs().max() / whole.abs().max())
        assert error <= 1e-6 if equal else error > 1e-3, (used, error)


@torch.no_grad()
def test_the_shares_of_all_ranks_are_the_clip() -> None:
    vae = vae_of(NARROW)
    video = torch.rand(1, 3, 1 + 4 * 31, 16, 16, dtype=torch.float64) * 2 - 1
    whole = vae.encode(video)
    for ranks in (2, 4):
        parts = torch.cat([encode_share(vae, video, ranks, rank) for rank in range(ranks)], 1)
        assert torch.allclose(parts, whole, atol=1e-6)


def test_a_clip_that_can_t_be_cut_evenly_is_named() -> None:
    with pytest.raises(LongtakeError, match="10 latents for 4 ranks"):
        share(10, 4, 0)


@pytest.mark.parametrize("latents", [7, 30, 96, 192])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_evened_shares_cover_the_clip_and_cost_no_more_than_equal_ones(latents: int, ranks: int) -> None:
    bounds = evened(latents, ranks, 27)
    assert len(bounds) == ranks and bounds[0][0] == 0 and bounds[-1][1] == latents
    assert all(one[1] == other[0] for one, other in zip(bounds, bounds[1:]))
    costs = [encoded(*bound, 27) for bound in bounds]
    assert max(costs) <= latents
    if latents % ranks == 0:
        assert max(costs) <= max(encoded(*share(latents, ranks, rank), 27) for rank in range(ranks))


def test_two_ranks_share_16_seconds_evenly() -> None:
    assert [encoded(*bound, 27) for bound in evened(96, 2, 27)] == [62, 62]
