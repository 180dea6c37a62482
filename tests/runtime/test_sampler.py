"""UniPC: the reference's timesteps, known identities, and agreement with diffusers."""

from __future__ import annotations

import pytest
import torch

from longtake.errors import LongtakeError
from longtake.training.models.sampler import UniPC, flow_sigmas, model_timesteps, sample_chunk, unipc_steps


def toy_velocity(x: torch.Tensor, timestep: int) -> torch.Tensor:
    """A smooth nonlinear field."""
    return torch.sin(1.7 * x + timestep / 300) + 0.3 * x


@pytest.mark.parametrize(
    ("steps", "expected"), [(4, (999, 937, 833, 624)), (3, (999, 908, 713)), (2, (999, 833)), (1, (999,))]
)
def test_timesteps_match_the_reference(steps: int, expected: tuple[int, ...]) -> None:
    assert model_timesteps(steps, 5.0) == expected


def test_sigmas_match_the_reference() -> None:
    assert flow_sigmas(4, 5.0) == pytest.approx((0.99980, 0.93727, 0.83306, 0.62469, 0.0), abs=1e-5)


@pytest.mark.parametrize("steps", range(1, 21))
def test_agrees_with_diffusers(steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    oracle = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, solver_order=2
    )
    oracle.set_timesteps(steps)
    oracle.sigmas = torch.tensor(flow_sigmas(steps, 5.0), dtype=torch.float32)
    timesteps = model_timesteps(steps, 5.0)
    oracle.timesteps = torch.tensor(timesteps)
    sample = theirs = torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    solver = UniPC(steps)
    for timestep in timesteps:
        sample = solver.step(toy_velocity(sample, timestep), sample)
        theirs = oracle.step(toy_velocity(theirs, timestep), timestep, theirs).prev_sample
        assert (sample - theirs).abs().max() <= 5e-6


def test_two_steps_are_euler_then_x0() -> None:
    noise = torch.randn(32, generator=torch.Generator().manual_seed(2))
    first, second, _ = flow_sigmas(2, 5.0)
    middle = noise + (second - first) * toy_velocity(noise, 999)
    expected = middle - second * toy_velocity(middle, 833)
    assert torch.allclose(sample_chunk(noise, 2, toy_velocity), expected, atol=1e-6)


def test_last_step_returns_exactly_the_x0_prediction() -> None:
    solver, sample = UniPC(5), torch.randn(8, generator=torch.Generator().manual_seed(3))
    for now in solver.schedule:
        before, velocity = sample, toy_velocity(sample, now.timestep)
        sample = solver.step(velocity, before)
    assert torch.equal(sample, before - solver.schedule[-1].sigma * velocity)


def test_predictor_orders() -> None:
    """Orders 1, 2, 2, 1 for four steps: an order-1 predictor has no weight on the previous prediction."""
    assert [step.predict[2] != 0 for step in unipc_steps(4)] == [False, True, True, False]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_bad_step_count(steps: int) -> None:
    with pytest.raises(LongtakeError, match="bad number of denoise steps"):
        unipc_steps(steps)
