"""The training noise grid: shifted flow sigmas, bf16 timesteps and loss weights.

x_t = (1 - sigma) x0 + sigma eps; the network predicts v = eps - x0; timesteps are 1000 sigma.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

GRID = 1000
WEIGHTINGS = ("bell", "uniform")


@cache
def grid_sigmas(shift: float) -> Tensor:
    """sigma_i = shift s / (1 + (shift - 1) s) with s = 1 - i/1000: falling, fp64 [1000]."""
    s = 1 - torch.arange(GRID, dtype=torch.float64) / GRID
    return shift * s / (1 + (shift - 1) * s)


@cache
def grid_weights(shift: float) -> Tensor:
    """Loss weight of each grid point: a bell around t = 500 that is 0 at the far end and sums to 1000, fp64 [1000]."""
    bell = torch.exp(-2 * ((GRID * grid_sigmas(shift) - GRID / 2) / GRID) ** 2)
    return (bell - bell.min()) * GRID / (bell - bell.min()).sum()


@cache
def noise_table(shift: float) -> Tensor:
    """Columns (timestep rounded to bf16, sigma nearest to that timestep, loss weight) of each grid point, fp32 [1000, 3].

    The network is told the rounded timestep, and sigma and weight are looked up from it, so grid points that round
    to the same timestep share all three. At equal distance the earlier (noisier) grid point counts.
    """
    timesteps = (GRID * grid_sigmas(shift)).float()
    rounded = timesteps.bfloat16().float()
    nearest = (timesteps[None, :] - rounded[:, None]).abs().argmin(1)
    return torch.stack((rounded, grid_sigmas(shift)[nearest].float(), grid_weights(shift)[nearest].float()), dim=1)


def sample_levels(shape: tuple[int, ...], shift: float, generator: torch.Generator, weighting: str = "bell") -> Tensor:
    """Noise levels (timestep, sigma, weight), uniform over the grid: fp32 [*shape, 3] on the generator's device.

    weighting: "bell" is the reference's, nearly 0 where there is almost only noise; "uniform" is 1 everywhere. A model
    trained from random weights learns what a prompt decides in the first sampling steps much sooner with the latter.
    """
    index = torch.randint(0, GRID, shape, generator=generator, device=generator.device)
    levels = _noise_table_on(shift, str(generator.device))[index]
    if weighting == "uniform":
        levels[..., 2] = 1.0
    return levels


@cache
def _noise_table_on(shift: float, device: str) -> Tensor:
    return noise_table(shift).to(device)


def add_noise(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma eps; sigma broadcasts."""
    return (1 - sigma) * x0 + sigma * eps
