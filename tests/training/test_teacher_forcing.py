"""Image to video, the loss mask and gradient checkpointing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from longtake.training.models.presets import Preset
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.models.wan.window import full_history
from longtake.training.objective.noise import add_noise
from longtake.training.objective.teacher_forcing import (
    Clips,
    Noise,
    draw_noise,
    flow_loss,
    noisy_part,
    predict_velocity,
)

CHUNKS = 3


@pytest.fixture
def clips(small_preset: Preset) -> Clips:
    torch.manual_seed(0)
    frames = CHUNKS * small_preset.chunk_latents
    latents = torch.randn(2, frames, small_preset.dit.channels, *small_preset.latent_hw)
    return Clips(latents, torch.zeros(2, CHUNKS, 1, dtype=torch.int32), full_history(CHUNKS), CHUNKS)


@pytest.fixture
def dit(small_preset: Preset) -> CausalDiT:
    torch.manual_seed(1)
    dit = CausalDiT(small_preset.dit)
    nn.init.xavier_uniform_(dit.head.head.weight)
    return dit


@pytest.fixture
def noise(clips: Clips) -> Noise:
    return draw_noise(clips, 5.0, torch.Generator().manual_seed(1))


def embeddings(preset: Preset) -> Tensor:
    return torch.randn(2, CHUNKS, preset.dit.text_len, preset.dit.text_dim, generator=torch.Generator().manual_seed(2))


def first_of(clips: Clips, *samples: bool) -> Tensor:
    given = torch.zeros(clips.latents.shape[:2], dtype=torch.bool)
    given[:, 0] = torch.tensor(samples)
    return given


def test_a_given_frame_is_clean_at_timestep_0_and_not_in_the_loss(
    small_preset: Preset, clips: Clips, noise: Noise
) -> None:
    i2v = replace(clips, given=first_of(clips, True, False))
    noisy, timesteps = noisy_part(i2v, noise)
    assert torch.equal(noisy[0, 0], clips.latents[0, 0]) and timesteps[0, 0] == 0
    plain, levels = noisy_part(clips, noise)
    assert torch.equal(noisy[0, 1:], plain[0, 1:]) and torch.equal(noisy[1], plain[1])
    assert torch.equal(timesteps[0, 1:], levels[0, 1:]) and torch.equal(timesteps[1], levels[1]) and levels[1, 0] > 0
    velocity = torch.randn_like(clips.latents)
    before = flow_loss(velocity, i2v, noise)
    velocity[0, 0] = 1e6
    assert all(torch.equal(a, b) for a, b in zip(flow_loss(velocity, i2v, noise), before))
    velocity[1, 0] = 1e6
    assert float(flow_loss(velocity, i2v, noise)[1]) > 1e6


def test_image_to_video_sees_its_picture(small_preset: Preset, clips: Clips, noise: Noise, dit: CausalDiT) -> None:
    """The first chunk has no clean history: what it knows of the picture comes from the given frame."""
    text = embeddings(small_preset)
    other = replace(clips, latents=clips.latents.clone())
    other.latents[:, 0] += 1.0
    runs = {}
    for name, given in (("t2v", None), ("i2v", first_of(clips, True, True))):
        outs = []
        for each in (clips, other):
            kept = replace(noise, eps=noise.eps.clone())
            if given is None:  # the same noisy latents, whatever the picture
                kept = replace(kept, start=clips.latents)
            with torch.no_grad():
                outs.append(predict_velocity(dit, small_preset, text, replace(each, given=given), kept)[:, 1:8])
        runs[name] = float((outs[0] - outs[1]).norm() / outs[0].norm())
    assert runs["t2v"] == 0 and runs["i2v"] > 1e-3


def test_masked_loss_is_the_sum_over_valid_frames_by_their_count(clips: Clips, noise: Noise) -> None:
    valid = torch.ones(clips.latents.shape[:2], dtype=torch.bool)
    valid[0, 10:], valid[1, 20:] = False, False
    velocity = torch.randn_like(clips.latents)
    weighted, plain = flow_loss(velocity, replace(clips, valid=valid), noise)
    errors = (velocity - (noise.eps - clips.latents)).double().square().mean((2, 3, 4))
    weights = noise.levels[..., 2].double()
    total = sum(errors[b, f] * weights[b, f // 8] for b, frames in ((0, 10), (1, 20)) for f in range(frames))
    assert torch.isclose(weighted.double(), total / 30, rtol=1e-5)
    assert torch.isclose(plain.double(), (errors[0, :10].sum() + errors[1, :20].sum()) / 30, rtol=1e-5)
    both = replace(clips, valid=valid, given=first_of(clips, True, True))
    assert torch.isclose(
        flow_loss(velocity, both, noise)[1].double(), (errors[0, 1:10].sum() + errors[1, 1:20].sum()) / 28, rtol=1e-5
    )
    everything = flow_loss(velocity, replace(clips, valid=torch.ones_like(valid)), noise)
    assert torch.allclose(torch.stack(everything), torch.stack(flow_loss(velocity, clips, noise)), rtol=1e-5)


def test_padding_may_hold_anything(clips: Clips, noise: Noise) -> None:
    valid = torch.ones(clips.latents.shape[:2], dtype=torch.bool)
    valid[:, 16:] = False
    velocity = torch.randn_like(clips.latents).requires_grad_()
    spoilt = velocity.detach().clone()
    spoilt[:, 16:] = float("nan")
    masked = replace(clips, valid=valid)
    assert all(torch.equal(a, b) for a, b in zip(flow_loss(spoilt, masked, noise), flow_loss(velocity, masked, noise)))
    flow_loss(velocity, masked, noise)[0].backward()
    assert not velocity.grad[:, 16:].any() and velocity.grad[:, :16].ne(0).float().mean() > 0.99
    nothing = flow_loss(velocity, replace(clips, valid=torch.zeros_like(valid)), noise)
    assert float(nothing[0]) == float(nothing[1]) == 0.0


def test_start_and_context_replace_what_is_noised_and_what_is_seen(
    small_preset: Preset, clips: Clips, noise: Noise, dit: CausalDiT
) -> None:
    text, error = embeddings(small_preset), torch.randn_like(clips.latents)
    moved = replace(noise, start=clips.latents + error)
    sigma = noise.levels[..., 1].repeat_interleave(8, 1)[..., None, None, None]
    assert torch.equal(noisy_part(clips, moved)[0], add_noise(clips.latents + error, noise.eps, sigma))
    velocity = torch.randn_like(clips.latents)
    assert all(torch.equal(a, b) for a, b in zip(flow_loss(velocity, clips, moved), flow_loss(velocity, clips, noise)))
    with torch.no_grad():
        plain = predict_velocity(dit, small_preset, text, clips, noise)
        same = predict_velocity(dit, small_preset, text, clips, replace(noise, context=clips.latents))
        other = predict_velocity(dit, small_preset, text, clips, replace(noise, context=clips.latents + error))
    assert torch.equal(plain, same)
    assert torch.equal(plain[:, :8], other[:, :8]) and not torch.allclose(plain[:, 8:], other[:, 8:], atol=1e-3)


def test_checkpointed_loss_and_gradients_are_equal(
    small_preset: Preset, clips: Clips, noise: Noise, dit: CausalDiT
) -> None:
    text, results = embeddings(small_preset), []
    for dit.checkpointing in (False, True):
        dit.zero_grad()
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):  # noqa: B023
            loss, _ = flow_loss(predict_velocity(dit, small_preset, text, clips, noise), clips, noise)
        loss.backward()
        results.append((float(loss), {n: p.grad.clone() for n, p in dit.named_parameters()}, sum(kept)))
    (loss, grads, kept_all), (loss_again, grads_again, kept_few) = results
    assert loss == loss_again and all(torch.equal(grads[name], grads_again[name]) for name in grads)
    assert kept_few < 0.5 * kept_all
