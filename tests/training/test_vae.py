from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.training.data.digits import Digits
from longtake.training.models.presets import PRESETS, TINY, Preset
from longtake.training.models.wan.spec import vae_spec
from longtake.training.models.wan.vae import (
    CausalVAE,
    DecoderFirst,
    DecoderSteady,
    Stream,
    VAEEncoderFirst,
    VAEEncoderSteady,
)
from longtake.training.models.wan.vae_caches import decoder_cache_shapes, encoder_cache_shapes

FRAMES = 29  # 8 latents
Models = tuple[CausalVAE, Tensor, Tensor]


@pytest.fixture(scope="module")
def models() -> Models:
    """An untrained VAE with a made-up normalization, a clip, and its latents."""
    torch.manual_seed(0)
    vae = CausalVAE(TINY.vae).eval().requires_grad_(False)
    vae.latent_mean.normal_(std=0.05)
    vae.latent_std.uniform_(0.05, 0.2)
    video = Digits(TINY).clips(torch.Generator().manual_seed(0), FRAMES, 1, torch.device("cpu"))
    return vae, video, vae.encode(video)


@pytest.fixture(scope="module")
def decoded(models: Models) -> Tensor:
    vae, _, latents = models
    video = vae.decode(latents)
    assert (video.abs() < 1).float().mean() > 0.9  # hardly anything is clamped: differences show
    return video


def test_shapes(models: Models, decoded: Tensor) -> None:
    _, video, latents = models
    assert latents.shape == (1, 8, 16, 8, 8) and latents.dtype == torch.float32
    assert decoded.shape == video.shape == (1, 3, FRAMES, 128, 128)


def test_encoding_in_chunks_is_encoding_the_whole(models: Models) -> None:
    vae, video, latents = models
    start, histories = vae.encode_chunk(video[:, :, :9])
    middle, histories = vae.encode_chunk(video[:, :, 9:13], histories)
    end, _ = vae.encode_chunk(video[:, :, 13:], histories)
    torch.testing.assert_close(torch.cat([start, middle, end], 1), latents, rtol=0, atol=2e-5)


def test_decoding_latent_by_latent_is_decoding_the_whole(models: Models, decoded: Tensor) -> None:
    """Through the two networks that engines are made of."""
    vae, _, latents = models
    first, steady = DecoderFirst(vae), DecoderSteady(vae)
    frames, *caches = first(latents[:, :1].transpose(1, 2))
    parts = [frames]
    for number in range(1, 8):
        frames, *caches = steady(latents[:, number : number + 1].transpose(1, 2), *caches)
        assert frames.shape == (1, 3, 4, 128, 128)
        parts.append(frames)
    torch.testing.assert_close(torch.cat(parts, 2), decoded, rtol=0, atol=2e-5)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
@torch.no_grad()
def test_steps_of_several_latents(models: Models, count: int, in_place: bool) -> None:
    """A step of n latents is n steps of one, caches included, whose shapes don't depend on n."""
    vae, _, latents = models
    one, many = DecoderSteady(vae), DecoderSteady(vae, in_place)
    latents = torch.cat([latents, latents[:, :1]], 1)[:, :, :, :4, :4].transpose(1, 2)
    _, *caches = DecoderFirst(vae)(latents[:, :, :1])
    ours = [cache.clone() for cache in caches]
    addresses = [cache.data_ptr() for cache in ours]
    for part in latents[:, :, 1:].split(count, 2):
        frames, *ours = many(part, *ours)
        wanted = []
        for latent in part.split(1, 2):
            alone, *caches = one(latent, *caches)
            wanted.append(alone)
        torch.testing.assert_close(frames, torch.cat(wanted, 2), rtol=0, atol=2e-5)
    for got, cache in zip(ours, caches, strict=True):
        torch.testing.assert_close(got, cache, rtol=1e-4, atol=2e-5)
    assert ([cache.data_ptr() for cache in ours] == addresses) == in_place


@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_encoding_step_by_step_is_encoding_the_whole(models: Models, groups: int) -> None:
    """Through the two networks that engines are made of."""
    vae, video, latents = models
    latent, *caches = VAEEncoderFirst(vae)(video[:, :, :1])
    assert [tuple(cache.shape) for cache in caches] == encoder_cache_shapes(TINY)
    parts = [latent]
    for frames in video[:, :, 1:17].split(4 * groups, 2):
        latent, *caches = VAEEncoderSteady(vae)(frames, *caches)
        assert latent.shape == (1, 16, groups, 8, 8)
        parts.append(latent)
    torch.testing.assert_close(torch.cat(parts, 2).transpose(1, 2), latents[:, :5], rtol=0, atol=2e-5)


def test_decoding_in_chunks_is_decoding_the_whole(models: Models, decoded: Tensor) -> None:
    vae, _, latents = models
    start, histories = vae.decode_chunk(latents[:, :3])
    end, _ = vae.decode_chunk(latents[:, 3:], histories)
    torch.testing.assert_close(torch.cat([start, end], 2), decoded, rtol=0, atol=2e-5)


def test_the_past_does_not_depend_on_the_future(models: Models, decoded: Tensor) -> None:
    vae, video, latents = models
    torch.testing.assert_close(vae.encode(video[:, :, :13]), latents[:, :4], rtol=0, atol=2e-5)
    torch.testing.assert_close(vae.decode(latents[:, :4]), decoded[:, :, :13], rtol=0, atol=2e-5)
    torch.testing.assert_close(vae.encode(video[:, :, :1]), latents[:, :1], rtol=0, atol=2e-5)
    later = latents.clone()
    later[:, 4:] += 1
    changed = vae.decode(later) - decoded
    assert changed[:, :, :13].abs().max() < 2e-5 < 1e-3 < changed[:, :, 13:].abs().max()


def test_each_frame_depends_on_the_frames_before_it(models: Models, decoded: Tensor) -> None:
    vae, _, latents = models
    earlier = latents.clone()
    earlier[:, 3] += 1
    assert (vae.decode(earlier) - decoded)[:, :, 13:17].abs().max() > 1e-4


def test_normalization_is_inside(models: Models) -> None:
    vae, video, latents = models
    raw = vae.encode_raw(video[:, :, :5], Stream()).transpose(1, 2)
    wanted = (raw - vae.latent_mean.view(-1, 1, 1)) / vae.latent_std.view(-1, 1, 1)
    torch.testing.assert_close(wanted, latents[:, :2], rtol=1e-4, atol=1e-4)


def test_networks_have_the_shapes_of_the_engine_spec(models: Models) -> None:
    vae, _, latents = models
    caches: list[Tensor] = []
    for name, module in (("vae_first", DecoderFirst(vae)), ("vae_steady", DecoderSteady(vae))):
        spec = vae_spec(TINY, name)
        inputs = [latents[:, :1].transpose(1, 2), *caches]
        assert [tuple(tensor.shape) for tensor in inputs] == [binding.shape for binding in spec.inputs]
        frames, *caches = module(*inputs)
        assert [tuple(tensor.shape) for tensor in (frames, *caches)] == [binding.shape for binding in spec.outputs]
        assert [tuple(cache.shape) for cache in caches] == decoder_cache_shapes(TINY)


@pytest.mark.parametrize(
    "preset", [preset for preset in PRESETS.values() if preset.family == "wan"], ids=lambda preset: preset.name
)
def test_the_caches_of_every_preset_are_those_that_its_modules_return(preset: Preset) -> None:
    with torch.device("meta"):
        vae = CausalVAE(preset.vae)
        latent = torch.empty(1, preset.vae.z_channels, 1, *preset.latent_hw)
        frame = torch.empty(1, 3, 1, preset.height, preset.width)
        decoded, ops, encoded = (
            DecoderFirst(vae)(latent),
            DecoderFirst(vae, ops=True)(latent),
            VAEEncoderFirst(vae)(frame),
        )
    assert [tuple(cache.shape) for cache in decoded[1:]] == decoder_cache_shapes(preset)
    assert [tuple(cache.shape) for cache in ops[1:]] == decoder_cache_shapes(preset, ops=True)
    assert [tuple(cache.shape) for cache in encoded[1:]] == encoder_cache_shapes(preset)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 28, 128, 128), r"number of frames does not fit the VAE\n  got: 28\n  expected: 1 \+ a multiple of 4"),
        ((1, 3, 0, 128, 128), r"got: 0\n"),
        ((1, 3, 5, 120, 128), r"frame size does not fit the VAE\n  got: 128x120\n  expected: multiples of 16x16"),
        ((1, 3, 5, 128, 100), r"got: 100x128"),
    ],
)
def test_clips_that_do_not_fit(models: Models, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(LongtakeError, match=message) as caught:
        models[0].encode(torch.zeros(shape))
    assert "fix:" in str(caught.value)


@pytest.mark.parametrize("frames", [0, 3, 5])
def test_later_chunks_that_do_not_fit(models: Models, frames: int) -> None:
    vae, video, _ = models
    _, histories = vae.encode_chunk(video[:, :, :1])
    with pytest.raises(LongtakeError, match=rf"got: {frames}\n  expected: a multiple of 4"):
        vae.encode_chunk(torch.zeros(1, 3, frames, 128, 128), histories)
