"""Training of the arms by the trainer's Python API: a common bf16 base, then bf16 or NVFP4 for the same steps."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from longtake.files import atomic_path
from longtake.paths import REPOSITORY
from longtake.training.data.latent_cache import LatentCache, frozen_vae, vae_checkpoint
from longtake.training.experiment.settings import Settings
from longtake.training.models.presets import TINY, Preset
from longtake.training.optimizer import OptimizerConfig
from longtake.training.stages.dit import DiTStage
from longtake.training.stages.options import StageOptions
from longtake.training.stages.validation import EVALUATION_SEED
from longtake.training.trainer import TrainConfig, Trainer

PRESET: Preset = TINY
CACHE_TENSORS = ("latents", "tokens", "history", "offsets", "cuts")
DATA_SEED = 11  # of the training stories, which all seeds share; each part has the next
HELD_OUT_FILE = "held-out.safetensors"


class OutOfTime(Exception):
    """The time of this call is over; what was done is saved, and the next call goes on."""


class ArmStage(DiTStage):
    """The stage "dit" whose encoded stories are those of all arms, encoded once and kept in files."""

    kept: dict[Path, LatentCache] = {}

    def __init__(self, options: StageOptions, folder: Path) -> None:
        super().__init__(options)
        self.folder = folder

    def cache(self, split: str, stories: int, seed: int) -> LatentCache:
        """See DiTStage.cache; `encode_stories` has made them."""
        if split == "eval":
            return first_of(self.read(HELD_OUT_FILE), stories)
        files = self.folder.glob("train-*.safetensors")
        return joined([self.read(path.name) for path in sorted(files)])

    def read(self, name: str) -> LatentCache:
        """A file of encoded stories on the device, read once a process."""
        path = self.folder / name
        if path not in self.kept:
            self.kept[path] = read_cache(path, self.device)
        return self.kept[path]


def encode_stories(settings: Settings, out: Path, device: torch.device, part: int | None) -> dict[str, float]:
    """Encode a part of the training stories, or the held-out ones (None), into a file."""
    stage = stage_of(replace(settings, start="shipped"), out, "base", 0)
    stage.device = device
    stage.vae, stage.vae_digest = frozen_vae(vae_checkpoint(PRESET, shipped()), PRESET, device)
    if part is None:
        made = DiTStage.cache(stage, "eval", settings.flow_stories, EVALUATION_SEED)
    else:
        count = len(range(part, settings.stories, settings.story_parts))
        made = DiTStage.cache(stage, "train", count, DATA_SEED + part)
    name = HELD_OUT_FILE if part is None else f"train-{part}.safetensors"
    save_cache(made, out / "stories" / name)  # type: ignore[arg-type]
    return {"stories": float(len(made))}


def joined(parts: list[LatentCache]) -> LatentCache:
    """Several as one."""
    return LatentCache(PRESET, **{n: torch.cat([getattr(part, n) for part in parts]) for n in CACHE_TENSORS})


def first_of(cache: LatentCache, count: int) -> LatentCache:
    """The first `count` stories."""
    return LatentCache(PRESET, **{name: getattr(cache, name)[:count] for name in CACHE_TENSORS})


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
    """Where an arm ("base", "bf16" or "nvfp4") of a seed is kept; there is one base."""
    return out / "arms" / (arm if arm == "base" else f"{arm}-{seed}")


def stage_of(settings: Settings, out: Path, arm: str, seed: int) -> ArmStage:
    """The stage of an arm: the base begins as told, the others with the base."""
    begin = {"random": None, "shipped": shipped()}.get(settings.start, Path(settings.start))
    options = StageOptions(
        preset=PRESET,
        data="returning-digits",
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
        save_seconds=60.0,
        save_dtype="bf16",
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
    stage.device = device
    return stage.cache("eval", settings.flow_stories, EVALUATION_SEED)


def free_memory() -> None:
    """Give back what a finished arm held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
