"""What a VAE decoder's convolutions read, measured for 8-bit codes, and what the codes cost its frames.

Half of the clips are measured, the others are decoded in both ways. On noise the figures are about noise: encode clips of the
kind that is to be decoded, and name them (--latents).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from longtake.accuracy.coded_decode import calibrated, compared, in_bf16, summary
from longtake.training.convert.calibrate import read_latents
from longtake.training.models.checkpoint import map_into, side_file
from longtake.training.models.conv_calibration import ConvCalibration
from longtake.training.models.presets import Preset
from longtake.training.models.wan.vae import CausalVAE
from longtake.training.models.wan.vae_codes import chosen_codes, conv_layers, counted

logger = logging.getLogger(__name__)

HOW = "calibrated"


@dataclass(frozen=True)
class CodedVAE:
    """A calibration, how many convolutions run in which codes by it, and the PSNR against bf16 of frames that were not
    measured, in dB; None where there was only one clip of two latents or less."""

    calibration: ConvCalibration
    counts: dict[str, int]
    psnr_db: float | None
    worst_frame_db: float | None


def calibrate_vae_folder(
    preset: Preset,
    folder: Path,
    *,
    device: torch.device,
    chunks: int = 2,
    passes: int = 4,
    latents: Path | None = None,
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> CodedVAE:
    """Calibrate the decoder of `folder`'s VAE and store it in vae.json, where export reads it. See `calibrate_folder`.

    Raises:
        LongtakeError: no VAE in `folder`, or latents that don't fit.
        IntegrityError: a file is damaged, or a convolution reads nothing but zeros, or what is not finite.
    """
    path = folder / "vae.safetensors"
    with torch.device("meta"):
        vae = CausalVAE(preset.vae)
    side = map_into(vae, path, kind="vae", preset=preset)
    vae = in_bf16(vae.to(device))
    clips = clips_of(preset, chunks, passes, latents, seed)
    half = max(1, len(clips) // 2)

    def measured() -> Iterator[Tensor]:
        for clip in clips[:half]:
            yield clip.to(device)
            progress()

    found = calibrated(vae, measured(), side.sha256)
    psnr = []
    for clip in clips[half:] or clips:
        psnr += [rows[HOW] for _, rows in compared(vae, found, (HOW,), clip.to(device))]
        progress()
    total = sum(1 for _ in conv_layers(vae))
    counts = counted(chosen_codes(preset.vae, HOW, found), total)
    figures = summary(psnr) if psnr else {}
    told = {"clips": half, "latents": str(latents or "N(0, 1)"), "counts": counts, **figures}
    replace(side, convs=found, facts={**side.facts, "conv_calibration": told}).write(side_file(path))
    return CodedVAE(found, counts, figures.get("psnr_db"), figures.get("worst_frame_db"))


def clips_of(preset: Preset, chunks: int, passes: int, latents: Path | None, seed: int) -> list[Tensor]:
    """Clips of latents [F,z,h,w], as many as there are passes."""
    if latents is not None:
        return list(read_latents(latents, preset, chunks))[:passes]
    logger.warning("calibrating the VAE's convolutions on noise: pass --latents of real clips for codes that fit them")
    shape = (chunks * preset.chunk_latents, preset.vae.z_channels, *preset.latent_hw)
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(passes)]
