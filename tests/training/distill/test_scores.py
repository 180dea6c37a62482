"""DMD's gradient and the critic's loss, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from untrained import random_models

from longtake.training.distill.scores import Scorer, critic_loss, dmd_gradient, dmd_loss, draw_levels
from longtake.training.models.presets import Preset
from longtake.training.models.wan.window import window_history
from longtake.training.objective.teacher_forcing import Clips, Noise


def frames(*values: float) -> torch.Tensor:
    """One sample, one value a frame: [1, F, 1, 1, 1]."""
    return torch.tensor(values).reshape(1, -1, 1, 1, 1)


def clips_of(latents: torch.Tensor, chunks: int, given: torch.Tensor | None = None) -> Clips:
    tokens = torch.zeros(len(latents), chunks, 4, dtype=torch.int32)
    return Clips(latents, tokens, window_history([False] * chunks, 4), chunks, given=given)


def test_the_gradient_is_normalized_by_chunk() -> None:
    x, real, fake = frames(1.0, 2.0, 3.0, 4.0), frames(0.0, 0.0, 2.0, 0.0), frames(3.0, 3.0, 4.0, 5.0)
    # Chunk 0: mean |x - real| = (1 + 2) / 2; chunk 1: (1 + 4) / 2.
    wanted = frames(3 / 1.5, 3 / 1.5, 2 / 2.5, 5 / 2.5)
    torch.testing.assert_close(dmd_gradient(x, real, fake, chunks=2), wanted)


def test_given_frames_count_nowhere() -> None:
    x, real, fake = frames(100.0, 2.0, 3.0, 4.0), frames(0.0, 0.0, 2.0, 0.0), frames(3.0, 3.0, 4.0, 5.0)
    counted = torch.tensor([[False, True, True, True]])
    got = dmd_gradient(x, real, fake, 2, counted)
    torch.testing.assert_close(got, frames(0.0, 3 / 2, 2 / 2.5, 5 / 2.5))
    x = x.requires_grad_(True)
    dmd_loss(x, got, counted).backward()
    torch.testing.assert_close(x.grad, got / 3)


def test_a_score_that_agrees_exactly_gives_no_nan() -> None:
    x = frames(1.0, 2.0)
    assert torch.equal(dmd_gradient(x, x, x + 1, 1), torch.zeros_like(x))


def test_the_loss_has_that_gradient() -> None:
    x = frames(1.0, 2.0).requires_grad_(True)
    loss = dmd_loss(x, frames(0.5, -2.0))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.5 * (0.25 + 4.0) / 2)
    torch.testing.assert_close(x.grad, frames(0.25, -1.0))


def test_the_critic_learns_the_flow_of_what_was_generated() -> None:
    video, eps = frames(1.0, 2.0), frames(0.0, 5.0)
    noise = Noise(eps, torch.tensor([[[500.0, 0.5, 1.0]]]))
    velocity = frames(-2.0, 3.0)  # against eps - x = -1, 3
    assert float(critic_loss(velocity, clips_of(video, 1), noise)) == pytest.approx(0.5)
    first_given = torch.tensor([[True, False]])
    assert float(critic_loss(velocity, clips_of(video, 1, first_given), noise)) == 0.0


def test_levels_are_shifted_and_clamped() -> None:
    generator = torch.Generator().manual_seed(0)
    one = draw_levels((512, 3), 5.0, generator, per_block=False)
    assert torch.equal(one[:, 0], one[:, 2]) and one[..., 0].min() >= 20 and one[..., 0].max() == 980
    assert 700 < float(one[..., 0].median()) < 900  # 5 x 0.5 / 3 = 0.833
    torch.testing.assert_close(one[..., 1], one[..., 0] / 1000)
    assert not torch.equal(*draw_levels((512, 2), 5.0, generator, per_block=True).unbind(1))


@pytest.mark.parametrize("context", ["clean", "noisy"])
@torch.no_grad()
def test_guidance_goes_beyond_the_prompted_prediction(context: str, small_preset: Preset) -> None:
    dit, generator = random_models(small_preset).dit, torch.Generator().manual_seed(0)
    shape = (2, 16, small_preset.dit.channels, *small_preset.latent_hw)
    clips = clips_of(torch.randn(shape, generator=generator), 2)
    noise = Noise(torch.randn(shape, generator=generator), draw_levels((2, 2), 5.0, generator, True))
    text = torch.randn(2, 2, small_preset.text.length, small_preset.dit.text_dim, generator=generator)
    nothing, scorer = torch.zeros(small_preset.text.length, small_preset.dit.text_dim), Scorer(small_preset, context)
    c, u = (scorer.x0(dit, rows, clips, noise) for rows in (text, torch.zeros_like(text)))
    got = scorer.guided_x0(dit, text, nothing, clips, noise, 3.0)
    torch.testing.assert_close(got, c + 3.0 * (c - u), rtol=1e-4, atol=1e-4)
