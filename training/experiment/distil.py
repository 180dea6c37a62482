"""The students: distillation from an NVFP4-aware model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from longtake.files import read_json, write_json
from longtake.training.distill.options import DistillOptimizers, DistillOptions
from longtake.training.distill.stage import DistillStage
from longtake.training.distill.trainer import DistillTrainer
from longtake.training.experiment.arms import PRESET, delete_resume_points, run_config
from longtake.training.experiment.batched import Sampling
from longtake.training.experiment.settings import Settings
from longtake.training.models.side_file import SideFile


def student_folder(out: Path, steps: int) -> Path:
    """Where the student of `steps` steps is kept."""
    return out / "students" / str(steps)


def student_sampling(out: Path, steps: int) -> Sampling:
    """How a student is sampled: its steps, without guidance, unless its side file says otherwise."""
    told = SideFile.read(student_folder(out, steps) / "dit.json").sampling or {}
    return Sampling(
        int(told.get("steps", steps)), float(told.get("guidance", 1.0)), float(told.get("shift", 5.0)), "nvfp4"
    )


def distil(settings: Settings, teacher: Path, out: Path, steps: int, device: torch.device) -> dict[str, Any]:
    """Distil `teacher` to `steps` steps, or go on with it."""
    folder, begun = student_folder(out, steps), time.monotonic()
    spent_file = folder / "spent.json"
    spent = float(read_json(spent_file)["seconds"]) if spent_file.is_file() else 0.0
    options = DistillOptions(
        preset=PRESET,
        teacher=teacher,
        student_steps=steps,
        guidance=settings.guidance - 1,  # counted from the prompted side: c + s (c - u)
        critic_updates=settings.distill_ratio,
        data="returning-digits",
        batch=settings.distill_batch,
        stories=min(512, settings.stories),
        chunks=settings.distill_chunks,
        rollout=settings.distill_rollout or None,
        return_distance=(settings.return_distance or None) if settings.distill_rollout else None,
        precision="nvfp4",
    )
    optimizers = DistillOptimizers()
    config = run_config(
        folder,
        settings,
        steps=settings.distill_steps,
        optimizer=optimizers.student(PRESET, lora=False),
        max_seconds=max(1.0, settings.distill_seconds - spent),  # what this student's training may still take
    )
    torch.manual_seed(0)
    trainer = DistillTrainer(DistillStage(options), config, optimizers.critic(PRESET), device)
    try:
        metrics = trainer.fit()
    finally:
        spent += time.monotonic() - begun
        write_json(spent_file, {"seconds": spent})
    delete_resume_points(folder)
    return {"steps": trainer.step, "trained_seconds": round(spent), "metrics": metrics, "teacher": teacher.name}
