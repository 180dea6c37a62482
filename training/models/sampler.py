"""From noise to latents: a chunk's noise, its schedule, and the solvers that go down it (`SOLVERS`).

UniPC (order 2, bh2, x0 prediction, corrector) is a table of coefficients. Every step is a linear combination of tensors, so its
coefficients are worked out once on the host in float64 and a step is a few multiply-adds on any device, in float32. Notation, for step i of N with flow sigmas:
x_i the sample given to the model, v_i its velocity, m_i = x_i - sigma_i v_i the x0 prediction, c_i the corrected sample.

    c_i     = C0 c_{i-1} + C1 m_i + C2 m_{i-1} + C3 m_{i-2}      (i >= 1; c_0 = x_0)
    x_{i+1} = P0 c_i     + P1 m_i + P2 m_{i-1}

Source of the formulas: Zhao et al., "UniPC" (2023), as LongLive 2.0 uses it for flow matching with shift 5.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.training.models.presets import Preset

# The training grid is 1 - k/1000 in float32; its largest entry starts the schedule.
SIGMA_MAX = float(np.float32(0.999))
STEPS_FIX = "pass steps=4 (--steps 4), or leave steps out for the model's own"


@dataclass(frozen=True)
class Step:
    """Coefficients of one solver step. `timestep` is what the model is told, `sigma` what the solver uses."""

    timestep: float
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


@dataclass(frozen=True)
class Schedule:
    """timesteps: what the model is told before each step, 1000 at pure noise, falling. sigmas: what a solver counts with, the
    share of noise at each step and at the end, which is 0."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]


def schedule_of(steps: int, shift: float = 5.0) -> Schedule:
    """`steps` steps, even before the shift. Raises LongtakeError for a count outside 1..1000."""
    if not 1 <= steps <= 1000:
        raise LongtakeError("bad number of denoise steps", got=steps, expected="1 to 1000", fix=STEPS_FIX)
    return Schedule(model_timesteps(steps, shift), flow_sigmas(steps, shift))


def schedule_from(timesteps: Sequence[float], shift: float = 1.0) -> Schedule:
    """Given timesteps of 0..1000, shifted: sigma = s t / (1 + (s - 1) t) of t / 1000; a shift of 1 leaves them as they are.

    Raises LongtakeError unless they fall from at most 1000 to above 0.
    """
    falling = all(now > after for now, after in zip(timesteps, timesteps[1:]))
    if not (timesteps and falling and timesteps[0] <= 1000 and timesteps[-1] > 0):
        expected = "numbers that fall from at most 1000 to above 0"
        raise LongtakeError("bad timesteps", got=tuple(timesteps), expected=expected, fix="pass (999, 937, 833, 624)")
    raw = [t / 1000 for t in timesteps]
    sigmas = [shift * s / (1 + (shift - 1) * s) for s in raw]
    return Schedule(tuple(timesteps if shift == 1 else (1000 * s for s in sigmas)), (*sigmas, 0.0))


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
def unipc_steps(schedule: Schedule) -> tuple[Step, ...]:
    """UniPC's coefficients. Raises LongtakeError for a schedule that starts at pure noise, where its logarithm has no end."""
    timesteps, sigmas = schedule.timesteps, schedule.sigmas
    if sigmas[0] >= 1:
        what, fix = "UniPC cannot start at pure noise", "pass 999 as the first timestep, or solver='euler'"
        raise LongtakeError(what, got=f"timestep {timesteps[0]}", expected="below 1000", fix=fix)
    steps = len(timesteps)
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
    """How the velocities of a chunk, one a timestep of the schedule it is made for, take its noise to latents."""

    def step(self, velocity: Tensor, sample: Tensor) -> Tensor:
        """The next sample, fp32, from this step's `velocity` and `sample` (fp32, same shape). Inputs are kept intact."""
        ...


class UniPC:
    """Solver state of one chunk. Feed it each velocity in turn; after the last step it returns the x0 prediction."""

    def __init__(self, schedule: Schedule) -> None:
        self.steps = unipc_steps(schedule)
        self._index = 0
        self._corrected: Tensor | None = None
        self._predictions: list[Tensor] = []

    def step(self, velocity: Tensor, sample: Tensor) -> Tensor:
        """See Solver.step."""
        now = self.steps[self._index]
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


class Euler:
    """Straight on along each velocity, from one sigma to the next; the last step gives the x0 prediction."""

    def __init__(self, schedule: Schedule) -> None:
        self._left = list(zip(schedule.sigmas, schedule.sigmas[1:]))

    def step(self, velocity: Tensor, sample: Tensor) -> Tensor:
        """See Solver.step."""
        now, after = self._left.pop(0)
        return torch.add(sample, velocity, alpha=after - now)


SOLVERS: dict[str, Callable[[Schedule], Solver]] = {"unipc": UniPC, "euler": Euler}


def solver_named(name: str) -> Callable[[Schedule], Solver]:
    """What makes a solver of that name; one serves one chunk. An unknown name is an error that lists the known ones."""
    if name not in SOLVERS:
        raise LongtakeError("unknown solver", got=repr(name), expected=", ".join(SOLVERS), fix="pass one of these")
    return SOLVERS[name]


def noise_for_chunk(preset: Preset, seed: int, index: int) -> Tensor:
    """Gaussian noise fp32 [1, F, C, H, W] of chunk `index`, drawn on the CPU: the same for every device and length."""
    digest = hashlib.sha256(f"longtake noise 1:{seed}:{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    shape = (1, preset.frames_of(index), preset.vae.z_channels, *preset.latent_hw)
    return torch.randn(shape, generator=generator)
