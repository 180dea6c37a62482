"""What a training stage is told, beside what it has in common with distillation; a stage reads what concerns it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch

from longtake.errors import LongtakeError
from longtake.formats.model_name import checkpoints_named
from longtake.options import FREE, Bounds, OneOf, Text, check, option
from longtake.plugins.nvfp4.reference import RULE_LIMITS
from longtake.training.data.returns import require_room
from longtake.training.models.families import family_of
from longtake.training.models.quantize import RULES, Rules
from longtake.training.objective.error_recycling import RecyclingConfig
from longtake.training.objective.noise import WEIGHTINGS
from longtake.training.options import DIT, VAE, DataOptions, ModelOptions, Seeded


@dataclass(frozen=True)
class VAEOptions:
    """Stage vae"""

    decoder_only: bool = option(False, recorded=(VAE,))
    """leave the encoder and the latents' statistics as they are, so that a DiT trained on them still fits"""


@dataclass(frozen=True)
class DiTOptions:
    """Stage dit"""

    context: Annotated[str, OneOf(("full", "window", "whole"))] = option("full", recorded=(DIT,))
    """history a chunk attends to: all of it, as in the reference, or the runtime's window of sinks and previous chunk,
    with the shot offset of the rotary positions; whole: worlds only, a walk is one chunk that is seen forwards and backwards
    (a teacher)"""
    loss_weighting: Annotated[str, OneOf(WEIGHTINGS)] = option("bell", recorded=(DIT,))
    """weight of a noise level in the loss: the reference's bell, nearly 0 at pure noise, or uniform, with which a model
    trained from random weights learns to follow its prompt sooner"""
    weight_rule: Annotated[str, OneOf(tuple(sorted(RULE_LIMITS)))] | None = option(None)
    """nvfp4: another rule for the weights; exports pack them by it (default: that of --nvfp4-rules)"""
    weight_scales: Annotated[str, OneOf(("1d", "2d"))] | None = option(None)
    """nvfp4: 2d: a scale for 16 x 16 weights, alike in W and W^T (default: as --nvfp4-rules says)"""
    quantize_gradients: bool = option(False)
    """nvfp4: gradients in 4 bits, too, with stochastic rounding; an emulation, which is slower than without"""
    i2v: Annotated[float, Bounds(0, 1, 0.5)] = option(0.0, metavar="SHARE", alone=1.0, recorded=(DIT,))
    """share of samples trained as image to video: first frame given, and not in the loss (without a number: 1; default
    0)"""
    error_recycling: bool = option(False)
    """add the model's errors of earlier steps to the noise, to what is noised and to the clean history"""
    errors: RecyclingConfig = field(default_factory=RecyclingConfig)
    attention: Annotated[str, OneOf(("auto", "flex", "blocks"))] = option("auto")
    """FlexAttention, or block by block; auto: the former on a GPU for 8,192 tokens or more"""
    freeze_text: bool = option(False)
    """don't train the text encoder (a released one never is)"""
    text_encoder: Path | None = option(None, metavar="FOLDER")
    """a preset of kind pretrained, from random weights: folder of a T5 or sentence encoder as transformers saves it, which
    stays as it is (default: none)"""
    text_dropout: Annotated[float, Bounds(0, 1)] = option(0.1, metavar="SHARE", recorded=(DIT,))
    """share of samples trained without a prompt"""


@dataclass(frozen=True)
class FolderOptions(DataOptions):
    """Data"""

    max_chunks_per_shot: Annotated[int, Bounds(0)] = option(0, metavar="N", recorded=(DIT,))
    """folders: a clip that fills more than N chunks in a row is cut there into shots; 0: never"""
    max_bad_share: Annotated[float, Bounds(0, 1)] = option(0.5, metavar="S", resume=FREE)
    """folders: stop when more than this share of the clips cannot be used (skipped ones are named)"""


@dataclass(frozen=True)
class StageOptions(Seeded, VAEOptions, DiTOptions, FolderOptions, ModelOptions):
    """Model"""

    init: Annotated[Path, Text(checkpoints_named)] | None = option(None, metavar="FOLDER|NAME", resume=FREE)
    """folder of checkpoints to start from, or a shipped model's name (default: random weights)"""
    continued: bool = option(False)
    """--init is the part of this run before: the same data and lengths, another seed, a new optimizer with a warm-up;
    the checkpoint's record of parts goes on"""
    cpu_bf16: bool = option(False)
    """compute in bf16 on the CPU, too (there it is fp32 otherwise)"""

    def __post_init__(self) -> None:
        """Raise LongtakeError for what nothing can be trained with."""
        check(self)
        require_room(self.data, self.chunks, self.return_distance)
        if self.context == "whole" and "camera" not in family_of(self.preset).can:
            raise LongtakeError(
                "only worlds are trained on whole videos at once",
                got=f"--context whole with preset {self.preset.name}",
                expected="full or window",
                fix="pass --context full",
            )
        if self.precision != "nvfp4" and (self.quantize_gradients or self.rules != RULES["static_6"]):
            raise LongtakeError(
                "4-bit rules and gradients are of training under NVFP4",
                got=f"--precision {self.precision}",
                fix="--precision nvfp4, or leave them out",
            )

    @property
    def rules(self) -> Rules:
        """NVFP4 rules by name, with what overrides them."""
        rules = super().rules
        rule, scales = self.weight_rule or rules.weight.rule, self.weight_scales
        tiles = rules.weight.block_2d if scales is None else scales == "2d"
        return replace(rules, weight=replace(rules.weight, rule=rule, block_2d=tiles))

    @property
    def recycling(self) -> RecyclingConfig | None:
        """Error recycling's settings; None: off."""
        return self.errors if self.error_recycling else None

    @property
    def trains_text(self) -> bool:
        """Whether the text encoder learns with the DiT: a released one never does."""
        return self.preset.text.kind == "words" and not self.freeze_text

    def computes_in_bf16(self, device: torch.device) -> bool:
        """Whether forward passes on `device` run under bf16 autocast."""
        return not self.fp32 if device.type == "cuda" else self.cpu_bf16
