from __future__ import annotations

import math

import torch

from longtake.training.objective.noise import add_noise, grid_sigmas, grid_weights, noise_table, sample_levels


def test_grid_is_the_shifted_schedule() -> None:
    sigmas = grid_sigmas(5.0)
    assert sigmas[0] == 1.0
    assert math.isclose(1000 * float(sigmas[-1]), 4.98, abs_tol=0.01)
    assert math.isclose(float(sigmas[500]), 5 * 0.5 / (1 + 4 * 0.5))
    assert (sigmas.diff() < 0).all()


def test_weights_are_a_bell_that_sums_to_1000() -> None:
    weights = grid_weights(5.0)
    assert math.isclose(float(weights.sum()), 1000.0, rel_tol=1e-12)
    assert float(weights.min()) == 0.0 == float(weights[0])
    peak = 1000 * float(grid_sigmas(5.0)[weights.argmax()])
    assert abs(peak - 500) < 3


def test_timesteps_are_rounded_to_bf16_and_sigma_follows_the_rounded_one() -> None:
    timestep, sigma, _ = noise_table(5.0).unbind(1)
    assert torch.equal(timestep, timestep.bfloat16().float())
    assert set((timestep[(timestep > 512)] % 4).tolist()) == {0.0}
    nearest = (1000 * grid_sigmas(5.0).float()[None] - timestep[:, None]).abs().min(1).values
    assert torch.allclose((1000 * sigma - timestep).abs(), nearest, atol=1e-3)


def test_one_level_a_block_drawn_from_the_generator() -> None:
    draw = lambda: sample_levels((64, 6), 5.0, torch.Generator().manual_seed(3))  # noqa: E731
    levels = draw()
    assert levels.shape == (64, 6, 3) and torch.equal(levels, draw())
    assert (levels[:, 0, 0] != levels[:, 1, 0]).float().mean() > 0.9


def test_uniform_weighting_changes_the_weight_only() -> None:
    bell, uniform = (
        sample_levels((256,), 5.0, torch.Generator().manual_seed(3), weighting) for weighting in ("bell", "uniform")
    )
    assert torch.equal(bell[..., :2], uniform[..., :2])
    assert float(bell[..., 2].min()) < 0.1 and bool((uniform[..., 2] == 1).all())


def test_add_noise_ends() -> None:
    x0, eps = torch.randn(4), torch.randn(4)
    assert torch.equal(add_noise(x0, eps, torch.tensor(0.0)), x0)
    assert torch.equal(add_noise(x0, eps, torch.tensor(1.0)), eps)
