"""A stage of distillation that takes milliseconds a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longtake.training.distill.options import DistillOptions
from longtake.training.distill.stage import DistillStage
from longtake.training.models.presets import Preset
from longtake.training.optimizer import OptimizerConfig

RATE = OptimizerConfig(lr=1e-3, betas=(0.0, 0.999), warmup=1, ema=0.0)
FEW = {"student_steps": 2, "batch": 2, "chunks": (2,), "stories": 2, "critic_updates": 2, "recalibrate": 2}


def stage_of(preset: Preset, teacher: Path, **options: Any) -> DistillStage:
    """Two steps, two stories; `options` besides or instead."""
    return DistillStage(DistillOptions(preset, teacher=teacher, vae=teacher, **{**FEW, **options}))
