"""Training of the arms by the trainer's Python API: a common bf16 base a seed, then bf16 or NVFP4 for the same steps."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from longtake.runtime.files import atomic_path
from longtake.runtime.places import REPOSITORY
from longtake.training.experiment.settings import Settings
from longtake.training.latent_cache import LatentCache, frozen_vae, vae_checkpoint
from longtake.training.optimizer import OptimizerConfig
from longtake.training.presets import TINY, Preset
from longtake.training.stages.base import StageOptions
from longtake.training.stages.dit import EVALUATION_SEED, HELD_OUT, DiTStage
from longtake.training.trainer import TrainConfig, Trainer

PRESET: Preset = TINY
CACHE_TENSORS = ("latents", "tokens", "history", "offsets")
DATA_SEED = 11  # of the training stories, which all seeds share


class OutOfTime(Exception):
    """The time of this call is over; what was done is saved, and the next call goes on."""


class ArmStage(DiTStage):
    """The stage "dit" whose encoded stories are those of all arms, encoded once and kept in a file."""

    kept: dict[Path, LatentCache] = {}

    def __init__(self, options: StageOptions, folder: Path) -> None:
        super().__init__(options)
        self.folder = folder

    def cache(self, split: str, stories: int, seed: int) -> LatentCache:
        """See DiTStage.cache; the training stories don't depend on the arm's seed."""
        path = self.folder / f"{split}-{stories}.safetensors"
        if path not in self.kept:
            if not path.is_file():
                made = super().cache(split, stories, DATA_SEED if split == "train" else seed)
                save_cache(made, path)  # type: ignore[arg-type]
            self.kept[path] = read_cache(path, self.device)
        return self.kept[path]


def save_cache(cache: LatentCache, path: Path) -> None:
    """Write encoded stories of the runtime's window to one file."""
    tensors = {name: getattr(cache, name).cpu().contiguous() for name in CACHE_TENSORS}
    with atomic_path(path) as partial:
        save_file(tensors, partial)


def read_cache(path: Path, device: torch.device) -> LatentCache:
    """Read `save_cache` back."""
    tensors = load_file(path)
    return LatentCache(PRESET, **{name: tensors[name].to(device) for name in CACHE_TENSORS})


def shipped() -> Path:
    """The folder of the checkpoints that come with the code."""
    return REPOSITORY / PRESET.checkpoints


def arm_folder(out: Path, arm: str, seed: int) -> Path:
    """Where an arm ("base", "bf16" or "nvfp4") of a seed is kept."""
    return out / "arms" / f"{arm}-{seed}"


def stage_of(settings: Settings, out: Path, arm: str, seed: int) -> ArmStage:
    """The stage of an arm: the base begins as told, the others with their seed's base."""
    begin = {"random": None, "shipped": shipped()}.get(settings.start, Path(settings.start))
    options = StageOptions(
        preset=PRESET,
        batch=settings.batch,
        precision="nvfp4" if arm == "nvfp4" else "bf16",
        init=begin if arm == "base" else arm_folder(out, "base", seed),
        vae=shipped(),
        seed=seed,
        stories=settings.stories,
        chunks=settings.chunks,
        context="window",
        recalibrate=settings.recalibrate,
        loss_weighting="uniform",
    )
    return ArmStage(options, out / "stories")


def train_arm(
    settings: Settings, out: Path, arm: str, seed: int, device: torch.device, seconds: float
) -> dict[str, float]:
    """Train an arm, or go on with it. Its folder then holds complete checkpoints. Returns held-out metrics.

    Raises:
        OutOfTime: `seconds` were over before its last step; a resume point is saved.
    """
    folder, branch = arm_folder(out, arm, seed), arm != "base"
    config = TrainConfig(
        out=folder,
        preset=PRESET.name,
        steps=settings.branch_steps if branch else settings.base_steps,
        seed=1000 * branch + seed,  # both branches draw the same batches and the same noise
        optimizer=OptimizerConfig(lr=settings.branch_lr if branch else settings.base_lr, clip=1.0),
        resume=bool(list(folder.glob("resume-*.safetensors"))),
        max_seconds=seconds,
        evaluate_steps=0,
        save_seconds=100.0,
        command="longtake.training.experiment",
        settings={"arm": arm, **settings.as_json()},
    )
    begun = time.monotonic()
    trainer = Trainer(stage_of(settings, out, arm, seed), config, device)
    metrics = trainer.fit()
    step = trainer.step
    del trainer
    free_memory()
    if step < config.steps:
        raise OutOfTime(f"{arm}-{seed} stands at step {step} of {config.steps}")
    for path in folder.glob("resume-*"):  # several times the weights, and no longer needed
        path.unlink()
    return {"steps": float(step), "seconds_of_last_part": time.monotonic() - begun, **metrics}


def held_out(settings: Settings, out: Path, device: torch.device) -> LatentCache:
    """The encoded held-out stories that flow losses are measured on."""
    stage = stage_of(replace(settings, start="shipped"), out, "base", 0)
    stage.device, stage.vae = device, frozen_vae(vae_checkpoint(PRESET, shipped()), PRESET, device)[0]
    return stage.cache("eval", min(HELD_OUT, settings.stories), EVALUATION_SEED)


def free_memory() -> None:
    """Give back what a finished arm held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
