"""Training of the arms by the trainer's Python API: a common bf16 base, then bf16 or NVFP4 for the same steps."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from longtake.files import atomic_path
from longtake.paths import REPOSITORY
from longtake.training.data.latent_cache import LatentCache, frozen_vae, vae_checkpoint
from longtake.training.data.returns import RETURNING
from longtake.training.experiment.settings import Settings
from longtake.training.models.presets import TINY, Preset
from longtake.training.models.wan.vae import CausalVAE
from longtake.training.optimizer import OptimizerConfig
from longtake.training.stages.dit import DiTStage
from longtake.training.stages.options import StageOptions
from longtake.training.stages.validation import EVALUATION_SEED
from longtake.training.trainer import TrainConfig, Trainer

PRESET: Preset = TINY
CACHE_TENSORS = ("latents", "tokens", "history", "offsets", "cuts")
DATA_SEED = 11  # of the training stories, which all seeds share; each part has the next
HELD_OUT_FILE = "held-out.safetensors"


class ArmStage(DiTStage):
    """The stage "dit" whose encoded stories are those of all arms, encoded once and kept in files."""

    def __init__(self, options: StageOptions, folder: Path) -> None:
        super().__init__(options)
        self.folder = folder

    def cache(self, split: str, stories: int, seed: int) -> LatentCache:
        """See DiTStage.cache; `encode_stories` has made them."""
        if split == "eval":
            return held_out(self.folder, stories, self.device)
        parts = [read_cache(path, self.device) for path in sorted(self.folder.glob("train-*.safetensors"))]
        return LatentCache(PRESET, **{n: torch.cat([getattr(part, n) for part in parts]) for n in CACHE_TENSORS})


def encode_stories(settings: Settings, out: Path, device: torch.device, part: int | None) -> dict[str, float]:
    """Encode a part of the training stories, or the held-out ones (None), into a file."""
    stage = stage_of(replace(settings, start="shipped"), out, "base", 0)
    stage.device = device
    stage.vae, stage.vae_digest = vae_of(shipped(), device), ""
    if part is None:
        made = DiTStage.cache(stage, "eval", settings.flow_stories, EVALUATION_SEED)
    else:
        count = len(range(part, settings.stories, settings.story_parts))
        made = DiTStage.cache(stage, "train", count, DATA_SEED + part)
    name = HELD_OUT_FILE if part is None else f"train-{part}.safetensors"
    save_cache(made, out / "stories" / name)  # type: ignore[arg-type]
    return {"stories": float(len(made))}


def held_out(folder: Path, stories: int, device: torch.device) -> LatentCache:
    """The first `stories` encoded held-out stories of a folder, that flow losses are measured on."""
    cache = read_cache(folder / HELD_OUT_FILE, device)
    return LatentCache(PRESET, **{name: getattr(cache, name)[:stories] for name in CACHE_TENSORS})


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


def vae_of(folder: Path, device: torch.device) -> CausalVAE:
    """The VAE of a folder of checkpoints."""
    return frozen_vae(vae_checkpoint(PRESET, folder), PRESET, device)[0]


def arm_folder(out: Path, arm: str, seed: int) -> Path:
    """Where an arm ("base", "bf16" or "nvfp4") of a seed is kept; there is one base."""
    return out / "arms" / (arm if arm == "base" else f"{arm}-{seed}")


def stage_of(settings: Settings, out: Path, arm: str, seed: int) -> ArmStage:
    """The stage of an arm: the base begins as told, the others with the base."""
    begin = {"random": None, "shipped": shipped()}.get(settings.start, Path(settings.start))
    options = StageOptions(
        preset=PRESET,
        data=RETURNING,
        return_distance=settings.return_distance or None,
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


def train_arm(settings: Settings, out: Path, arm: str, seed: int, device: torch.device) -> dict[str, float]:
    """Train an arm, or go on with it. Its folder then holds complete checkpoints. Returns held-out metrics."""
    folder, branch = arm_folder(out, arm, seed), arm != "base"
    config = run_config(
        folder,
        settings,
        steps=settings.branch_steps if branch else settings.base_steps,
        seed=1000 * branch + seed,  # both branches draw the same batches and the same noise
        optimizer=OptimizerConfig(lr=settings.branch_lr if branch else settings.base_lr, clip=1.0),
    )
    begun = time.monotonic()
    metrics = Trainer(stage_of(settings, out, arm, seed), config, device).fit()
    delete_resume_points(folder)
    return {"steps": float(config.steps), "seconds_of_last_part": time.monotonic() - begun, **metrics}


def run_config(folder: Path, settings: Settings, **told: Any) -> TrainConfig:
    """What the trainer is told of a model that is kept in `folder`: a new one, or one that was begun there."""
    return TrainConfig(
        out=folder,
        preset=PRESET.name,
        resume=bool(list(folder.glob("resume-*.safetensors"))),
        evaluate_steps=0,
        save_seconds=60.0,
        save_dtype="bf16",
        command="longtake experiment",
        settings={"of": folder.name, **settings.as_json()},
        **told,
    )


def delete_resume_points(folder: Path) -> None:
    """Several times the weights, and no longer needed once these are there."""
    for path in folder.glob("resume-*"):
        path.unlink()
