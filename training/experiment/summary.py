"""From units' results to figures with a spread, and what they say about the claims."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longtake.files import read_json
from longtake.training.experiment.batched import SINKS
from longtake.training.experiment.memory import MEMORY, metrics_of
from longtake.training.experiment.settings import Settings

Results = dict[str, dict[str, Any]]
SHOWN = ("fidelity", "contrast", "saturation", "detail", "motion")
DRIFT = ("left", "steady_films", *(f"{m}_{e}" for m in SHOWN for e in ("start", "end")))
FEW_POINTS = 0.05  # how much prompt fidelity a 4-step student may lose


def results_in(out: Path) -> Results:
    """What units have found so far."""
    return {path.stem: read_json(path) for path in sorted((out / "units").glob("*.json"))}


def values_of(results: Results, kind: str, condition: str, metric: str) -> list[float]:
    """One value a seed, of the units <kind>-<condition>-<seed> that are done."""
    return [float(value) for value in rows_of(results, kind, condition, metric)]


def rows_of(results: Results, kind: str, condition: str, metric: str) -> list[Any]:
    """What the units <kind>-<condition>-<seed> that are done say of a metric, by seed."""
    names = sorted(
        (n for n in results if n.rpartition("-")[0] == f"{kind}-{condition}"), key=lambda n: int(n.rpartition("-")[2])
    )
    return [results[name][metric] for name in names if metric in results[name]]


def spread_of(values: Sequence[float]) -> float:
    """Standard deviation over seeds (n - 1); 0 of a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def figure(values: Sequence[float]) -> dict[str, Any]:
    """Mean, spread, values."""
    return {"mean": statistics.fmean(values), "spread": spread_of(values), "values": list(values)} if values else {}


def summary(results: Results, settings: Settings) -> dict[str, Any]:
    """Every condition and metric."""
    found: dict[str, Any] = {}
    for kind, conditions, metrics in (
        ("eval", ("bf16", "bf16-fp4cache", "ptq", "nvfp4"), ("flow", "fidelity")),
        ("sinks", SINKS, ("colour", "colour_first", "agreement", "cosine", "iou", "iou_first", "iou_last", "fidelity_return", "subjects_found", "given_colour", "given_iou", "given_cosine", "given_agreement")),
        ("drift", ("bf16", "bf16-fp4cache", "ptq", "nvfp4"),
         DRIFT),
        ("memory", MEMORY, metrics_of(settings)),
        ("film", ("nvfp4",), DRIFT),
    ):  # fmt: skip
        found[kind] = {
            c: {m: figure(values_of(results, kind, c, m)) for m in metrics if values_of(results, kind, c, m)}
            for c in conditions
        }
    students = {f"student-{steps}": results.get(f"student-{steps}", {}) for steps in settings.students}
    for name, one in {"data": results.get("reference", {}), **students}.items():
        for kind, told in (
            ("memory", one.get("memory")),
            ("drift", one.get("drift_minute", one.get("drift"))),
            ("film", one.get("drift_film")),
        ):
            if told:
                metrics = metrics_of(settings) if kind == "memory" else DRIFT
                found[kind][name] = {m: figure([float(told[m])]) for m in metrics if m in told}
    found["students"] = {
        str(steps): {
            "student": results.get(f"student-{steps}", {}).get("fidelity"),
            "same steps, not distilled": results.get(f"few-{steps}", {}).get("fidelity"),
        }
        for steps in settings.students
    }
    return found


NVFP4_AWARE = "NVFP4-aware has a {} than post-training NVFP4"
SINKS_KEEP = "both sinks keep {} across cuts better than none"
# Claim: kind of units, metric, what has the higher one, and the lower.
CLAIMS = {
    NVFP4_AWARE.format("lower held-out flow loss"): ("eval", "flow", "ptq", "nvfp4"),
    NVFP4_AWARE.format("higher prompt fidelity"): ("eval", "fidelity", "nvfp4", "ptq"),
    SINKS_KEEP.format("the subject's colour"): ("sinks", "colour", "both", "none"),
    SINKS_KEEP.format("a given subject's colour"): ("sinks", "given_colour", "both", "none"),
    SINKS_KEEP.format("the subject's shape"): ("sinks", "iou", "both", "none"),
    SINKS_KEEP.format("a given subject's shape"): ("sinks", "given_iou", "both", "none"),
    SINKS_KEEP.format("the subject's class"): ("sinks", "agreement", "both", "none"),
    "over all distances, both sinks keep a subject's colour better than none": ("memory", "colour", "both", "none"),
    "over all distances, both sinks keep a subject's shape better than none": ("memory", "iou", "both", "none"),
}
CACHE_ROOM = 0.05  # of the share of frames with the subject's colour, that the FP4 cache may cost


def claims(results: Results, settings: Settings) -> dict[str, dict[str, Any]]:
    """Each claim: true, false, or None where results are missing; with the numbers it rests on.

    "More than the spread" compares the difference of the means with the larger standard deviation over seeds. A claim
    about arms uses the seeds that both have.
    """

    def beats(kind: str, m: str, a: str, b: str) -> dict[str, Any]:
        part = of_common_seeds(results, kind, a, b)
        by_story = [rows_of(part, kind, c, f"{m}_by_story") for c in (a, b)]  # [seeds][stories], the same for all
        return _beats(values_of(part, kind, a, m), values_of(part, kind, b, m), by_story[0], by_story[1])

    made = {text: beats(*how) for text, how in CLAIMS.items()}

    def not_worse(m: str, a: str, b: str, room: float) -> dict[str, Any]:
        found = beats("memory", m, a, b)
        return {**found, "holds": found["difference"] >= -room} if "difference" in found else found

    alone = {c: statistics.fmean(v) for c in ("global", "shot") if (v := values_of(results, "memory", c, "colour"))}
    better = max(alone, key=lambda name: alone[name], default="global")
    made["over all distances, both sinks keep the colour as well as the better one alone"] = not_worse(
        "colour", "both", better, 0.0
    )
    made["the FP4 cache keeps the colour within 5 points of the bf16 cache"] = not_worse(
        "colour", "both", "bf16cache", CACHE_ROOM
    )
    made["NVFP4-aware with the FP4 cache keeps the colour within 5 points of BF16"] = not_worse(
        "colour", "both", "bf16", CACHE_ROOM
    )
    made["the 4-step student is within 5 points of its teacher's prompt fidelity"] = _student(results, settings)
    return made


def of_common_seeds(results: Results, kind: str, first: str, second: str) -> Results:
    """The results of two conditions, of the seeds that both have."""
    seeds = [
        {name.rpartition("-")[2] for name in results if name.rpartition("-")[0] == f"{kind}-{c}"}
        for c in (first, second)
    ]
    kept = [f"{kind}-{c}-{seed}" for c in (first, second) for seed in seeds[0] & seeds[1]]
    return {name: results[name] for name in kept}


def paired_interval(higher: Sequence[Sequence[float]], lower: Sequence[Sequence[float]]) -> list[float] | None:
    """95 % interval of the mean difference, from 2000 draws of the stories with replacement; seeds averaged first."""
    if not higher or np.shape(higher) != np.shape(lower) or np.ndim(higher) != 2:
        return None
    difference = (np.array(higher) - np.array(lower)).mean(0)
    drawn = np.random.default_rng(0).integers(len(difference), size=(2000, len(difference)))
    return [float(x) for x in np.percentile(difference[drawn].mean(1), (2.5, 97.5))]


def _beats(
    higher: Sequence[float],
    lower: Sequence[float],
    higher_by_story: Sequence[Sequence[float]] = (),
    lower_by_story: Sequence[Sequence[float]] = (),
) -> dict[str, Any]:
    if not higher or len(higher) != len(lower):
        return {"holds": None}
    gain, spread = statistics.fmean(higher) - statistics.fmean(lower), max(spread_of(higher), spread_of(lower))
    return {
        "holds": gain > spread if len(higher) > 1 else None,
        "difference": gain,
        "spread": spread,
        "seeds": len(higher),
        "by_seed": [a - b for a, b in zip(higher, lower)],
        "interval": paired_interval(higher_by_story, lower_by_story),
    }


def _student(results: Results, settings: Settings) -> dict[str, Any]:
    student, seed = results.get("student-4", {}), teacher_seed(results, settings)
    teacher = results.get(f"eval-nvfp4-{seed}", {})
    if "fidelity" not in student or "fidelity" not in teacher:
        return {"holds": None}
    interval = paired_interval(
        *([found["fidelity_by_story"]] if "fidelity_by_story" in found else [] for found in (student, teacher))
    )
    return {
        "holds": teacher["fidelity"] - student["fidelity"] <= FEW_POINTS,
        "difference": student["fidelity"] - teacher["fidelity"],
        "teacher": teacher["fidelity"],
        "interval": interval,
    }


def best_seed(results: Results, settings: Settings) -> int | None:
    """The seed whose NVFP4-aware model has the lowest held-out flow loss; None until all are measured."""
    names = [f"eval-nvfp4-{seed}" for seed in range(settings.seeds)]
    if not all(name in results for name in names):
        return None
    return min(range(settings.seeds), key=lambda seed: float(results[names[seed]]["flow"]))


def teacher_seed(results: Results, settings: Settings) -> int | None:
    """The seed of the students' teacher; None if that isn't known yet."""
    return 0 if settings.teacher == "first" else best_seed(results, settings)


def teacher_fidelity(results: Results, settings: Settings) -> float | None:
    """Prompt fidelity of the students' teacher."""
    seed = teacher_seed(results, settings)
    found = results.get(f"eval-nvfp4-{seed}", {}).get("fidelity")
    return None if found is None else float(found)
