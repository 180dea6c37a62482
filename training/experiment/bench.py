"""What the units of the experiment share: settings, results so far, the device, and models loaded once a process."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from longtake.files import read_json
from longtake.training.data.latent_cache import frozen_vae, vae_checkpoint
from longtake.training.experiment.arms import PRESET, arm_folder, free_memory, shipped
from longtake.training.experiment.batched import Sampling
from longtake.training.experiment.classifier import DigitClassifier
from longtake.training.experiment.evaluate import Eyes
from longtake.training.experiment.settings import Settings
from longtake.training.experiment.summary import teacher_seed
from longtake.training.models.load import Models, load_models
from longtake.training.models.quantize import apply_precision

# Condition -> arm, precision of the linears, format of the cache.
CONDITIONS = {
    "bf16": ("bf16", "bf16", "bf16"),
    "bf16-fp4cache": ("bf16", "bf16", "nvfp4"),
    "ptq": ("bf16", "nvfp4", "nvfp4"),
    "nvfp4": ("nvfp4", "nvfp4", "nvfp4"),
}


@dataclass
class Bench:
    """What units share. What is loaded is kept until another unit needs something else."""

    settings: Settings
    out: Path
    device: torch.device
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    _eyes: Eyes | None = None
    _loaded: tuple[tuple[Path, str], Models] | None = None

    def read_results(self) -> None:
        """See what other processes have finished."""
        self.results = {path.stem: read_json(path) for path in sorted((self.out / "units").glob("*.json"))}

    def forget_models(self) -> None:
        """Give back the memory of the last models."""
        self._loaded = None
        free_memory()

    @property
    def eyes(self) -> Eyes:
        """The judge (which must have been trained) and the VAE."""
        if self._eyes is None:
            judge = DigitClassifier()
            judge.load_state_dict(load_file(self.out / "judge.safetensors"))
            vae = frozen_vae(vae_checkpoint(PRESET, shipped()), PRESET, self.device)[0]
            self._eyes = Eyes(judge.to(self.device).eval().requires_grad_(False), vae, self.device)
        return self._eyes

    def models(self, folder: Path, precision: str) -> Models:
        """Models of a folder with the arithmetic of `precision` on the device; the last ones are kept."""
        key = (folder, precision)
        if self._loaded is None or self._loaded[0] != key:
            self.forget_models()
            models = apply_precision(load_models(PRESET, folder), precision)
            for module in (models.dit, models.text, models.vae):
                module.to(self.device).requires_grad_(False)
            self._loaded = (key, models)
        return self._loaded[1]

    def condition(self, name: str, seed: int) -> Models:
        """The models of a condition and a seed."""
        arm, precision, _ = CONDITIONS[name]
        return self.models(arm_folder(self.out, arm, seed), precision)

    def sampling(self, cache: str, sinks: str = "both") -> Sampling:
        """How models that aren't distilled are sampled."""
        s = self.settings
        return Sampling(s.steps, s.guidance, PRESET.sampling.shift, cache, sinks)

    def teacher(self) -> int:
        """The seed whose NVFP4-aware model is distilled."""
        return teacher_seed(self.results, self.settings) or 0
