"""What 8-bit and 4-bit arithmetic costs a trained model, on many stories at once: prompt fidelity and likeness by chunk.

  longtake experiment arithmetic --stories 1024 --judge runs/experiment/judge.safetensors --json F
  longtake experiment arithmetic --checkpoints runs/four        (a distilled student, as it is sampled)

Every row is compared with bf16 linears, cache and attention: the same stories of held-out scans, the same noise. Fidelity:
share of frames (one in four) in which the experiment's judge sees the prompted digit. SSIM: each chunk generated from
the first row's latents so far. The row "fp32" computes everything in fp32: what differs there is nothing but rounding.
Linears are fake-quantized and attention computes as our Hopper kernel does (`attention_fp8`); what engines do is measured by
`engine_fidelity`, a story at a time. Without --judge one is trained first (seconds on a GPU, minutes without).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from longtake.accuracy.ssim import frame_ssim
from longtake.devices import device_named, name_of
from longtake.options import Command, OneOf, option
from longtake.provenance import command_line
from longtake.training.data.digit_stories import Story
from longtake.training.data.held_out_stories import mixed_stories
from longtake.training.experiment.arms import PRESET, shipped, vae_of
from longtake.training.experiment.batched import Rollout, Sampling, decode
from longtake.training.experiment.evaluate import Eyes, judge_from, prompted_share
from longtake.training.experiment.figures import StoryOptions, figures_of, tell
from longtake.training.experiment.stories import scripts_of
from longtake.training.models.load import Models, load_models
from longtake.training.models.quantize import apply_precision
from longtake.training.models.side_file import SideFile


class Arithmetic(NamedTuple):
    """Precision of the linears, format of the cache, attention, and what the rest computes in."""

    linears: str
    cache: str
    attention: str
    compute: str = "bf16"


ROWS = {
    "bf16": Arithmetic("bf16", "bf16", "bf16"),
    "fp32": Arithmetic("bf16", "bf16", "bf16", "fp32"),
    "4-bit cache": Arithmetic("bf16", "nvfp4", "bf16"),
    "4-bit cache, fp8 attention": Arithmetic("bf16", "nvfp4", "fp8"),
    "4-bit cache, fp8 linears": Arithmetic("fp8", "nvfp4", "bf16"),
    "4-bit cache, fp8 linears and attention": Arithmetic("fp8", "nvfp4", "fp8"),
}


@torch.no_grad()
def told(models: Models, eyes: Eyes, stories: Sequence[Story], sampling: Sampling, first: int) -> tuple[Tensor, Tensor]:
    """Latents [B, N F, C, h, w] of stories, the first of which has number `first`, and fidelity of each story [B]."""
    scripts, history, latents, right = scripts_of(stories, 0, first), None, [], []
    for number, chunk in enumerate(Rollout(models, scripts, sampling, eyes.device)):
        frames, history = decode(eyes.vae, chunk, history)
        latents.append(chunk)
        right.append(prompted_share(frames, stories, number, eyes))
    return torch.cat(latents, 1), torch.stack(right).mean(0)


@torch.no_grad()
def likeness(
    models: Models, eyes: Eyes, stories: Sequence[Story], sampling: Sampling, first: int, committed: Tensor
) -> Tensor:
    """SSIM [B, N] of each chunk generated after the chunks of `committed` [B, N F, C, h, w], against that one's chunk."""
    scripts, history, found = scripts_of(stories, 0, first), None, []
    rollout = Rollout(models, scripts, sampling, eyes.device, committed=committed)
    for chunk, wanted in zip(rollout, committed.split(models.preset.chunk_latents, 1)):
        own, _ = decode(eyes.vae, chunk, history)
        theirs, history = decode(eyes.vae, wanted, history)
        found.append(torch.stack([frame_ssim(*(pixels(x) for x in pair)).mean() for pair in zip(own, theirs)]))
    return torch.stack(found, 1)


def pixels(frames_3THW: Tensor) -> Tensor:
    """Whole numbers 0..255, [T, 3, H, W]."""
    return (frames_3THW.transpose(0, 1) * 127.5 + 127.5).round().clamp(0, 255)


@dataclass(frozen=True)
class ArithmeticOptions(StoryOptions):
    """What"""

    checkpoints: Path = option(shipped(), metavar="FOLDER")
    """the model"""
    stories: int = option(256, metavar="N")
    """how many"""
    ssim_stories: int = option(128, metavar="N")
    """of them: those whose SSIM is measured"""
    rows: Annotated[tuple[str, ...], OneOf(tuple(ROWS))] = option(tuple(ROWS))
    """what is computed how; the first is what others are compared with"""
    steps: int | None = option(None, metavar="N")
    """denoise steps (default: as the checkpoints say)"""
    guidance: float | None = option(None, metavar="S")
    """of sampling (default: as the checkpoints say)"""
    batch: int = option(64, metavar="N")
    """stories at once"""


def measured(options: ArithmeticOptions, stories: Sequence[Story], eyes: Eyes, sampling: Sampling) -> Iterator[Any]:
    """Name and figures of each row."""
    plain, latents = load_models(PRESET, options.checkpoints), []
    for name in options.rows:
        how = ROWS[name]
        models = apply_precision(plain, how.linears)
        for module in (models.dit, models.text):
            module.to(eyes.device).requires_grad_(False)
        own = replace(sampling, cache=how.cache, attention=how.attention, compute=how.compute)
        right, alike, begun = [], [], time.monotonic()
        for start in tqdm(range(0, len(stories), options.batch), name, unit="batch", disable=None):
            part = stories[start : start + options.batch]
            made, share = told(models, eyes, part, own, start)
            right += share.tolist()
            if name == options.rows[0]:
                latents.append(made.cpu())
            elif start < options.ssim_stories:
                committed = latents[start // options.batch].to(eyes.device)
                alike += likeness(models, eyes, part, own, start, committed).tolist()
        yield name, {**figures_of(right, alike), "seconds": round(time.monotonic() - begun, 1)}


def sampling_of(options: ArithmeticOptions) -> Sampling:
    """As the checkpoints say, or as told."""
    usual = PRESET.sampling
    told = SideFile.read(options.checkpoints / "dit.json").sampling or {}
    steps = options.steps or int(told.get("steps", usual.steps))
    guidance = float(told.get("guidance", usual.guidance)) if options.guidance is None else options.guidance
    return Sampling(steps, guidance, float(told.get("shift", usual.shift)))


def run(options: ArithmeticOptions) -> int:
    """Measure, print the table, write it."""
    device = device_named("auto")
    machine = name_of(device)
    eyes = Eyes(judge_from(options.judge, device), vae_of(options.checkpoints, device), device)
    stories = mixed_stories(options.stories, options.chunks, options.seed)
    sampling = sampling_of(options)
    conditions = {
        "command": command_line(),
        "device": machine,
        "stories": options.stories,
        "chunks": options.chunks,
        "seed": options.seed,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
    }
    head = f"{machine}, {options.stories} stories, {sampling.steps} steps, guidance {sampling.guidance:g}\n"
    return tell(measured(options, stories, eyes, sampling), options.json, conditions, head)


COMMAND = Command(run=run, options=(ArithmeticOptions,), description=__doc__ or "")
