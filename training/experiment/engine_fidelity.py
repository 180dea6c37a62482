"""What an arithmetic costs a trained model, through the runtime: prompt fidelity and likeness of recipes' videos.

  longtake experiment engine-fidelity tiny_bf16_sm90 tiny_w4a16_sm90 --stories 64 --chunks 3
  longtake experiment engine-fidelity A.yaml B.yaml --judge runs/experiment/judge.safetensors --json F

The first recipe (or folder of engines, or of exported networks) is what the others are compared with. All tell the same
stories of held-out scans, with the same noise. Fidelity: share of frames (one in four) in which the experiment's judge sees
the prompted digit. SSIM: each chunk generated from the first recipe's latents so far, so that differences don't add up over
chunks; mean over stories of each chunk, share of all chunks that are below 0.95, and the lowest. Without --judge one is
trained first (seconds on a GPU, minutes without).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from longtake.accuracy.ssim import ssim
from longtake.devices import device_named, name_of
from longtake.options import Command, option
from longtake.runtime.generator import Generator
from longtake.training.data.digit_stories import Story
from longtake.training.data.held_out_stories import mixed_stories
from longtake.training.experiment.batched import Script
from longtake.training.experiment.classifier import DigitClassifier
from longtake.training.experiment.evaluate import EVERY, judge_from
from longtake.training.experiment.figures import Row, StoryOptions, figures_of, tell
from longtake.training.experiment.stories import scripts_of, shots_by_chunk


def told(generator: Generator, script: Script) -> tuple[list[Tensor], list[np.ndarray]]:
    """Latents fp32 [1, F, C, h, w] and frames uint8 [T, H, W, 3] of each chunk of a story."""
    with generator.session(list(script.prompts), seed=script.seed) as session:
        chunks = list(session)
        return [chunk.latents.cpu() for chunk in chunks], [chunk.frames for chunk in chunks]


def retold(generator: Generator, script: Script, given: Sequence[Tensor]) -> list[np.ndarray]:
    """Frames of each chunk of a story, generated from the chunks `given` before it."""
    found = []
    for chunk in range(len(script.prompts)):
        with generator.session(list(script.prompts[chunk:]), seed=script.seed) as session:
            for latents, prompt, cut in zip(given[:chunk], script.prompts, script.cuts):
                session.feed(latents, prompt, cut)
            found.append(next(session).frames)
    return found


@torch.no_grad()
def fidelity_of(judge: DigitClassifier, story: Story, chunks: Sequence[np.ndarray]) -> float:
    """Share of a story's frames in which the judge sees the prompted digit."""
    device, rows = next(judge.parameters()).device, []
    for frames, shot in zip(chunks, shots_by_chunk(story)):
        looked_at = torch.from_numpy(frames[::EVERY].copy()).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        rows.append((judge(looked_at).argmax(1) == shot.digit).float().mean())
    return float(torch.stack(rows).mean())


def measured(
    generator: Generator, judge: DigitClassifier, stories: Sequence[Story], first: list[Any] | None, title: str
) -> tuple[Row, list[Any]]:
    """A recipe's figures, and its videos. `first`: the first recipe's videos, of as many stories as are to be compared."""
    fidelity, likeness, videos = [], [], []
    scripts = scripts_of(stories, 0)
    for number, (story, script) in enumerate(zip(stories, tqdm(scripts, title, unit="story", disable=None))):
        latents, frames = told(generator, script)
        videos.append((latents, frames))
        fidelity.append(fidelity_of(judge, story, frames))
        if first and number < len(first):
            given, wanted = first[number]
            likeness.append([float(ssim(a, b).mean()) for a, b in zip(retold(generator, script, given), wanted)])
    return figures_of(fidelity, likeness), videos


@dataclass(frozen=True)
class FidelityOptions(StoryOptions):
    """What"""

    recipes: tuple[str, ...] = option(positional=True, metavar="RECIPE")
    """or a folder of engines or exported networks; the first is what others are compared with"""
    backend: str = option("auto", metavar="NAME")
    """taken or refused, never replaced; auto chooses"""
    stories: int = option(64, metavar="N")
    """how many"""
    ssim_stories: int | None = option(None, metavar="N")
    """of them: those whose SSIM is measured (default: all)"""


def rows_of(options: FidelityOptions, device: torch.device) -> Iterator[tuple[str, Row]]:
    """Name and figures of each recipe."""
    judge = judge_from(options.judge, device)
    stories = mixed_stories(options.stories, options.chunks, options.seed)
    first: list[Any] | None = None
    for name in options.recipes:
        generator = Generator.from_engines(name, options.backend, device if device.type == "cuda" else None)
        with closing(generator.backend):
            row, videos = measured(generator, judge, stories, first, name)
        first = videos[: options.ssim_stories] if first is None else first
        yield name, row


def run(options: FidelityOptions) -> int:
    """Measure, print the table, write it."""
    device = device_named("auto")
    machine = name_of(device)
    conditions = {"device": machine, "stories": options.stories, "chunks": options.chunks, "seed": options.seed}
    return tell(rows_of(options, device), options.json, conditions)


COMMAND = Command(run=run, options=(FidelityOptions,), description=__doc__ or "")
