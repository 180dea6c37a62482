"""UniPC: the reference's timesteps, known identities, and agreement with diffusers."""

from __future__ import annotations

import pytest
import torch

from longtake.errors import LongtakeError
from longtake.training.models.sampler import (
    SOLVERS,
    Euler,
    Schedule,
    UniPC,
    flow_sigmas,
    model_timesteps,
    schedule_from,
    schedule_of,
    solver_named,
    unipc_steps,
)


def toy_velocity(x: torch.Tensor, timestep: float) -> torch.Tensor:
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
    solver = UniPC(schedule_of(steps))
    for timestep in timesteps:
        sample = solver.step(toy_velocity(sample, timestep), sample)
        theirs = oracle.step(toy_velocity(theirs, timestep), timestep, theirs).prev_sample
        assert (sample - theirs).abs().max() <= 5e-6


def test_two_steps_are_euler_then_x0() -> None:
    noise = torch.randn(32, generator=torch.Generator().manual_seed(2))
    solver, sample = UniPC(schedule_of(2)), noise
    for step in solver.steps:
        sample = solver.step(toy_velocity(sample, step.timestep), sample)
    first, second, _ = flow_sigmas(2, 5.0)
    middle = noise + (second - first) * toy_velocity(noise, 999)
    expected = middle - second * toy_velocity(middle, 833)
    assert torch.allclose(sample, expected, atol=1e-6)


def test_last_step_returns_exactly_the_x0_prediction() -> None:
    solver, sample = UniPC(schedule_of(5)), torch.randn(8, generator=torch.Generator().manual_seed(3))
    for now in solver.steps:
        before, velocity = sample, toy_velocity(sample, now.timestep)
        sample = solver.step(velocity, before)
    assert torch.equal(sample, before - solver.steps[-1].sigma * velocity)


def test_predictor_orders() -> None:
    """Orders 1, 2, 2, 1 for four steps: an order-1 predictor has no weight on the previous prediction."""
    assert [step.predict[2] != 0 for step in unipc_steps(schedule_of(4))] == [False, True, True, False]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_bad_step_count(steps: int) -> None:
    with pytest.raises(LongtakeError, match="bad number of denoise steps"):
        schedule_of(steps)


# ---- given timesteps, and the table of solvers -----------------------------------------------------------------------


def test_given_timesteps_are_taken_as_they_are_or_shifted() -> None:
    plain = schedule_from((1000, 750, 500, 250))
    assert plain == Schedule((1000, 750, 500, 250), (1.0, 0.75, 0.5, 0.25, 0.0))
    assert schedule_from((1000, 750, 500, 250), 5.0).timesteps == pytest.approx((1000, 937.5, 2500 / 3, 625))
    even, told = schedule_of(4), schedule_from((999, 937, 833, 624))
    assert told.timesteps == even.timesteps and told.sigmas == pytest.approx(even.sigmas, abs=1e-3)


@pytest.mark.parametrize("timesteps", [(), (500, 500), (250, 500), (1001, 500), (500, 0), (float("nan"),), (900, -1)])
def test_bad_timesteps(timesteps: tuple[float, ...]) -> None:
    with pytest.raises(
        LongtakeError, match="(?s)bad timesteps.*expected: numbers that fall from at most 1000 to above 0"
    ):
        schedule_from(timesteps)


def test_euler_is_straight_on_and_ends_at_x0() -> None:
    noise = torch.randn(32, generator=torch.Generator().manual_seed(2))
    solver, sample = Euler(schedule_from((1000, 500))), noise
    middle = solver.step(toy_velocity(sample, 1000), sample)
    assert torch.equal(middle, noise - 0.5 * toy_velocity(noise, 1000))
    assert torch.allclose(solver.step(toy_velocity(middle, 500), middle), middle - 0.5 * toy_velocity(middle, 500))


def test_unipc_of_given_timesteps_agrees_with_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    schedule = schedule_from((980, 800, 620, 410, 150))
    oracle = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, solver_order=2
    )
    oracle.set_timesteps(5)
    oracle.sigmas, oracle.timesteps = torch.tensor(schedule.sigmas), torch.tensor(schedule.timesteps)
    sample = theirs = torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    solver = UniPC(schedule)
    for timestep in oracle.timesteps:
        sample = solver.step(toy_velocity(sample, float(timestep)), sample)
        theirs = oracle.step(toy_velocity(theirs, float(timestep)), timestep, theirs).prev_sample
        assert (sample - theirs).abs().max() <= 5e-6


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_goes_from_noise_to_x0(name: str) -> None:
    """On a field whose velocity is the same everywhere on a line, every solver ends at the clean sample."""
    clean, noise = torch.randn(2, 64, generator=torch.Generator().manual_seed(4))
    solver = solver_named(name)(schedule_from((990, 700, 400)))
    sample = 0.99 * noise + 0.01 * clean
    for _ in range(3):
        before = sample.clone()
        after = solver.step(noise - clean, sample)
        assert torch.equal(sample, before)
        sample = after
    assert torch.allclose(sample, clean, atol=1e-5)


def test_an_unknown_solver_and_a_start_that_unipc_cannot_make() -> None:
    with pytest.raises(LongtakeError, match="unknown solver\n  got: 'ddim'\n  expected: unipc, euler"):
        solver_named("ddim")
    with pytest.raises(
        LongtakeError, match="(?s)UniPC cannot start at pure noise.*fix: pass 999 as the first timestep, or"
    ):
        UniPC(schedule_from((1000, 500)))
