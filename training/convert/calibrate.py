"""Activation amax of a converted DiT: what released files lack, and native W4A4 and 8-bit engines can't do without.

A few teacher-forced passes over clips of latents at random noise levels, as training calibrates; the prompt is empty.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from longtake.errors import IntegrityError, LongtakeError
from longtake.training.convert.files import read_container
from longtake.training.models.checkpoint import map_into, side_file
from longtake.training.models.load import read_side
from longtake.training.models.presets import Preset
from longtake.training.models.quantize import insert_quantizers, read_amax
from longtake.training.models.text.words import text_encoder_for
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.models.wan.linears import Amax
from longtake.training.models.wan.window import full_history
from longtake.training.objective.teacher_forcing import Clips, draw_noise, predict_velocity

logger = logging.getLogger(__name__)

END = 1  # umT5's </s>, which is all that an empty prompt holds


def calibrate_folder(
    preset: Preset, folder: Path, *, device: torch.device, chunks: int = 2, passes: int = 4, latents: Path | None = None,
    seed: int = 0, progress: Callable[[], object] = lambda: None,
) -> Amax:  # fmt: skip
    """Measure the amax of `folder`'s DiT and store it in dit.json, where export reads it.

    Args:
        chunks: of a clip. passes: clips measured, each at noise levels of its own.
        latents: a file with `latents` [F, C, H, W] or [B, F, C, H, W], normalized; N(0, 1) if None.

    Raises:
        LongtakeError: no DiT in `folder`, or latents that don't fit.
        IntegrityError: a file is damaged, or an amax isn't finite.
    """
    path = folder / "dit.safetensors"
    with torch.device("meta"):
        dit = CausalDiT(preset.dit)
    side = map_into(dit, path, kind="dit", preset=preset)
    given = None if latents is None else read_latents(latents, preset, chunks)
    text = empty_context(preset, folder)
    amax = measure(dit.to(device).eval(), preset, text.to(device), chunks, passes, given, seed, progress)
    how = {"chunks": chunks, "passes": passes, "seed": seed, "latents": str(latents or "N(0, 1)")}
    replace(side, amax=amax, facts={**side.facts, "calibration": how}).write(side_file(path))
    return amax


@torch.no_grad()
def measure(
    dit: CausalDiT, preset: Preset, text: Tensor, chunks: int, passes: int, latents: Tensor | None, seed: int,
    progress: Callable[[], object] = lambda: None,
) -> Amax:  # fmt: skip
    """Amax of every quantized linear's input and weight over `passes` clips; inserts quantizers into `dit`.

    text: embeddings of the prompt [E, text_dim], on the DiT's device. latents: [B, F, C, H, W], or None for N(0, 1).
    """
    device = text.device
    generator = torch.Generator().manual_seed(seed)
    shape = (1, chunks * preset.chunk_latents, preset.dit.channels, *preset.latent_hw)
    history = full_history(chunks).to(device)
    tokens = torch.zeros(1, chunks, 1, dtype=torch.int32, device=device)

    def run(module: nn.Module) -> None:
        for index in range(passes):
            x = torch.randn(shape, generator=generator) if latents is None else latents[index % len(latents)][None]
            clips = Clips(x.to(device), tokens, history, unmasked=chunks)
            noise = draw_noise(clips, preset.sampling.shift, generator)
            predict_velocity(module, preset, text.expand(1, chunks, -1, -1), clips, noise)  # type: ignore[arg-type]
            progress()

    amax = read_amax(insert_quantizers(dit, run))
    bad = [name for name, sides in amax.items() if not all(0 < value < float("inf") for value in sides.values())]
    if bad:
        what = f"calibration gave no usable amax for {len(bad)} linears"
        fix = "check the weights, and the latents if given"
        raise IntegrityError(what, got=", ".join(bad[:6]), expected="positive, finite", fix=fix)
    return amax


@torch.no_grad()
def empty_context(preset: Preset, folder: Path) -> Tensor:
    """Embeddings of the empty prompt, fp32 [E, text_dim]; zeros (no word at all) where `folder` has no text encoder."""
    path = folder / "text_encoder.safetensors"
    if not path.is_file():
        logger.warning("%s has no text encoder: calibrating with all-padding text", folder)
        return torch.zeros(preset.text.length, preset.text.dim)
    words = read_side(path, "text_encoder", preset).vocabulary
    with torch.device("meta"):
        text = text_encoder_for(preset, words, folder)
    map_into(text, path, kind="text_encoder", preset=preset)
    tokens = torch.zeros(1, preset.text.length, dtype=torch.int32)
    if preset.text.kind == "umt5":
        tokens[0, 0] = END
    return text.eval()(tokens)[0].float()


def read_latents(path: Path, preset: Preset, chunks: int) -> Tensor:
    """Clips [B, F, C, H, W] of `chunks` chunks from a safetensors or .pt file with the tensor `latents`.

    Raises:
        LongtakeError: there is no such tensor, or of another shape.
    """
    latents = read_container(path).get("latents")
    frames = chunks * preset.chunk_latents
    wanted = (preset.dit.channels, *preset.latent_hw)
    if isinstance(latents, Tensor) and latents.ndim == 4:
        latents = latents[None]
    if (
        not isinstance(latents, Tensor)
        or latents.ndim != 5
        or tuple(latents.shape[2:]) != wanted
        or latents.shape[1] < frames
    ):
        what, fix = (
            f"{path} has no latents to calibrate with",
            "encode clips with this preset's VAE, or leave out --latents",
        )
        got = list(latents.shape) if isinstance(latents, Tensor) else "no tensor named latents"
        expected = f"latents [B, F >= {frames}, {', '.join(map(str, wanted))}]"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    return latents[:, :frames].float()
