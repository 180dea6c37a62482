"""A preset's models in PyTorch: read from a folder of checkpoints, or untrained."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longtake.errors import IntegrityError
from longtake.paths import REPOSITORY
from longtake.plugins.nvfp4.weight_format import UNRECORDED, WeightFormats
from longtake.training.models.conv_calibration import ConvCalibration
from longtake.training.models.families import family_of
from longtake.training.models.presets import Preset
from longtake.training.models.side_file import SideFile
from longtake.training.models.text.words import AnyTextEncoder, text_encoder_for
from longtake.training.models.wan.linears import Amax
from longtake.training.models.wan.vae_codes import codable_names

logger = logging.getLogger(__name__)


@dataclass
class Models:
    """A preset's three models with their weights.

    amax: linear name -> {"input": amax of its input, "weight": amax of its weight}; empty when never calibrated.
    precision: what `apply_precision` made of them; "bf16" means untouched weights.
    formats: how each linear's weight becomes 4 bits. convs: what the VAE decoder's convolutions read; None if never calibrated.
    """

    preset: Preset
    dit: Any
    vae: Any
    text: AnyTextEncoder
    amax: Amax = field(default_factory=dict)
    precision: str = "bf16"
    formats: WeightFormats = UNRECORDED
    convs: ConvCalibration | None = None

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The text encoder's words, in token order; none where a tokenizer's file holds them."""
        return self.text.vocabulary


LARGE = 10**9  # parameters; a model with more keeps the dtype of its files, where a smaller one is worked on in fp32


KINDS = ("text_encoder", "vae", "dit")


def load_models(
    preset: Preset, folder: Path | None = None, dtype: torch.dtype | None = None, kinds: Collection[str] = KINDS
) -> Models:
    """Load vae, text_encoder and dit of `preset` from `folder` (the shipped checkpoints if None), in eval mode.

    Weights stay in the mapped files until they are read; only those that change their dtype are copied.

    Args:
        dtype: of all weights. None: fp32, or as stored for a preset of more than `LARGE` parameters.
        kinds: what is loaded; the others stay without memory, on the meta device.

    Raises:
        LongtakeError: a file is missing, or its keys or shapes don't fit the preset.
        IntegrityError: a file is damaged or is not safetensors.
    """
    from longtake.training.models.checkpoint import map_into

    folder = Path(folder) if folder is not None else REPOSITORY / preset.checkpoints
    words = None
    if "text_encoder" in kinds:
        words = read_side(folder / "text_encoder.safetensors", "text_encoder", preset).vocabulary
    family = family_of(preset)
    with torch.device("meta"):
        text = text_encoder_for(preset, words, folder)
        vae, dit = family.vae(preset), family.dit(preset)
    every: dict[str, nn.Module] = {"text_encoder": text, "vae": vae, "dit": dit}
    modules = {kind: every[kind] for kind in KINDS if kind in kinds}
    dtype = dtype or weights_dtype(*modules.values())
    sides = {}
    for name, module in modules.items():
        sides[name] = map_into(module, folder / f"{name}.safetensors", kind=name, preset=preset)
        module.to(dtype=dtype).eval()
    convs = calibrated_convs(sides["vae"], preset) if "vae" in sides else None
    return Models(preset, dit, vae, text, sides["dit"].amax, formats=sides["dit"].formats, convs=convs)


def calibrated_convs(side: SideFile, preset: Preset) -> ConvCalibration | None:
    """What a VAE's side file tells of its convolutions. Raises IntegrityError if that is of another VAE, or of no use."""
    if side.convs is not None:
        side.convs.require(codable_names(preset.vae), side.sha256)
    return side.convs


def weights_dtype(*modules: nn.Module) -> torch.dtype | None:
    """fp32, or None (leave it as stored) when the modules together have more than `LARGE` parameters."""
    count = sum(parameter.numel() for module in modules for parameter in module.parameters())
    return None if count > LARGE else torch.float32


def read_side(path: Path, kind: str, preset: Preset) -> SideFile:
    """The checked side file of a checkpoint; that of a text encoder of words holds its vocabulary."""
    from longtake.training.models.checkpoint import RETRAIN, read_side_file

    side = read_side_file(path, kind=kind, preset=preset)
    if kind == "text_encoder" and preset.text.kind == "words" and side.vocabulary is None:
        what = f"the side file of checkpoint {path} has no vocabulary"
        raise IntegrityError(what, got="none", expected='"vocabulary": a list of words', fix=RETRAIN)
    return side


def meta_models(preset: Preset, vocabulary: tuple[str, ...] | None = None) -> Models:
    """Models of `preset` without memory for their weights: what graphs are exported from.

    `vocabulary`: of a text encoder of words, whose size is part of the graph; the shipped one's if None.
    """
    family = family_of(preset)
    with torch.device("meta"):
        text = text_encoder_for(preset, vocabulary)
        return Models(preset, family.dit(preset).eval(), family.vae(preset).eval(), text.eval())
