"""From units' results to figures with a spread, and what they say about the claims."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from longtake.training.experiment.settings import Settings
from longtake.training.experiment.sinks import SINKS

Results = dict[str, dict[str, Any]]
FEW_POINTS = 0.05  # how much prompt fidelity a 4-step student may lose


def values_of(results: Results, kind: str, condition: str, metric: str) -> list[float]:
    """One value a seed, of the units <kind>-<condition>-<seed> that are done."""
    names = sorted(
        (n for n in results if n.rpartition("-")[0] == f"{kind}-{condition}"), key=lambda n: int(n.rpartition("-")[2])
    )
    return [float(results[name][metric]) for name in names if metric in results[name]]


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
        ("sinks", SINKS, ("agreement", "cosine", "iou", "iou_first", "iou_last", "fidelity_return", "subjects_found")),
        ("drift", ("bf16", "bf16-fp4cache", "ptq", "nvfp4"),
         tuple(f"{m}_{e}" for m in ("fidelity", "contrast", "saturation", "detail") for e in ("start", "end"))),
    ):  # fmt: skip
        found[kind] = {
            c: {m: figure(values_of(results, kind, c, m)) for m in metrics if values_of(results, kind, c, m)}
            for c in conditions
        }
    found["students"] = {
        str(steps): {
            "student": results.get(f"student-{steps}", {}).get("fidelity"),
            "same steps, not distilled": results.get(f"few-{steps}", {}).get("fidelity"),
        }
        for steps in settings.students
    }
    return found


def claims(results: Results, settings: Settings) -> dict[str, dict[str, Any]]:
    """Each claim: true, false, or None where results are missing; with the numbers it rests on.

    "More than the spread" compares the difference of the means with the larger standard deviation over seeds.
    """
    eval_ = lambda c, m: values_of(results, "eval", c, m)  # noqa: E731
    sinks = lambda c, m: values_of(results, "sinks", c, m)  # noqa: E731
    made = {
        "NVFP4-aware has a lower held-out flow loss than post-training NVFP4": _beats(eval_("ptq", "flow"), eval_("nvfp4", "flow")),
        "NVFP4-aware has a higher prompt fidelity than post-training NVFP4": _beats(eval_("nvfp4", "fidelity"), eval_("ptq", "fidelity")),
        "both sinks keep the subject's shape across cuts better than none": _beats(sinks("both", "iou"), sinks("none", "iou")),
        "both sinks keep the subject's class across cuts better than none": _beats(sinks("both", "agreement"), sinks("none", "agreement")),
    }  # fmt: skip
    made["the 4-step student is within 5 points of its teacher's prompt fidelity"] = _student(results, settings)
    return made


def _beats(higher: Sequence[float], lower: Sequence[float]) -> dict[str, Any]:
    if not higher or len(higher) != len(lower):
        return {"holds": None}
    gain, spread = statistics.fmean(higher) - statistics.fmean(lower), max(spread_of(higher), spread_of(lower))
    return {
        "holds": gain > spread,
        "difference": gain,
        "spread": spread,
        "by_seed": [a - b for a, b in zip(higher, lower)],
    }


def _student(results: Results, settings: Settings) -> dict[str, Any]:
    fidelity = results.get("student-4", {}).get("fidelity")
    teacher = teacher_fidelity(results, settings)
    if fidelity is None or teacher is None:
        return {"holds": None}
    return {"holds": teacher - fidelity <= FEW_POINTS, "difference": fidelity - teacher, "teacher": teacher}


def teacher_seed(results: Results, settings: Settings) -> int | None:
    """The seed whose NVFP4-aware model has the lowest held-out flow loss; None until all are measured."""
    names = [f"eval-nvfp4-{seed}" for seed in range(settings.seeds)]
    if not all(name in results for name in names):
        return None
    return min(range(settings.seeds), key=lambda seed: float(results[names[seed]]["flow"]))


def teacher_fidelity(results: Results, settings: Settings) -> float | None:
    """Prompt fidelity of the students' teacher."""
    seed = teacher_seed(results, settings)
    return None if seed is None else float(results[f"eval-nvfp4-{seed}"]["fidelity"])
