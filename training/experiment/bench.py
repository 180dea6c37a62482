"""What the units of the experiment share: settings, results so far, the device, and how models are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from longtake.training.experiment.arms import PRESET, arm_folder, shipped, vae_of
from longtake.training.experiment.batched import Sampling
from longtake.training.experiment.evaluate import Eyes, judge_from
from longtake.training.experiment.settings import Settings
from longtake.training.experiment.summary import results_in, teacher_seed
from longtake.training.models.load import Models, load_models
from longtake.training.models.quantize import apply_precision

# Condition -> arm, precision of the linears, format of the cache.
CONDITIONS = {
    "bf16": ("bf16", "bf16", "bf16"),
    "bf16-fp4cache": ("bf16", "bf16", "nvfp4"),
    "ptq": ("bf16", "nvfp4", "nvfp4"),
    "nvfp4": ("nvfp4", "nvfp4", "nvfp4"),
}


@dataclass(frozen=True)
class Bench:
    """What a unit runs with."""

    settings: Settings
    out: Path
    device: torch.device

    @cached_property
    def results(self) -> dict[str, dict[str, Any]]:
        """What units before this one found."""
        return results_in(self.out)

    @cached_property
    def eyes(self) -> Eyes:
        """The judge (which must have been trained) and the VAE."""
        judge = judge_from(self.out / "judge.safetensors", self.device)
        return Eyes(judge, vae_of(shipped(), self.device), self.device)

    def models(self, folder: Path, precision: str) -> Models:
        """Models of a folder with the arithmetic of `precision`, on the device."""
        models = apply_precision(load_models(PRESET, folder), precision)
        for module in (models.dit, models.text, models.vae):
            module.to(self.device).requires_grad_(False)
        return models

    def condition(self, name: str, seed: int) -> Models:
        """The models of a condition and a seed."""
        arm, precision, _ = CONDITIONS[name]
        return self.models(arm_folder(self.out, arm, seed), precision)

    def sampling(self, cache: str, sinks: str = "both") -> Sampling:
        """How models that aren't distilled are sampled."""
        s = self.settings
        return Sampling(s.steps, s.guidance, PRESET.sampling.shift, cache, sinks)

    @property
    def teacher(self) -> int:
        """The seed whose NVFP4-aware model is distilled."""
        return teacher_seed(self.results, self.settings) or 0
