"""What 8-bit and 4-bit arithmetic costs a trained model, on many stories at once: prompt fidelity and likeness by chunk.

python -m longtake.training.experiment.arithmetic --stories 1024 --judge runs/experiment/judge.safetensors --json F
python -m longtake.training.experiment.arithmetic --checkpoints runs/four        (a distilled student, as it is sampled)

Every row is compared with bf16 linears, cache and attention: the same stories of held-out scans, the same noise. Fidelity:
share of frames (one in four) in which the experiment's judge sees the prompted digit. SSIM: each chunk generated from
the first row's latents so far. The row "fp32" computes everything in fp32: what differs there is nothing but rounding.
Linears are fake-quantized and attention computes as our Hopper kernel does (`attention_fp8`); what engines do is measured by
`engine_fidelity`, a story at a time. Without --judge one is trained first (seconds on a GPU, minutes without).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from longtake.accuracy.ssim import frame_ssim
from longtake.files import write_json
from longtake.training.data.digit_stories import Story
from longtake.training.data.latent_cache import frozen_vae, vae_checkpoint
from longtake.training.experiment.arms import PRESET, shipped
from longtake.training.experiment.batched import Rollout, Sampling, decode
from longtake.training.experiment.engine_fidelity import compare, figures_of, judge_from, table
from longtake.training.experiment.evaluate import Eyes, prompted_share
from longtake.training.experiment.jobs import MIXED_SEED
from longtake.training.experiment.stories import mixed_stories, scripts_of
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


def batches(stories: Sequence[Story], size: int) -> Iterator[tuple[int, Sequence[Story]]]:
    """Where each part of the stories begins, and the part."""
    return ((start, stories[start : start + size]) for start in range(0, len(stories), size))


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


def measured(args: argparse.Namespace, stories: Sequence[Story], eyes: Eyes, sampling: Sampling) -> Iterator[Any]:
    """Name and figures of each row."""
    plain, latents = load_models(PRESET, args.checkpoints), []
    for name in args.rows:
        how = ROWS[name]
        models = apply_precision(plain, how.linears)
        for module in (models.dit, models.text):
            module.to(eyes.device).requires_grad_(False)
        own = replace(sampling, cache=how.cache, attention=how.attention, compute=how.compute)
        right, alike, begun = [], [], time.monotonic()
        for start, part in tqdm(list(batches(stories, args.batch)), name, unit="batch", disable=None):
            made, share = told(models, eyes, part, own, start)
            right += share.tolist()
            if name == args.rows[0]:
                latents.append(made.cpu())
            elif start < args.ssim_stories:
                committed = latents[start // args.batch].to(eyes.device)
                alike += likeness(models, eyes, part, own, start, committed).tolist()
        yield name, {**figures_of(right, alike), "seconds": round(time.monotonic() - begun, 1)}


def sampling_of(args: argparse.Namespace) -> Sampling:
    """As the checkpoints say, or as told."""
    usual = PRESET.sampling
    told = SideFile.read(args.checkpoints / "dit.json").sampling or {}
    steps = args.steps or int(told.get("steps", usual.steps))
    guidance = float(told.get("guidance", usual.guidance)) if args.guidance is None else args.guidance
    return Sampling(steps, guidance, float(told.get("shift", usual.shift)))


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, write it."""
    parser = argparse.ArgumentParser(prog="python -m longtake.training.experiment.arithmetic", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "--checkpoints", type=Path, default=shipped(), metavar="FOLDER", help="default: the shipped ones"
    )
    parser.add_argument("--stories", type=int, default=256, metavar="N")
    parser.add_argument(
        "--ssim-stories", type=int, default=128, metavar="N", help="of them: those whose SSIM is measured"
    )
    parser.add_argument("--chunks", type=int, default=3, metavar="N", help="of a story")
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=list(ROWS), help="the first is what others are compared with"
    )
    parser.add_argument("--steps", type=int, help="denoise steps (default: as the checkpoints say)")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="stories at once")
    parser.add_argument("--seed", type=int, default=MIXED_SEED, help="of the stories")
    parser.add_argument("--judge", type=Path, metavar="FILE", help="judge.safetensors of an experiment")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well, after each row")
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = frozen_vae(vae_checkpoint(PRESET, args.checkpoints), PRESET, device)[0]
    eyes = Eyes(judge_from(args.judge, device), vae, device)
    stories, sampling = mixed_stories(args.stories, args.chunks, args.seed), sampling_of(args)
    conditions = {
        "command": " ".join(["python -m longtake.training.experiment.arithmetic", *(arguments or sys.argv[1:])]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "stories": args.stories, "chunks": args.chunks, "seed": args.seed,
        "steps": sampling.steps, "guidance": sampling.guidance,
    }  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    for name, row in measured(args, stories, eyes, sampling):
        rows[name] = row
        if name != args.rows[0]:
            compare(row, rows[args.rows[0]])
        if args.json:
            write_json(args.json, {**conditions, "rows": rows})
    sys.stdout.write(
        f"{conditions['device']}, {args.stories} stories, {sampling.steps} steps, guidance {sampling.guidance:g}\n"
    )
    sys.stdout.write("\n".join(table(rows)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
