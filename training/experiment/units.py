"""The experiment as a list of units: each has a name, an estimate of its time, and leaves one JSON-ready result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from longtake.runtime.files import atomic_path
from longtake.training.experiment import settings as sizes
from longtake.training.experiment.arms import PRESET, arm_folder, free_memory, held_out, shipped, train_arm
from longtake.training.experiment.batched import Sampling
from longtake.training.experiment.classifier import DigitClassifier, judge_accuracy, trained_judge
from longtake.training.experiment.distil import distil, student_folder, student_sampling
from longtake.training.experiment.evaluate import (
    Eyes,
    drift,
    fidelity,
    generated,
    held_out_flow,
    identity,
    rendered,
    with_another_scan,
)
from longtake.training.experiment.settings import Settings
from longtake.training.experiment.sheet import contact_sheet
from longtake.training.experiment.sinks import SINKS
from longtake.training.experiment.stories import long_stories, mixed_stories, returning_stories
from longtake.training.experiment.summary import teacher_seed
from longtake.training.latent_cache import frozen_vae, vae_checkpoint
from longtake.training.networks import Models, apply_precision, load_models

# Condition -> arm, precision of the linears, format of the cache.
CONDITIONS = {
    "bf16": ("bf16", "bf16", "bf16"),
    "bf16-fp4cache": ("bf16", "bf16", "nvfp4"),
    "ptq": ("bf16", "nvfp4", "nvfp4"),
    "nvfp4": ("nvfp4", "nvfp4", "nvfp4"),
}
LONG = ("bf16", "bf16-fp4cache", "ptq", "nvfp4")
MIXED_SEED, RETURN_SEED, LONG_SEED = 501, 502, 503


@dataclass
class Bench:
    """What units share: settings, where results go, the device, and what is loaded once."""

    settings: Settings
    out: Path
    device: torch.device
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    _eyes: Eyes | None = None
    _loaded: tuple[tuple[Path, str], Models] | None = None

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
            self._loaded = None
            free_memory()
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
        """The seed whose NVFP4-aware model is distilled: every seed has been measured when it is asked for."""
        return teacher_seed(self.results, self.settings) or 0


@dataclass(frozen=True)
class Unit:
    """One piece of work. seconds: what it takes on an H100. run(bench, seconds left) -> result. divisible: it stops
    by itself when its time is over and goes on later."""

    name: str
    seconds: float
    run: Callable[[Bench, float], dict[str, Any]]
    divisible: bool = False


def units(settings: Settings) -> Iterator[Unit]:
    """Everything, in order: a seed's training and evaluation before the next seed's."""
    short = sizes.EVALUATION_SECONDS
    yield Unit("judge", sizes.JUDGE_SECONDS, judge)
    yield Unit("reference", short, reference)
    for seed in range(settings.seeds):
        for arm in ("base", "bf16", "nvfp4"):
            steps = settings.base_steps if arm == "base" else settings.branch_steps
            rate = sizes.STEPS_PER_SECOND["nvfp4" if arm == "nvfp4" else "bf16"]
            yield Unit(f"train-{arm}-{seed}", sizes.START_SECONDS / 2 + steps / rate, partial(train, arm, seed), True)
        for name in CONDITIONS:
            yield Unit(f"eval-{name}-{seed}", short, partial(evaluate, name, seed))
        for sinks in SINKS:
            yield Unit(f"sinks-{sinks}-{seed}", short, partial(sink_condition, sinks, seed))
        for name in LONG:
            yield Unit(f"drift-{name}-{seed}", 2 * short, partial(drift_condition, name, seed))
    for steps in settings.students:
        yield Unit(f"few-{steps}", short, partial(few_steps, steps))
        yield Unit(
            f"distill-{steps}",
            30 + settings.distill_steps / sizes.STEPS_PER_SECOND["distill"],
            partial(distil_student, steps),
            True,
        )
        yield Unit(f"student-{steps}", short, partial(student, steps))
    yield Unit("sheet", short, sheet)


def judge(bench: Bench, seconds: float) -> dict[str, Any]:
    """Train the judge, keep it, and report how often it is right on held-out scans."""
    vae = frozen_vae(vae_checkpoint(PRESET, shipped()), PRESET, bench.device)[0]
    found = trained_judge(vae, PRESET, bench.settings.judge, bench.device)
    with atomic_path(bench.out / "judge.safetensors") as partial_file:
        save_file({k: v.cpu().contiguous() for k, v in found.state_dict().items()}, partial_file)
    return judge_accuracy(found, vae, PRESET, bench.settings.judge_clips, bench.device)


def reference(bench: Bench, seconds: float) -> dict[str, Any]:
    """The data set through the VAE: the most that a generator can reach; and another writer's digit: the least."""
    models, s = bench.models(shipped(), "bf16"), bench.settings
    mixed = mixed_stories(s.fidelity_stories, s.fidelity_chunks, MIXED_SEED)
    returning = returning_stories(s.identity_stories, s.identity_lengths, RETURN_SEED)
    another = with_another_scan(returning)
    eyes = bench.eyes
    return {
        **fidelity(rendered(eyes, models, mixed), mixed, eyes),
        "identity": identity(rendered(eyes, models, returning), returning, eyes),
        "another_scan": identity(rendered(eyes, models, another), another, eyes),
    }


def train(arm: str, seed: int, bench: Bench, seconds: float) -> dict[str, Any]:
    """Train one arm of one seed."""
    bench._loaded = None
    return dict(train_arm(bench.settings, bench.out, arm, seed, bench.device, seconds))


def evaluate(name: str, seed: int, bench: Bench, seconds: float) -> dict[str, Any]:
    """Flow loss and prompt fidelity of a condition."""
    models = bench.condition(name, seed)
    flow = held_out_flow(models, held_out(bench.settings, bench.out, bench.device), bench.device)
    return {**flow, **_fidelity(bench, models, bench.sampling(CONDITIONS[name][2]))}


def _fidelity(bench: Bench, models: Models, sampling: Sampling) -> dict[str, Any]:
    s = bench.settings
    stories = mixed_stories(s.fidelity_stories, s.fidelity_chunks, MIXED_SEED)
    return dict(fidelity(generated(models, bench.eyes, stories, sampling), stories, bench.eyes))


def sink_condition(sinks: str, seed: int, bench: Bench, seconds: float) -> dict[str, Any]:
    """Identity across cuts of the NVFP4-aware model with some of its sinks."""
    s = bench.settings
    stories = returning_stories(s.identity_stories, s.identity_lengths, RETURN_SEED)
    models = bench.condition("nvfp4", seed)
    return dict(identity(generated(models, bench.eyes, stories, bench.sampling("nvfp4", sinks)), stories, bench.eyes))


def drift_condition(name: str, seed: int, bench: Bench, seconds: float) -> dict[str, Any]:
    """Long shots of a condition."""
    s = bench.settings
    stories = long_stories(s.drift_stories, s.drift_chunks, LONG_SEED)
    chunks = generated(bench.condition(name, seed), bench.eyes, stories, bench.sampling(CONDITIONS[name][2]))
    return dict(drift(chunks, stories, bench.eyes))


def few_steps(steps: int, bench: Bench, seconds: float) -> dict[str, Any]:
    """The teacher with a student's few steps, guided, without distillation: what distillation has to beat."""
    models, s = bench.condition("nvfp4", bench.teacher()), bench.settings
    return _fidelity(bench, models, Sampling(steps, s.guidance, PRESET.sampling.shift, "nvfp4"))


def distil_student(steps: int, bench: Bench, seconds: float) -> dict[str, Any]:
    """Distil the best NVFP4-aware model to `steps` steps."""
    bench._loaded = None
    free_memory()
    teacher = arm_folder(bench.out, "nvfp4", bench.teacher())
    return distil(bench.settings, teacher, bench.out, steps, bench.device, seconds)


def student(steps: int, bench: Bench, seconds: float) -> dict[str, Any]:
    """Prompt fidelity and identity of a student, under NVFP4 with the FP4 cache, without guidance."""
    if bench.results.get(f"distill-{steps}", {}).get("skipped"):
        return {"skipped": f"there is no {steps}-step student"}
    models = bench.models(student_folder(bench.out, steps), "nvfp4")
    sampling, s = student_sampling(bench.out, steps), bench.settings
    stories = returning_stories(s.identity_stories, s.identity_lengths, RETURN_SEED)
    return {
        **_fidelity(bench, models, sampling),
        "identity": identity(generated(models, bench.eyes, stories, sampling), stories, bench.eyes),
    }


def sheet(bench: Bench, seconds: float) -> dict[str, Any]:
    """One story by every condition, as a picture and as a video."""
    s = bench.settings
    stories = returning_stories(1, (1, 1, 1), 0) if s.quick else returning_stories(2, (1, 4, 2), RETURN_SEED + 1)
    rows = {"data set": lambda: rendered(bench.eyes, bench.models(shipped(), "bf16"), stories)}
    for name, (_, _, cache) in CONDITIONS.items():
        rows[name] = partial(_sheet_row, bench, name, bench.sampling(cache), stories)
    rows["nvfp4, no sinks"] = partial(_sheet_row, bench, "nvfp4", bench.sampling("nvfp4", "none"), stories)
    for steps in s.students:
        if "fidelity" in bench.results.get(f"student-{steps}", {}):
            rows[f"student, {steps} steps"] = partial(_student_row, bench, steps, stories)
    return contact_sheet(rows, bench.out, PRESET.fps)


def _sheet_row(bench: Bench, name: str, sampling: Sampling, stories: list[Any]) -> Any:
    return generated(bench.condition(name, bench.teacher()), bench.eyes, stories, sampling)


def _student_row(bench: Bench, steps: int, stories: list[Any]) -> Any:
    models = bench.models(student_folder(bench.out, steps), "nvfp4")
    return generated(models, bench.eyes, stories, student_sampling(bench.out, steps))
