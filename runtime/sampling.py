"""The passes of one chunk: denoise passes that read the state, and a clean one that writes its slot.

Legend: B = 1, F latent frames of a chunk, C latent channels, H, W sizes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.runtime.backends.base import State
from longtake.runtime.conditions import Conditioner, Conditions
from longtake.runtime.session_options import SessionOptions
from longtake.runtime.state import SessionState
from longtake.runtime.video_model import Tensors, VideoModel


def pin(sample_BCFHW: Tensor, first_BCHW: Tensor | None) -> None:
    """Put the picture that a video starts from over latent frame 0, in place."""
    if first_BCHW is not None:
        sample_BCFHW[:, :, 0].copy_(first_BCHW)


class CancelledError(Exception):
    """`Session.cancel` was called while a chunk was being generated; the session is as it was before the chunk."""


@dataclass(frozen=True)
class Step:
    """A denoise step that was just made. index: within the chunk, of `steps`. timestep: the one it started from.

    preview: what the model takes the clean latents for by now, fp32 [1, F, C, H, W]; a tensor of its own.
    """

    chunk: int
    index: int
    steps: int
    timestep: float
    preview: Tensor = field(repr=False)
    _stop: threading.Event = field(repr=False)

    def cancel(self) -> None:
        """End the chunk before the next pass: what asked for it gets CancelledError, the session is as it was before."""
        self._stop.set()


OnStep = Callable[[Step], object]


def checked_on_step(on_step: OnStep | None) -> OnStep | None:
    """`on_step` if it can be called, or None. Raises LongtakeError."""
    if on_step is None or callable(on_step):
        return on_step
    raise LongtakeError(
        "on_step is no function", got=repr(on_step), expected="one that takes a Step", fix="pass a function"
    )


class ChunkSampler:
    """Takes a session's chunks from noise to latents. `cancelled` is looked at before every pass, and cleared once seen."""

    def __init__(
        self,
        model: VideoModel,
        conditioner: Conditioner,
        state: SessionState,
        options: SessionOptions,
        cancelled: threading.Event,
        on_step: OnStep | None = None,
    ) -> None:
        self.on_step = on_step
        self.model, self.conditioner, self.state = model, conditioner, state
        self.options, self.cancelled = options, cancelled

    def denoise(self, chunk: int, conditions: Conditions, slots: Tensors, first: Tensor | None) -> Tensor:
        """Noise to latents, fp32 [1, C, F, H, W]. `first`, [1, C, H, W], stays latent 0, at timestep 0."""
        sample, solver = conditions.noise_BCFHW, self.options.new_solver()
        pin(sample, first)
        schedule = self.options.schedule
        for index, timestep in enumerate(schedule.timesteps):
            times = self.conditioner.times(chunk, timestep, clean_frames=0 if first is None else 1)
            inputs = {**conditions.fixed, **times, **slots}
            velocity = self._guided_velocity(chunk, sample, conditions, inputs)
            preview = None if self.on_step is None else sample - float(schedule.sigmas[index]) * velocity
            sample = solver.step(velocity, sample)
            pin(sample, first)
            if self.on_step is not None and preview is not None:
                pin(preview, first)
                step = Step(
                    chunk, index, len(schedule.timesteps), float(timestep), preview.transpose(1, 2), self.cancelled
                )
                self.on_step(step)
        return sample

    def commit(self, chunk: int, sample: Tensor, conditions: Conditions, slots: Tensors) -> None:
        """The clean pass, at timestep 0 on the final latents: its purpose is what it writes to this chunk's slot."""
        inputs = {**conditions.fixed, **self.conditioner.times(chunk, 0), **slots}
        self._pass(chunk, sample, {**inputs, **conditions.context}, self.state.positive, commit=True)
        if conditions.negative is not None and self.state.negative is not None:
            self._pass(chunk, sample, {**inputs, **conditions.negative}, self.state.negative, commit=True)

    def _guided_velocity(self, chunk: int, sample: Tensor, conditions: Conditions, inputs: Tensors) -> Tensor:
        """One denoise step's velocity: it reads the state and writes nothing. Guided: v = u + s (c - u)."""
        velocity = self._pass(chunk, sample, {**inputs, **conditions.context}, self.state.positive, commit=False)
        if conditions.negative is None or self.state.negative is None:
            return velocity
        wanted = velocity.clone()  # the next pass may overwrite the backend's output
        base = self._pass(chunk, sample, {**inputs, **conditions.negative}, self.state.negative, commit=False)
        return torch.lerp(base, wanted, self.options.guidance)

    def _pass(self, chunk: int, sample: Tensor, inputs: Tensors, state: State, commit: bool) -> Tensor:
        if self.cancelled.is_set():
            self.cancelled.clear()
            raise CancelledError(f"cancelled before chunk {chunk} was whole")
        return self.model.velocity(sample, inputs, state, commit)
