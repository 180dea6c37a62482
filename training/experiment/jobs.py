"""The work of each unit: functions of a `Bench`, which return a JSON-ready result."""

from __future__ import annotations

from typing import Any

from safetensors.torch import save_file

from longtake.files import atomic_path
from longtake.training.data.held_out_stories import (
    FILM_SEED,
    RETURN_SEED,
    Cell,
    long_stories,
    memory_stories,
    mixed_stories,
    returning_stories,
)
from longtake.training.experiment.arms import PRESET, arm_folder, encode_stories, held_out, shipped, train_arm, vae_of
from longtake.training.experiment.batched import Sampling
from longtake.training.experiment.bench import CONDITIONS, Bench
from longtake.training.experiment.classifier import judge_accuracy, trained_judge
from longtake.training.experiment.distil import distil, student_folder, student_sampling
from longtake.training.experiment.drift import drift
from longtake.training.experiment.evaluate import (
    fidelity,
    generated,
    held_out_flow,
    identity,
    rendered,
    with_another_scan,
)
from longtake.training.experiment.memory import MEMORY, memory
from longtake.training.experiment.probe import probe
from longtake.training.experiment.sheet import contact_sheet
from longtake.training.models.load import Models


def stories(part: int | None, bench: Bench) -> dict[str, Any]:
    """Encode a part of the training stories, or the held-out ones (None)."""
    return dict(encode_stories(bench.settings, bench.out, bench.device, part))


def judge(bench: Bench) -> dict[str, Any]:
    """Train the judge, keep it, and report how often it is right on held-out scans."""
    vae = vae_of(shipped(), bench.device)
    found = trained_judge(vae, PRESET, bench.settings.judge, bench.device)
    with atomic_path(bench.out / "judge.safetensors") as partial_file:
        save_file({k: v.cpu().contiguous() for k, v in found.state_dict().items()}, partial_file)
    return judge_accuracy(found, vae, PRESET, bench.settings.judge_clips, bench.device)


def reference(bench: Bench) -> dict[str, Any]:
    """The data set through the VAE: the most that a generator can reach; and another writer's digit: the least."""
    models, s = bench.models(shipped(), "bf16"), bench.settings
    mixed = mixed_stories(s.fidelity_stories, s.fidelity_chunks)
    returning = returning_stories(s.identity_stories, s.identity_lengths)
    another = with_another_scan(returning)
    long = long_stories(s.drift_stories, s.drift_chunks)
    eyes = bench.eyes
    return {
        **fidelity(rendered(eyes, models, mixed), mixed, eyes),
        "identity": identity(rendered(eyes, models, returning), returning, eyes),
        "another_scan": identity(rendered(eyes, models, another), another, eyes),
        "memory": memory(lambda stories: rendered(eyes, models, stories), s, eyes),
        "drift": drift(rendered(eyes, models, long), long, eyes),
    }


def train(arm: str, seed: int, bench: Bench) -> dict[str, Any]:
    """Train the base, or one arm of one seed."""
    return dict(train_arm(bench.settings, bench.out, arm, seed, bench.device))


def evaluate(name: str, seed: int, bench: Bench) -> dict[str, Any]:
    """Flow loss and prompt fidelity of a condition."""
    models = bench.condition(name, seed)
    return {**flow_of(bench, models), **_fidelity(bench, models, bench.sampling(CONDITIONS[name][2]))}


def habit(bench: Bench) -> dict[str, Any]:
    """Flow loss of the shipped model and of the base in bf16 and in 4 bits: how used to 4 bits the start still is."""
    return {
        f"{name}_{precision}": flow_of(bench, bench.models(folder, precision))["flow"]
        for name, folder in (("shipped", shipped()), ("base", arm_folder(bench.out, "base", 0)))
        for precision in ("bf16", "nvfp4")
    }


def flow_of(bench: Bench, models: Models) -> dict[str, Any]:
    """Flow loss on the held-out stories."""
    cache = held_out(bench.out / "stories", bench.settings.flow_stories, bench.device)
    return dict(held_out_flow(models, cache, bench.device, bench.settings.flow_draws))


def _fidelity(bench: Bench, models: Models, sampling: Sampling) -> dict[str, Any]:
    s = bench.settings
    stories = mixed_stories(s.fidelity_stories, s.fidelity_chunks)
    return dict(fidelity(generated(models, bench.eyes, stories, sampling), stories, bench.eyes))


def sink_condition(sinks: str, seed: int, bench: Bench) -> dict[str, Any]:
    """Identity across cuts of the NVFP4-aware model with some of its sinks: of subjects that it made up, and of subjects
    of the data set, whose first shot is given."""
    s, sampling = bench.settings, bench.sampling("nvfp4", sinks)
    stories = returning_stories(s.identity_stories, s.identity_lengths)
    models, begin = bench.condition("nvfp4", seed), s.identity_lengths[0]
    made_up = identity(generated(models, bench.eyes, stories, sampling), stories, bench.eyes)
    given = identity(generated(models, bench.eyes, stories, sampling, begin), stories, bench.eyes)
    return {**made_up, **{f"given_{name}": value for name, value in given.items()}}


def drift_condition(name: str, seed: int, bench: Bench) -> dict[str, Any]:
    """Long shots of a condition."""
    s = bench.settings
    stories = long_stories(s.drift_stories, s.drift_chunks)
    chunks = generated(bench.condition(name, seed), bench.eyes, stories, bench.sampling(CONDITIONS[name][2]))
    return dict(drift(chunks, stories, bench.eyes))


def film_condition(name: str, seed: int, bench: Bench) -> dict[str, Any]:
    """The same for five minutes."""
    s = bench.settings
    stories = long_stories(s.film_stories, s.film_chunks, FILM_SEED)
    chunks = generated(bench.condition(name, seed), bench.eyes, stories, bench.sampling(CONDITIONS[name][2]))
    return dict(drift(chunks, stories, bench.eyes))


def memory_condition(name: str, seed: int, bench: Bench) -> dict[str, Any]:
    """Returns by distance and subjects between, of a condition's models with its cache and sinks."""
    condition, cache, sinks = MEMORY[name]
    return _memory(bench, bench.condition(condition, seed), bench.sampling(cache, sinks))


def _memory(bench: Bench, models: Models, sampling: Sampling) -> dict[str, Any]:
    return dict(memory(lambda stories: generated(models, bench.eyes, stories, sampling), bench.settings, bench.eyes))


def probe_model(name: str, seed: int, bench: Bench) -> dict[str, Any]:
    """Attention and unread colours of the shipped model, the base or an arm, with linears in bf16."""
    folder = shipped() if name == "shipped" else arm_folder(bench.out, name, seed)
    stories = memory_stories(Cell(bench.settings.probe_distance, 1), bench.settings.probe_stories)
    return probe(bench.models(folder, "bf16"), bench.eyes, stories)


def few_steps(steps: int, bench: Bench) -> dict[str, Any]:
    """The teacher with a student's few steps, guided, without distillation: what distillation has to beat."""
    models, s = bench.condition("nvfp4", bench.teacher), bench.settings
    return _fidelity(bench, models, Sampling(steps, s.guidance, PRESET.sampling.shift, "nvfp4"))


def distil_student(steps: int, bench: Bench) -> dict[str, Any]:
    """Distil the best NVFP4-aware model to `steps` steps."""
    teacher = arm_folder(bench.out, "nvfp4", bench.teacher)
    return distil(bench.settings, teacher, bench.out, steps, bench.device)


def student(steps: int, bench: Bench) -> dict[str, Any]:
    """What is asked of the arms, of a student: under NVFP4 with the FP4 cache, without guidance."""
    models = bench.models(student_folder(bench.out, steps), "nvfp4")
    sampling, s = student_sampling(bench.out, steps), bench.settings
    stories = returning_stories(s.identity_stories, s.identity_lengths)
    long = {
        "minute": long_stories(s.drift_stories, s.drift_chunks),
        "film": long_stories(s.film_stories, s.film_chunks, FILM_SEED),
    }
    return {
        **_fidelity(bench, models, sampling),
        "identity": identity(generated(models, bench.eyes, stories, sampling), stories, bench.eyes),
        "memory": _memory(bench, models, sampling),
        **{
            f"drift_{name}": drift(generated(models, bench.eyes, films, sampling), films, bench.eyes)
            for name, films in long.items()
        },
    }


def sheet(bench: Bench) -> dict[str, Any]:
    """One story by every condition, as a picture and as a video."""
    s = bench.settings
    stories = returning_stories(1, (1, 1, 1), 0) if s.quick else returning_stories(2, (1, 4, 2), RETURN_SEED + 1)
    told = {
        name: (bench.condition(name, bench.teacher), bench.sampling(cache))
        for name, (_, _, cache) in CONDITIONS.items()
    }
    told["nvfp4, no sinks"] = told["nvfp4"][0], bench.sampling("nvfp4", "none")
    for steps in s.students:
        if f"student-{steps}" in bench.results:
            models = bench.models(student_folder(bench.out, steps), "nvfp4")
            told[f"student, {steps} steps"] = models, student_sampling(bench.out, steps)
    rows = {"data set": rendered(bench.eyes, bench.models(shipped(), "bf16"), stories)}
    rows |= {name: generated(models, bench.eyes, stories, how) for name, (models, how) in told.items()}
    return contact_sheet(rows, bench.out, PRESET.fps)
