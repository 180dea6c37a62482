"""The work of each unit: functions of a `Bench` and the seconds left, which return a JSON-ready result."""

from __future__ import annotations

from functools import partial
from typing import Any

from safetensors.torch import save_file

from longtake.files import atomic_path
from longtake.training.data.latent_cache import frozen_vae, vae_checkpoint
from longtake.training.experiment.arms import PRESET, arm_folder, encode_stories, held_out, shipped, train_arm
from longtake.training.experiment.batched import Sampling
from longtake.training.experiment.bench import CONDITIONS, Bench
from longtake.training.experiment.classifier import judge_accuracy, trained_judge
from longtake.training.experiment.distil import distil, student_folder, student_sampling
from longtake.training.experiment.evaluate import (
    drift,
    fidelity,
    generated,
    held_out_flow,
    identity,
    rendered,
    with_another_scan,
)
from longtake.training.experiment.sheet import contact_sheet
from longtake.training.experiment.stories import long_stories, mixed_stories, returning_stories
from longtake.training.models.load import Models

MIXED_SEED, RETURN_SEED, LONG_SEED = 501, 502, 503


def stories(part: int | None, bench: Bench, seconds: float) -> dict[str, Any]:
    """Encode a part of the training stories, or the held-out ones (None)."""
    return dict(encode_stories(bench.settings, bench.out, bench.device, part))


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
    """Train the base, or one arm of one seed."""
    bench.forget_models()
    return dict(train_arm(bench.settings, bench.out, arm, seed, bench.device, seconds))


def evaluate(name: str, seed: int, bench: Bench, seconds: float) -> dict[str, Any]:
    """Flow loss and prompt fidelity of a condition."""
    models = bench.condition(name, seed)
    flow = held_out_flow(
        models, held_out(bench.settings, bench.out, bench.device), bench.device, bench.settings.flow_draws
    )
    return {**flow, **_fidelity(bench, models, bench.sampling(CONDITIONS[name][2]))}


def habit(bench: Bench, seconds: float) -> dict[str, Any]:
    """Flow loss of the shipped model and of the base in bf16 and in 4 bits: how used to 4 bits the start still is."""
    cache, found = held_out(bench.settings, bench.out, bench.device), {}
    for name, folder in (("shipped", shipped()), ("base", arm_folder(bench.out, "base", 0))):
        for precision in ("bf16", "nvfp4"):
            flow = held_out_flow(bench.models(folder, precision), cache, bench.device, bench.settings.flow_draws)
            found[f"{name}_{precision}"] = flow["flow"]
    return found


def _fidelity(bench: Bench, models: Models, sampling: Sampling) -> dict[str, Any]:
    s = bench.settings
    stories = mixed_stories(s.fidelity_stories, s.fidelity_chunks, MIXED_SEED)
    return dict(fidelity(generated(models, bench.eyes, stories, sampling), stories, bench.eyes))


def sink_condition(sinks: str, seed: int, bench: Bench, seconds: float) -> dict[str, Any]:
    """Identity across cuts of the NVFP4-aware model with some of its sinks: of subjects that it made up, and of subjects
    of the data set, whose first shot is given."""
    s, sampling = bench.settings, bench.sampling("nvfp4", sinks)
    stories = returning_stories(s.identity_stories, s.identity_lengths, RETURN_SEED)
    models, begin = bench.condition("nvfp4", seed), s.identity_lengths[0]
    made_up = identity(generated(models, bench.eyes, stories, sampling), stories, bench.eyes)
    given = identity(generated(models, bench.eyes, stories, sampling, begin), stories, bench.eyes)
    return {**made_up, **{f"given_{name}": value for name, value in given.items()}}


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
    bench.forget_models()
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
