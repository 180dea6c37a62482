"""The students: `longtake distill` from an NVFP4-aware model."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from longtake.files import read_json, write_json
from longtake.training.experiment.arms import OutOfTime
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


def distil(
    settings: Settings, teacher: Path, out: Path, steps: int, device: torch.device, seconds: float
) -> dict[str, Any]:
    """Distil `teacher` to `steps` steps, or go on with it. Returns {"skipped": why} where that failed.

    Raises:
        OutOfTime: `seconds` were over first.
    """
    folder, begun = student_folder(out, steps), time.monotonic()
    spent_file = folder / "spent.json"
    spent = float(read_json(spent_file)["seconds"]) if spent_file.is_file() else 0.0
    own = max(1.0, settings.distill_seconds - spent)  # what this student's training may still take
    command = distil_command(settings, teacher, folder, steps, device, min(seconds, own))
    done = subprocess.run(command, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        return {"skipped": f"`{' '.join(command[2:])}` failed: {' / '.join(said[-3:])}"}
    spent += time.monotonic() - begun
    write_json(spent_file, {"seconds": spent})
    side = SideFile.read(folder / "dit.json")
    step, planned = side.step or 0, side.steps or 0
    if step < planned and seconds < own:
        raise OutOfTime(f"the student of {steps} steps stands at step {step} of {planned}")
    for path in folder.glob("resume-*"):
        path.unlink()
    metrics = side.facts.get("metrics", {})
    return {"steps": step, "trained_seconds": round(spent), "metrics": metrics, "teacher": teacher.name}


def distil_command(
    settings: Settings, teacher: Path, folder: Path, steps: int, device: torch.device, seconds: float
) -> list[str]:
    """The command line of one student."""
    resume = ["--resume"] if list(folder.glob("resume-*.safetensors")) else []
    options = {
        "--teacher": teacher,
        "--data": "returning-digits",
        "--student-steps": steps,
        "--out": folder,
        "--device": device,
        "--precision": "nvfp4",
        "--cache": "nvfp4",
        "--guidance": settings.guidance - 1,  # `distill` counts it from the prompted side: c + s (c - u)
        "--steps": settings.distill_steps,
        "--batch": settings.distill_batch,
        "--chunks": ",".join(str(n) for n in settings.distill_chunks),
        "--stories": min(512, settings.stories),
        "--critic-updates": settings.distill_ratio,
        "--save-dtype": "bf16",
        "--seed": 0,
        "--evaluate-steps": 0,
        "--save-seconds": 60,
        "--max-seconds": int(seconds),
    }
    words = [str(word) for pair in options.items() for word in pair]
    return [sys.executable, "-m", "longtake", "distill", *words, *resume]
