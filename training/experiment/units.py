"""The experiment as a list of units: what each needs, how long it may take, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longtake.training.experiment import jobs
from longtake.training.experiment import settings as sizes
from longtake.training.experiment.batched import SINKS
from longtake.training.experiment.bench import CONDITIONS, Bench
from longtake.training.experiment.memory import MEMORY
from longtake.training.experiment.settings import Settings


@dataclass(frozen=True)
class Unit:
    """One piece of work. seconds: what it takes on an H100. run(bench) -> result.

    needs: names of units whose products it reads. after: units that it waits for, done or failed. product: the file, below
    --out, that others read; None: nothing but the result. heavy: it fills a GPU, so one a device at a time. divisible:
    ended by Ctrl-C, it saves where it stands, and goes on later. step: it is worth nothing by itself (encoded stories), so it is made again only if needed.
    """

    name: str
    seconds: float
    run: Callable[[Bench], dict[str, Any]]
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    product: str | None = None
    heavy: bool = False
    divisible: bool = False
    step: bool = False


def units(settings: Settings) -> Iterator[Unit]:
    """Everything, the most urgent first."""
    seeds, short = range(settings.seeds), sizes.EVALUATION_SECONDS
    encoded = [f"stories-{part}" for part in range(settings.story_parts)]
    for part, name in enumerate(encoded):
        yield Unit(name, 25, partial(jobs.stories, part), product=f"stories/train-{part}.safetensors", step=True)
    yield Unit("held-out", short, partial(jobs.stories, None), product="stories/held-out.safetensors", step=True)
    yield _training(settings, "base", 0, ("held-out", *encoded))
    yield Unit("judge", sizes.JUDGE_SECONDS, jobs.judge, product="judge.safetensors")
    for seed in seeds:
        for arm in ("nvfp4", "bf16"):
            yield _training(settings, arm, seed, ("held-out", *encoded, "train-base"))
    yield from _students(settings)
    for seed in seeds:
        for name, (arm, *_) in CONDITIONS.items():
            run = partial(jobs.evaluate, name, seed)
            yield Unit(f"eval-{name}-{seed}", short, run, ("judge", "held-out", f"train-{arm}-{seed}"))
    for seed in seeds:
        for sinks in SINKS:
            run = partial(jobs.sink_condition, sinks, seed)
            yield Unit(f"sinks-{sinks}-{seed}", short, run, ("judge", f"train-nvfp4-{seed}"))
    for seed in seeds:
        for name, (condition, *_) in MEMORY.items():
            run = partial(jobs.memory_condition, name, seed)
            needs = ("judge", f"train-{CONDITIONS[condition][0]}-{seed}")
            yield Unit(f"memory-{name}-{seed}", sizes.MEMORY_SECONDS, run, needs)
    yield Unit("probe-shipped-0", 2 * short, partial(jobs.probe_model, "shipped", 0), ("judge",))
    yield Unit("probe-base-0", 2 * short, partial(jobs.probe_model, "base", 0), ("judge", "train-base"))
    for seed in seeds:
        run = partial(jobs.probe_model, "nvfp4", seed)
        yield Unit(f"probe-nvfp4-{seed}", 2 * short, run, ("judge", f"train-nvfp4-{seed}"))
    yield Unit("reference", 4 * short, jobs.reference, ("judge",))
    yield Unit("habit", short, jobs.habit, ("held-out", "train-base"))
    teacher = _teacher(settings)
    arms = {name for name in teacher if name.startswith("train-")}
    students = tuple(f"student-{steps}" for steps in settings.students)
    others = [name.replace("nvfp4", "bf16") for name in arms]
    yield Unit("sheet", 2 * short, jobs.sheet, ("judge", *teacher, *others), students, "sheet.png")
    for seed in seeds:
        for name, (arm, *_) in CONDITIONS.items():
            run = partial(jobs.drift_condition, name, seed)
            yield Unit(f"drift-{name}-{seed}", 3 * short, run, ("judge", f"train-{arm}-{seed}"))
    for seed in seeds:
        run = partial(jobs.film_condition, "nvfp4", seed)
        yield Unit(f"film-nvfp4-{seed}", sizes.FILM_SECONDS, run, ("judge", f"train-nvfp4-{seed}"))


def _training(settings: Settings, arm: str, seed: int, needs: tuple[str, ...]) -> Unit:
    steps = settings.base_steps if arm == "base" else settings.branch_steps
    seconds = sizes.START_SECONDS + steps / sizes.STEPS_PER_SECOND["nvfp4" if arm == "nvfp4" else "bf16"]
    name = arm if arm == "base" else f"{arm}-{seed}"
    run = partial(jobs.train, arm, seed)
    return Unit(
        f"train-{name}", seconds, run, needs, product=f"arms/{name}/dit.safetensors", heavy=True, divisible=True
    )


def _teacher(settings: Settings) -> tuple[str, ...]:
    """What must be done before the students' teacher is known and there."""
    if settings.teacher == "first":
        return ("train-nvfp4-0",)
    seeds = range(settings.seeds)
    return (*(f"train-nvfp4-{seed}" for seed in seeds), *(f"eval-nvfp4-{seed}" for seed in seeds))


def _students(settings: Settings) -> Iterator[Unit]:
    teacher, short = _teacher(settings), sizes.EVALUATION_SECONDS
    for steps in settings.students:
        product = f"students/{steps}/dit.safetensors"
        run = partial(jobs.distil_student, steps)
        yield Unit(f"distill-{steps}", 15 + settings.distill_seconds, run, teacher, product=product, divisible=True)
    for steps in settings.students:
        seconds = short + sizes.MEMORY_SECONDS + sizes.FILM_SECONDS / 4
        yield Unit(f"student-{steps}", seconds, partial(jobs.student, steps), ("judge", f"distill-{steps}"))
        yield Unit(f"few-{steps}", short, partial(jobs.few_steps, steps), ("judge", *teacher))


def present(unit: Unit, results: Mapping[str, Any], out: Path) -> bool:
    """Whether it is done and what others read of it is there."""
    return unit.name in results and (unit.product is None or (out / unit.product).is_file())


def wanted(every: Sequence[Unit], results: Mapping[str, Any], out: Path) -> list[Unit]:
    """The units still to be run: those without a result, and those whose lost product one of these needs."""
    by_name = {unit.name: unit for unit in every}
    found: set[str] = set()
    queue = [unit.name for unit in every if not unit.step and unit.name not in results]
    while queue:
        name = queue.pop()
        if name not in found and not (name in results and present(by_name[name], results, out)):
            found.add(name)
            queue += by_name[name].needs
    return [unit for unit in every if unit.name in found]
