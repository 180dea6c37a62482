"""The students: `longtake distill` from the best NVFP4-aware model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from longtake.runtime.cli import COMMANDS
from longtake.runtime.errors import LongtakeError
from longtake.runtime.files import read_json
from longtake.training.experiment.arms import OutOfTime
from longtake.training.experiment.batched import Sampling
from longtake.training.experiment.settings import Settings

MISSING = "this version has no `longtake distill`"


def student_folder(out: Path, steps: int) -> Path:
    """Where the student of `steps` steps is kept."""
    return out / "students" / str(steps)


def student_sampling(out: Path, steps: int) -> Sampling:
    """How a student is sampled: its steps, without guidance, unless its side file says otherwise."""
    told = read_json(student_folder(out, steps) / "dit.json").get("sampling", {})
    return Sampling(
        int(told.get("steps", steps)), float(told.get("guidance", 1.0)), float(told.get("shift", 5.0)), "nvfp4"
    )


def distil(
    settings: Settings, teacher: Path, out: Path, steps: int, device: torch.device, seconds: float
) -> dict[str, Any]:
    """Distil `teacher` to `steps` steps, or go on with it.

    Raises:
        OutOfTime: `seconds` were over first.
        LongtakeError: the command failed.
    """
    if "distill" not in COMMANDS:
        return {"skipped": MISSING}
    folder = student_folder(out, steps)
    command = distil_command(settings, teacher, folder, steps, device, seconds)
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise LongtakeError(
            f"distillation to {steps} steps failed", got=done.stderr.strip()[-400:], fix=" ".join(command)
        )
    side = read_json(folder / "dit.json")
    if side["step"] < side["steps"]:
        raise OutOfTime(f"the student of {steps} steps stands at step {side['step']} of {side['steps']}")
    return {"steps": side["step"], "metrics": side.get("metrics", {}), "teacher": teacher.name}


def distil_command(
    settings: Settings, teacher: Path, folder: Path, steps: int, device: torch.device, seconds: float
) -> list[str]:
    """The command line of one student."""
    resume = ["--resume"] if list(folder.glob("resume-*.safetensors")) else []
    return [
        *(sys.executable, "-m", "longtake.runtime.cli", "distill"),
        *("--init", str(teacher), "--out", str(folder), "--device", str(device), "--student-steps", str(steps)),
        *("--steps", str(settings.distill_steps), "--batch", str(settings.batch), "--seed", "0"),
        *("--max-seconds", f"{seconds:.0f}", *resume),
    ]
