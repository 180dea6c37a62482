"""What an arithmetic costs a trained model, through the runtime: prompt fidelity and likeness of recipes' videos.

  longtake experiment engine-fidelity tiny_bf16_sm90 tiny_w4a16_sm90 --stories 64 --chunks 3
  longtake experiment engine-fidelity A.yaml B.yaml --judge runs/experiment/judge.safetensors --json F

The first recipe (or folder of engines, or of exported networks) is what the others are compared with. All tell the same
stories of held-out scans, with the same noise. Fidelity: share of frames (one in four) in which the experiment's judge sees
the prompted digit. SSIM: each chunk generated from the first recipe's latents so far, so that differences don't add up over
chunks; mean over stories of each chunk, share of all chunks that are below 0.95, and the lowest. Without --judge one is
trained first (seconds on a GPU, minutes without). The file of --json is written after each recipe.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from longtake.accuracy.ssim import ssim
from longtake.files import write_json
from longtake.options import Command, option
from longtake.runtime.generator import Generator
from longtake.training.data.digit_stories import Story
from longtake.training.data.latent_cache import frozen_vae, vae_checkpoint
from longtake.training.experiment.arms import PRESET, shipped
from longtake.training.experiment.batched import Script
from longtake.training.experiment.classifier import DigitClassifier, JudgeTraining, trained_judge
from longtake.training.experiment.evaluate import EVERY
from longtake.training.experiment.jobs import MIXED_SEED
from longtake.training.experiment.stories import mixed_stories, scripts_of, shots_by_chunk
from longtake.training.experiment.summary import paired_interval

GATE = 0.95  # SSIM of a chunk


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
) -> tuple[dict[str, Any], list[Any]]:
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


def figures_of(fidelity: Sequence[float], likeness: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A row: fidelity of each story, and SSIM of each chunk of the stories that were compared, if any was."""
    row: dict[str, Any] = {"fidelity": float(np.mean(fidelity)), "fidelity_by_story": [round(x, 4) for x in fidelity]}
    if likeness:
        row |= {
            "ssim": float(np.mean(likeness)),
            "ssim_by_chunk": np.mean(likeness, 0).round(5).tolist(),
            "ssim_below": float(np.mean(np.array(likeness) < GATE)),
            "ssim_lowest": float(np.min(likeness)),
            "ssim_stories": len(likeness),
        }
    return row


def compare(row: dict[str, Any], first: dict[str, Any]) -> None:
    """Add a recipe's difference to the first one, with its 95 % interval over stories."""
    row["difference"] = row["fidelity"] - first["fidelity"]
    row["interval"] = paired_interval([row["fidelity_by_story"]], [first["fidelity_by_story"]])


def judge_from(path: Path | None, device: torch.device) -> DigitClassifier:
    """The judge of a file of the experiment, or a new one."""
    if path is None:
        vae = frozen_vae(vae_checkpoint(PRESET, shipped()), PRESET, device)[0]
        return trained_judge(vae, PRESET, JudgeTraining(), device)
    judge = DigitClassifier()
    judge.load_state_dict(load_file(path))
    return judge.to(device).eval().requires_grad_(False)


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [f"{'recipe':40} fidelity  difference          95 %        SSIM by chunk, below {GATE}, lowest"]
    for name, row in rows.items():
        line = f"{name[-40:]:40} {row['fidelity']:8.4f}"
        if "difference" in row:
            low, high = row["interval"]
            line += f"  {row['difference']:+10.4f}  [{low:+.4f}, {high:+.4f}]"
        if "ssim" in row:
            by_chunk = " ".join(f"{x:.4f}" for x in row["ssim_by_chunk"])
            line += f"  {by_chunk}  {row['ssim_below']:.0%}  {row['ssim_lowest']:.4f}"
        lines.append(line)
    return lines


@dataclass(frozen=True)
class FidelityOptions:
    """What"""

    recipes: tuple[str, ...] = option(positional=True, metavar="RECIPE")
    """or a folder of engines or exported networks; the first is what others are compared with"""
    backend: str = option("auto", metavar="NAME")
    """taken or refused, never replaced; auto chooses"""
    stories: int = option(64, metavar="N")
    """how many"""
    ssim_stories: int | None = option(None, metavar="N")
    """of them: those whose SSIM is measured (default: all)"""
    chunks: int = option(3, metavar="N")
    """of a story"""
    seed: int = option(MIXED_SEED, metavar="N")
    """of the stories"""
    judge: Path | None = option(None, metavar="FILE")
    """judge.safetensors of an experiment (default: one is trained)"""
    json: Path | None = option(None, metavar="FILE")
    """write the figures there as well (default: they are printed only)"""


def run(options: FidelityOptions) -> int:
    """Measure, print the table, write it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    judge = judge_from(options.judge, device)
    stories = mixed_stories(options.stories, options.chunks, options.seed)
    rows: dict[str, dict[str, Any]] = {}
    first: list[Any] | None = None
    for name in options.recipes:
        generator = Generator.from_engines(name, options.backend, device if device.type == "cuda" else None)
        with closing(generator.backend):
            rows[name], videos = measured(generator, judge, stories, first, name)
        if name != options.recipes[0]:
            compare(rows[name], rows[options.recipes[0]])
        first = videos[: options.ssim_stories] if first is None else first
        if options.json:
            machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
            conditions = {"stories": options.stories, "chunks": options.chunks, "seed": options.seed}
            write_json(options.json, {"device": machine, **conditions, "rows": rows})
    sys.stdout.write("\n".join(table(rows)) + "\n")
    return 0


COMMAND = Command(run=run, options=(FidelityOptions,), description=__doc__ or "")
