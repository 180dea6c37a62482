"""What a distillation is told."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import torch

from longtake.errors import LongtakeError
from longtake.options import Bounds, OneOf, check, option
from longtake.training.distill.scores import CONTEXTS
from longtake.training.models.families import family_of
from longtake.training.models.presets import Preset
from longtake.training.models.sampler import schedule_of
from longtake.training.objective.flex import LONG
from longtake.training.optimizer import AdamWOptions, OptimizerConfig
from longtake.training.options import Chunks, DataOptions, ModelOptions, Seeded, Stories

RATES = {"tiny": (1e-4, 1e-4)}  # learning rates of student and critic; the reference's for all other presets
REFERENCE_RATES = (1e-5, 2e-6)


@dataclass(frozen=True)
class MethodOptions:
    """Method"""

    teacher: Path = option(names=("--init", "--teacher"), metavar="FOLDER")
    """checkpoints of the trained model: dit and text_encoder"""
    student: Path | None = option(None, metavar="FOLDER")
    """worlds: what the student begins as, the chunk-causal model (default: the teacher)"""
    student_steps: int = option(4, names=("--steps-of-student", "--student-steps"), metavar="N")
    """denoise steps a chunk of the student"""
    guidance: Annotated[float, Bounds(0, 100)] = option(3.0, metavar="S")
    """of the real score: c + S (c - u), which is 1 + S as `generate` counts it"""
    critic_updates: Annotated[int, Bounds(1)] = option(5, metavar="N")
    """for one of the student"""
    score_context: Annotated[str, OneOf(CONTEXTS)] = option("clean")
    """scores see a noised chunk after the student's clean chunks, as the teacher was trained, or all chunks noised alike,
    as in the reference"""
    cache: Annotated[str, OneOf(("nvfp4", "bf16"))] = option("nvfp4")
    """K/V cache of the student's stories: 4 bits as engines keep it, or unquantized"""
    i2v: bool = option(False)
    """give each video's first latent frame (image to video)"""
    lora_rank: Annotated[int, Bounds(0, usual=128)] = option(0, metavar="R")
    """train LoRA of this rank for student and critic on one frozen base: a third of the weights' memory; 0: all weights"""
    lora_alpha: float | None = option(None, metavar="A")
    """LoRA's scale is A / R (default: A = R)"""


@dataclass(frozen=True)
class DistillOptions(Seeded, MethodOptions, DataOptions, ModelOptions):
    """All that the stage is told; data and model are as `longtake train` has them."""

    stories: Stories = 512
    chunks: Chunks = (4,)

    def __post_init__(self) -> None:
        """Raise LongtakeError for what nothing can be distilled with."""
        schedule_of(self.student_steps, self.preset.sampling.shift)
        check(self)
        if self.student is not None and "camera" not in family_of(self.preset).can:
            raise LongtakeError(
                "the student begins as the teacher", got=f"--student {self.student}", fix="leave --student out"
            )
        if self.lora_alpha is not None and not self.lora_rank:
            raise LongtakeError("--lora-alpha without LoRA", got=self.lora_alpha, fix="pass --lora-rank 128, too")

    def computes_in_bf16(self, device: torch.device) -> bool:
        """Whether forward passes on `device` run under bf16 autocast."""
        return not self.fp32 and device.type == "cuda"

    def captures(self, device: torch.device) -> bool:
        """Whether passes run from CUDA graphs: where launches take the time, and activations are small enough to have a
        place of their own. Not with LoRA, whose three networks are one."""
        short = max(self.chunks) * self.preset.chunk_tokens < LONG
        plain = not (self.lora_rank or self.gradient_checkpointing or self.accumulate > 1)
        return self.graph and device.type == "cuda" and short and plain


@dataclass(frozen=True)
class DistillOptimizers(AdamWOptions):
    """Optimizers, of the student and of the critic"""

    betas: tuple[float, float] = (0.0, 0.999)
    warmup: int = 100
    final_lr: float = 1.0

    lr: float | None = option(None, metavar="RATE")
    """of the student (default 1e-4 for tiny, else 1e-5)"""
    critic_lr: float | None = option(None, metavar="RATE")
    """of the critic (default 1e-4 for tiny, else 2e-6)"""
    ema: float | None = option(None, metavar="DECAY")
    """decay of the student's averaged weights (default 0.99; with LoRA 0)"""

    def student(self, preset: Preset, lora: bool) -> OptimizerConfig:
        """The student's optimizer."""
        usual = 0.0 if lora else 0.99
        return self._config(preset, 0, self.lr, usual if self.ema is None else self.ema)

    def critic(self, preset: Preset) -> OptimizerConfig:
        """The critic's, which keeps no average."""
        return self._config(preset, 1, self.critic_lr, 0.0)

    def _config(self, preset: Preset, which: int, given: float | None, ema: float) -> OptimizerConfig:
        lr = RATES.get(preset.name, REFERENCE_RATES)[which] if given is None else given
        shared = {one.name: getattr(self, one.name) for one in fields(AdamWOptions)}
        return OptimizerConfig(**shared, lr=lr, ema=ema)
