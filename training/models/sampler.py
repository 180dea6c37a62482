"""UniPC (order 2, bh2, x0 prediction, corrector) as tables of coefficients.

Every step is a linear combination of tensors, so its coefficients are worked out once on the host in float64 and a
step is a few multiply-adds on any device, in float32. Notation, for step i of N with flow sigmas:
x_i the sample given to the model, v_i its velocity, m_i = x_i - sigma_i v_i the x0 prediction, c_i the corrected sample.

    c_i     = C0 c_{i-1} + C1 m_i + C2 m_{i-1} + C3 m_{i-2}      (i >= 1; c_0 = x_0)
    x_{i+1} = P0 c_i     + P1 m_i + P2 m_{i-1}

Source of the formulas: Zhao et al., "UniPC" (2023), as LongLive 2.0 uses it for flow matching with shift 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from longtake.errors import LongtakeError

# The training grid is 1 - k/1000 in float32; its largest entry starts the schedule.
SIGMA_MAX = float(np.float32(0.999))


@dataclass(frozen=True)
class Step:
    """Coefficients of one solver step. `timestep` is what the model is told, `sigma` what the solver uses."""

    timestep: int
    sigma: float
    correct: tuple[float, float, float, float] | None
    predict: tuple[float, float, float]


def flow_sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """The N + 1 shifted sigmas, float32-rounded, ending in 0."""
    raw = np.linspace(SIGMA_MAX, 0.0, steps + 1)[:-1]
    return (*(float(np.float32(s)) for s in shift * raw / (1 + (shift - 1) * raw)), 0.0)


def model_timesteps(steps: int, shift: float) -> tuple[int, ...]:
    """Integer timesteps told to the model: 1000 sigma, truncated (999, 937, 833, 624 for four steps, shift 5)."""
    raw = np.linspace(SIGMA_MAX, 0.0, steps + 1)[:-1]
    return tuple(int(1000 * s) for s in shift * raw / (1 + (shift - 1) * raw))


def _log_snr(sigma: float) -> float:
    return math.inf if sigma == 0 else math.log((1 - sigma) / sigma)


def _corrector(sigmas: tuple[float, ...], i: int, order: int) -> tuple[float, float, float, float]:
    """Coefficients of (c_{i-1}, m_i, m_{i-1}, m_{i-2}) in c_i."""
    before, now = sigmas[i - 1], sigmas[i]
    h = _log_snr(now) - _log_snr(before)
    hh, alpha = -h, 1 - now
    phi = math.expm1(hh)
    if order == 1:
        weight, last, ratio = 0.0, 0.5, 1.0
    else:
        ratio = (_log_snr(sigmas[i - 2]) - _log_snr(before)) / h
        b0 = (phi / hh - 1) / phi
        b1 = 2 * ((phi / hh - 1) / hh - 0.5) / phi
        weight, last = (b0 - b1) / (1 - ratio), (b1 - ratio * b0) / (1 - ratio)
    scale = -alpha * phi
    return (now / before, scale * last, scale * (1 - last - weight / ratio), scale * weight / ratio)


def _predictor(sigmas: tuple[float, ...], i: int, order: int) -> tuple[float, float, float]:
    """Coefficients of (c_i, m_i, m_{i-1}) in x_{i+1}."""
    now, after = sigmas[i], sigmas[i + 1]
    if after == 0:
        return (0.0, 1.0, 0.0)  # the limit: exactly the x0 prediction
    h = _log_snr(after) - _log_snr(now)
    scale = -(1 - after) * math.expm1(-h)
    if order == 1:
        return (after / now, scale, 0.0)
    ratio = (_log_snr(sigmas[i - 1]) - _log_snr(now)) / h
    return (after / now, scale * (1 - 0.5 / ratio), scale * 0.5 / ratio)


@cache
def unipc_steps(steps: int, shift: float = 5.0) -> tuple[Step, ...]:
    """The solver's schedule for `steps` model calls. Raises LongtakeError for a count outside 1..1000."""
    if not 1 <= steps <= 1000:
        raise LongtakeError("bad number of denoise steps", got=steps, expected="1 to 1000", fix="pass --steps 16")
    sigmas, timesteps = flow_sigmas(steps, shift), model_timesteps(steps, shift)
    orders = [min(2, steps - i, i + 1) for i in range(steps)]
    return tuple(
        Step(
            timestep=timesteps[i],
            sigma=sigmas[i],
            correct=_corrector(sigmas, i, orders[i - 1]) if i else None,
            predict=_predictor(sigmas, i, orders[i]),
        )
        for i in range(steps)
    )


class Solver(Protocol):
    """How a chunk gets from noise to latents: what the model is told before each step, and what its velocity makes of a
    sample. UniPC is one; a flow-Euler solver over a given list of timesteps is another."""

    @property
    def timesteps(self) -> tuple[int, ...]:
        """0..1000, one a model call."""
        ...

    def step(self, velocity: Tensor, sample: Tensor) -> Tensor:
        """The next sample, fp32, from this step's `velocity` and `sample` (fp32, same shape). Inputs are kept intact."""
        ...


class UniPC:
    """Solver state of one chunk. Feed it each velocity in turn; after the last step it returns the x0 prediction."""

    def __init__(self, steps: int, shift: float = 5.0) -> None:
        self.schedule = unipc_steps(steps, shift)
        self._index = 0
        self._corrected: Tensor | None = None
        self._predictions: list[Tensor] = []

    @property
    def timesteps(self) -> tuple[int, ...]:
        """See Solver.timesteps."""
        return tuple(step.timestep for step in self.schedule)

    def step(self, velocity: Tensor, sample: Tensor) -> Tensor:
        """The next sample, fp32, from this step's `velocity` and `sample` (fp32, same shape). Inputs are kept intact."""
        now = self.schedule[self._index]
        prediction = sample - now.sigma * velocity
        known = [prediction, *self._predictions]
        corrected = sample
        if now.correct is not None and self._corrected is not None:
            corrected = _combine(now.correct, [self._corrected, *known])
        self._index, self._corrected, self._predictions = self._index + 1, corrected, known[:2]
        return _combine(now.predict, [corrected, *known])


def _combine(weights: tuple[float, ...], tensors: list[Tensor]) -> Tensor:
    """Sum of weight * tensor; a zero weight skips its tensor, so that the last step is exactly x0."""
    used = [(w, t) for w, t in zip(weights, tensors) if w != 0.0]
    total = used[0][1] * used[0][0]
    for weight, tensor in used[1:]:
        total.add_(tensor, alpha=weight)
    return total


def sample_chunk(noise: Tensor, steps: int, velocity: Callable[[Tensor, int], Tensor], shift: float = 5.0) -> Tensor:
    """Integrate from `noise` to x0. `velocity(x, timestep)` calls the model. For models outside a session."""
    solver, sample = UniPC(steps, shift), noise.to(torch.float32)
    for now in solver.schedule:
        sample = solver.step(velocity(sample, now.timestep), sample)
    return sample
