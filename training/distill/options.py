"""What a distillation is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from longtake.errors import LongtakeError
from longtake.training.distill.scores import CONTEXTS
from longtake.training.models.presets import Preset
from longtake.training.models.quantize import RULES, Rules
from longtake.training.models.sampler import unipc_steps
from longtake.training.objective.flex import LONG


@dataclass(frozen=True)
class DistillOptions:
    """teacher: folder of a teacher-forced model. student_steps: the student's denoise steps. batch, chunks: stories a
    rollout, and their lengths in chunks to draw from. guidance: s in c + s (c - u) of the real score. ratio: critic
    updates for one of the generator. lora_rank: 0 trains all weights; lora_alpha None: as the rank. precision: "nvfp4"
    fake-quantizes the generator (with LoRA: the base that all three share). cache: of the rollout, "nvfp4" or "bf16".
    score_context: see `scores`. i2v: give each video's first latent frame. graph: on a GPU, run a small model's passes from
    CUDA graphs (see `captures`). The rest is as in `StageOptions`.
    """

    preset: Preset
    teacher: Path
    student_steps: int = 4
    data: str = "digits"
    batch: int = 8
    chunks: tuple[int, ...] = (4,)
    stories: int = 512
    guidance: float = 3.0
    ratio: int = 5
    lora_rank: int = 0
    lora_alpha: float | None = None
    precision: str = "bf16"
    rules: Rules = RULES["static_6"]
    recalibrate: int = 100
    cache: str = "nvfp4"
    score_context: str = "clean"
    i2v: bool = False
    vae: Path | None = None
    seed: int = 0
    amp: bool = True
    gradient_checkpointing: bool = False
    accumulate: int = 1
    cache_dir: Path | None = None
    workers: int = 0
    graph: bool = True

    def __post_init__(self) -> None:
        """Raise LongtakeError for what nothing can be distilled with."""
        unipc_steps(self.student_steps, self.preset.sampling.shift)
        for option, given, least, usual in (
            ("--batch", self.batch, 1, 8),
            ("--chunks", min(self.chunks), 1, 4),
            ("--stories", self.stories, 1, 512),
            ("--critic-updates", self.ratio, 1, 5),
            ("--recalibrate", self.recalibrate, 1, 100),
            ("--accumulate", self.accumulate, 1, 1),
            ("--workers", self.workers, 0, 4),
            ("--lora-rank", self.lora_rank, 0, 128),
        ):
            if given < least:
                raise LongtakeError(f"bad {option}", got=given, expected=f"{least} or more", fix=f"{option} {usual}")
        for option, word, words in (
            ("--score-context", self.score_context, CONTEXTS),
            ("--cache", self.cache, ("nvfp4", "bf16")),
            ("--precision", self.precision, ("bf16", "nvfp4")),
        ):
            if word not in words:
                raise LongtakeError(f"bad {option}", got=word, expected=" or ".join(words), fix=f"{option} {words[0]}")
        if not 0 <= self.guidance <= 100:
            raise LongtakeError("bad --guidance", got=self.guidance, expected="0 to 100", fix="--guidance 3")

    def computes_in_bf16(self, device: torch.device) -> bool:
        """Whether forward passes on `device` run under bf16 autocast."""
        return self.amp and device.type == "cuda"

    def captures(self, device: torch.device) -> bool:
        """Whether passes run from CUDA graphs: where launches take the time, and activations are small enough to have a
        place of their own. Not with LoRA, whose three networks are one."""
        short = max(self.chunks) * self.preset.chunk_tokens < LONG
        plain = not (self.lora_rank or self.gradient_checkpointing or self.accumulate > 1)
        return self.graph and device.type == "cuda" and short and plain
