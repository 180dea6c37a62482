"""What 8-bit convolutions cost a trained VAE's frames: PSNR against its own decode in bf16, on held-out clips and on a long stream.

  longtake experiment vae-codes --clips 64 --seconds 60 --json F
  longtake experiment vae-codes --checkpoints runs/vae --conv fp8 int8

Scales are those of the checkpoint's calibration (`longtake convert --calibrate`); without one, of a few clips of the
training split. A stream keeps its histories as codes: if that added up, its PSNR would fall with its length, so the JSON has
it second by second. Gate: 45 dB. Everything on the CPU through the ops' references; on a GPU the kernels are held against
the same ones.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from tqdm import tqdm

from longtake.accuracy.coded_decode import calibrated, compared, in_bf16, summary
from longtake.files import write_json
from longtake.formats.recipe import VAE_CONVS
from longtake.options import Command, OneOf, option
from longtake.provenance import commit, cpu_name, versions
from longtake.training.data.digits import Digits
from longtake.training.experiment.arms import PRESET, shipped
from longtake.training.models.checkpoint import map_into
from longtake.training.models.conv_calibration import ConvCalibration
from longtake.training.models.load import calibrated_convs, read_side
from longtake.training.models.wan.vae import CausalVAE

GATE_DB = 45.0
CALIBRATION_CLIPS, CALIBRATION_SEED, SEED = 8, 2, 1


@dataclass(frozen=True)
class VaeCodesOptions:
    """What"""

    checkpoints: Path = option(shipped(), metavar="FOLDER")
    """vae.safetensors in it"""
    clips: int = option(64, metavar="N")
    """held-out clips"""
    frames: int = option(13, metavar="N")
    """of a clip: 1 and a multiple of 4"""
    seconds: float = option(60.0, metavar="S")
    """of the stream; 0 for none"""
    conv: Annotated[tuple[str, ...], OneOf(VAE_CONVS[1:])] = option(VAE_CONVS[:0:-1])
    """what the convolutions run in; the stream in the first of them"""
    json: Path | None = option(None, metavar="FILE")
    """write the figures there as well, as they come (default: they are printed only)"""


@torch.no_grad()
def clip_latents(vae: CausalVAE, split: str, seed: int, count: int, frames: int) -> Iterator[Tensor]:
    """Latents [F,z,h,w] of `count` clips."""
    generator, data = torch.Generator().manual_seed(seed), Digits(PRESET, split)
    for _ in range(count):
        yield vae.encode(data.clips(generator, frames, 1, torch.device("cpu")))[0]


@torch.no_grad()
def stream_latents(vae: CausalVAE, seed: int, frames: int) -> Iterator[Tensor]:
    """Latents [F,z,h,w] of one long story, in parts; its frames are encoded as a stream."""
    video = Digits(PRESET, "eval").clips(torch.Generator().manual_seed(seed), frames, 1, torch.device("cpu"))
    histories, at, part = None, 0, 4 * 16
    while at < frames:
        end = min(frames, at + part + (at == 0))
        latents, histories = vae.encode_chunk(video[:, :, at:end], histories)
        yield latents[0]
        at = end


def calibration_of(vae: CausalVAE, stored: ConvCalibration | None) -> ConvCalibration:
    """The stored one, or one of clips of the training split."""
    return stored or calibrated(vae, clip_latents(vae, "train", CALIBRATION_SEED, CALIBRATION_CLIPS, 29))


def of_clips(
    vae: CausalVAE, bf16: CausalVAE, calibration: ConvCalibration, options: VaeCodesOptions
) -> dict[str, dict[str, Any]]:
    """Figures of each row over all clips, and the clip whose frames come out worst."""
    found: dict[str, list[Tensor]] = {row: [] for row in options.conv}
    latents = clip_latents(vae, "eval", SEED, options.clips, options.frames)
    for clip in tqdm(latents, "clips", total=options.clips, disable=None):
        steps = [psnr for _, psnr in compared(bf16, calibration, options.conv, clip)]
        for row, clips in found.items():
            clips.append(torch.cat([psnr[row] for psnr in steps]))
    return {
        row: {**summary(clips), "worst_clip_db": min(summary([clip])["psnr_db"] for clip in clips), "clips": len(clips)}
        for row, clips in found.items()
    }


def of_stream(
    vae: CausalVAE, bf16: CausalVAE, calibration: ConvCalibration, options: VaeCodesOptions
) -> Iterator[dict[str, Any]]:
    """Figures of the first row over a stream so far, after every second of it."""
    row, rate = options.conv[0], PRESET.fps
    frames = 1 + 4 * round(options.seconds * rate / 4)
    every = torch.cat(list(stream_latents(vae, SEED + 1, frames)))
    psnr, shown = [], 0
    for _, step in tqdm(compared(bf16, calibration, (row,), every), "stream", total=len(every) - 1, disable=None):
        psnr.append(step[row])
        flat = torch.cat(psnr)
        if len(flat) // rate > shown or len(flat) == frames - 1:
            shown = len(flat) // rate
            curve = [summary([second])["psnr_db"] for second in flat.split(rate)]
            yield {"conv": row, "seconds": round(len(flat) / rate, 2), **summary([flat]), "db_by_second": curve}


def run(options: VaeCodesOptions) -> int:
    """Measure, print, write. 2 if a figure misses the gate."""
    begun, path = time.monotonic(), options.checkpoints / "vae.safetensors"
    with torch.device("meta"):
        vae = CausalVAE(PRESET.vae)
    map_into(vae, path, kind="vae", preset=PRESET)
    vae.float().eval().requires_grad_(False)
    stored = calibrated_convs(read_side(path, "vae", PRESET), PRESET)
    calibration, bf16 = calibration_of(vae, stored), in_bf16(vae)
    report: dict[str, Any] = {
        "kind": "evaluate",
        "command": shlex.join(["longtake", *sys.argv[1:]]),
        "rerun_with": shlex.join(["longtake", *sys.argv[1:]]),
        "commit": commit(),
        "date": date.today().isoformat(),
        "preset": PRESET.name,
        "device": cpu_name(),
        "versions": versions(("torch",)),
        "gate_db": GATE_DB,
        "calibration": "the checkpoint's" if stored else f"{CALIBRATION_CLIPS} clips of the training split",
        "codes": {name: seen.codes for name, seen in calibration.inputs.items()},
    }

    def keep(**more: Any) -> None:
        report.update(more, seconds=round(time.monotonic() - begun, 1))
        if options.json:
            write_json(options.json, report)

    if options.clips:
        keep(clips=of_clips(vae, bf16, calibration, options))
    for row, found in report.get("clips", {}).items():
        sys.stdout.write(
            f"{row:10} {found['psnr_db']:.1f} dB, worst frame {found['worst_frame_db']:.1f}, {found['clips']} clips\n"
        )
    if options.seconds:
        for figures in of_stream(vae, bf16, calibration, options):
            keep(stream=figures)
        sys.stdout.write(
            f"stream     {figures['psnr_db']:.1f} dB, worst frame {figures['worst_frame_db']:.1f}, "
            f"{figures['seconds']:g} s of {figures['conv']}\n"
        )
    every = [*report.get("clips", {}).values(), *([report["stream"]] if options.seconds else [])]
    return 0 if all(figures["psnr_db"] >= GATE_DB for figures in every) else 2


COMMAND = Command(run=run, options=(VaeCodesOptions,), description=__doc__ or "")
