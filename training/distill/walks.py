"""A student's own walks, and what the scores see of them.

A chunk is denoised by the steps of a session, without gradient up to the exit step; that pass keeps its gradient, and its
x0 prediction is the chunk. A clean pass on it, without gradient, leaves the state that the next chunk reads.

Legend: B walks, C channels, F latent frames of all chunks, h, w latent size, E text length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longtake.training.data.rooms.latents import Walks
from longtake.training.distill.scores import dmd_gradient, draw_levels
from longtake.training.models.presets import Preset
from longtake.training.models.sampler import Schedule, schedule_from, schedule_of
from longtake.training.models.sana_wm.dit import SanaWMDiT
from longtake.training.objective.walk_forcing import Levels, Walk, predict, spans_of

SCORE_SHIFT = 10.0  # of the levels that scores see, as published


@dataclass(frozen=True)
class WalkScene:
    """walks: of the data, whose first latents are given, and whose cameras are followed. text, scored: embeddings of the
    prompts as the student reads them, and as the scores do, fp32 [B, E, text_dim]. noise fp32 [B, C, F, h, w]."""

    walks: Walks
    text: Tensor
    scored: Tensor
    noise: Tensor
    exit_step: int

    def part(self, rows: slice) -> WalkScene:
        """Some of its walks."""
        own = self.walks
        walks = Walks(own.latents[rows], own.tokens[rows], own.poses[rows], own.intrinsics[rows])
        return WalkScene(walks, self.text[rows], self.scored[rows], self.noise[rows], self.exit_step)


def student_schedule(preset: Preset, steps: int) -> Schedule:
    """The preset's listed timesteps if they are as many as the student's, as in a session; else even ones."""
    listed = preset.sampling.listed
    return schedule_from(listed) if len(listed) == steps else schedule_of(steps, preset.sampling.shift)


def roll_out(
    dit: SanaWMDiT, preset: Preset, scene: WalkScene, schedule: Schedule, exit_step: int, gradient: bool = False
) -> Tensor:
    """Latents fp32 [B, C, F, h, w], each chunk as predicted at `exit_step` (0-based). gradient: keep that passes' one."""
    frames, done = scene.noise.shape[2], []
    with torch.set_grad_enabled(gradient):
        walk = Walk(dit, preset, scene.walks, scene.text, preset.window_chunks - 1)
    for span in spans_of(preset, preset.whole_chunks(frames)):
        first = scene.walks.latents[:, :, :1] if span.start == 0 else None
        with torch.no_grad():
            sample = pinned(scene.noise[:, :, span.start : span.stop], first)
            for step in range(exit_step):
                velocity, _ = walk.look(span, sample, _times(schedule.timesteps[step], sample, first))
                sample = pinned(sample + (schedule.sigmas[step + 1] - schedule.sigmas[step]) * velocity, first)
        with torch.set_grad_enabled(gradient):
            velocity, _ = walk.look(span, sample, _times(schedule.timesteps[exit_step], sample, first))
            done.append(pinned(sample - schedule.sigmas[exit_step] * velocity, first))
        if span.stop < frames:
            with torch.no_grad():
                walk.clean(span, done[-1].detach())
    return torch.cat(done, 2)


def _times(timestep: float, sample: Tensor, first: Tensor | None) -> Tensor:
    """Of each frame, [B, f]; a given first frame is at 0."""
    times = torch.full((len(sample), sample.shape[2]), float(int(timestep)), device=sample.device)
    if first is not None:
        times[:, 0] = 0.0
    return times


def pinned(sample: Tensor, first: Tensor | None) -> Tensor:
    """`sample` [B, C, f, h, w] with frame 0 replaced by `first` [B, C, 1, h, w]; no gradient reaches that frame."""
    return sample if first is None else torch.cat((first, sample[:, :, 1:]), 2)


def score_levels(preset: Preset, frames: int, batch: int, generator: torch.Generator, whole: bool) -> Levels:
    """What the scores see videos under: one level a walk if they see it whole, else one a chunk; frame 0 is clean."""
    spans = spans_of(preset, preset.whole_chunks(frames))
    rows = draw_levels((batch, len(spans)), SCORE_SHIFT, generator, per_block=not whole)
    rows[..., 0].floor_()
    found = rows.repeat_interleave(torch.tensor([len(span) for span in spans], device=rows.device), 1)
    found[:, 0] = 0.0
    return Levels(found)


def score_x0(
    dit: SanaWMDiT, preset: Preset, video: Walks, text: Tensor, eps: Tensor, levels: Levels, context: str
) -> Tensor:
    """The denoised video, fp32 [B, C, F, h, w]. context: as the teacher was trained, see `walk_forcing.CONTEXTS`."""
    noisy = (1 - levels.sigmas) * video.latents + levels.sigmas * eps
    return noisy - levels.sigmas * predict(dit, preset, video, text, eps, levels, context).float()


def walk_gradient(preset: Preset, x: Tensor, real: Tensor, fake: Tensor, counted: Tensor, whole: bool) -> Tensor:
    """DMD's gradient, normalised over what the scores see at one level: a chunk, or all of a walk they see whole.

    x, real, fake: fp32 [B, F, C, h, w]. counted: frames that count, bool [B, F].
    """
    parts = [slice(s.start, s.stop) for s in spans_of(preset, preset.whole_chunks(x.shape[1]), whole)]
    return torch.cat([dmd_gradient(x[:, at], real[:, at], fake[:, at], 1, counted[:, at]) for at in parts], 1)


def with_latents(walks: Walks, latents: Tensor) -> Walks:
    """The same cameras and prompts with other latents."""
    return replace(walks, latents=latents)
