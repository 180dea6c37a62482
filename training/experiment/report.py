"""The report: results.json, report.md, plots; and the same tables in a page of the documentation."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from longtake.errors import LongtakeError, some
from longtake.files import atomic_path, write_json
from longtake.training.experiment.memory import at_distance, past_subjects
from longtake.training.experiment.plots import PICTURES, draw
from longtake.training.experiment.probe_tables import draw_probes, probe_tables
from longtake.training.experiment.settings import Settings
from longtake.training.experiment.summary import DRIFT, Results, best_seed, claims, summary, teacher_fidelity

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
NAMES = {
    "bf16": "BF16",
    "bf16-fp4cache": "BF16, FP4 cache alone",
    "ptq": "NVFP4 after training",
    "nvfp4": "NVFP4-aware",
    "both": "both sinks",
    "global": "global sink",
    "shot": "shot sink",
    "none": "no sinks",
    "bf16cache": "both sinks, bf16 cache",
    "data": "the data set through the VAE",
}


def write_report(
    results: Results,
    settings: Settings,
    out: Path,
    machine: str,
    missing: dict[str, str],
    docs: Path | None = None,
    seconds: float = 0.0,
) -> str:
    """Write what there is so far; returns the tables as markdown.

    machine: what it ran on. missing: units without a result, and why. seconds: that it took, by the clock.

    Raises:
        LongtakeError: `docs` has no place for results.
    """
    found, said = summary(results, settings), claims(results, settings)
    best = best_seed(results, settings)
    write_json(
        out / "results.json",
        {
            "kind": "experiment",
            "complete": not missing,
            "missing": missing,
            "toy_size": settings.quick,
            "device": machine,
            "seconds": round(seconds, 1),
            "seconds_of_units": round(sum(r.get("seconds", 0.0) for r in results.values()), 1),
            "settings": settings.as_json(),
            "summary": found,
            "claims": said,
            "best": None if best is None else f"arms/nvfp4-{best}",
            "units": {name: _short(result) for name, result in results.items()},
        },
    )
    text = markdown(results, settings, found, said, _head(results, settings, machine, missing, seconds))
    with atomic_path(out / "report.md") as partial:
        partial.write_text(text, encoding="utf-8")
    draw(results, found, out)
    draw_probes(probes_in(results), out / "probe.png")
    if docs is not None:
        fill(docs, text, out)
    return text


def _short(result: dict[str, Any]) -> dict[str, Any]:
    """Without the numbers of single stories, which units/*.json keep."""
    kept = {key: value for key, value in result.items() if not key.endswith("_by_story")}
    return {key: _short(value) if isinstance(value, dict) else value for key, value in kept.items()}


def markdown(results: Results, settings: Settings, found: dict[str, Any], said: dict[str, Any], head: str) -> str:
    """All tables, after `head`."""
    parts = [head]
    budget = {"flow": "flow loss", "fidelity": "prompt fidelity"}
    parts.append(_table("Same budget, held-out stories (mean ± standard deviation over seeds)", found["eval"], budget))
    parts.append(_table("A subject that returns after a cut, by sinks (NVFP4-aware, FP4 cache)", found["sinks"],
                        {"colour": "same colour", "given_colour": "given subject: same colour", "iou": "shape IoU", "iou_first": "… first chunk", "iou_last": "… last chunk",
                         "cosine": "embedding cosine", "agreement": "same digit seen", "fidelity_return": "prompted digit seen", "given_iou": "given subject: shape IoU", "given_agreement": "given: same digit seen"}))  # fmt: skip
    parts.append(_reference(results))
    parts += memory_tables(settings, found["memory"])
    parts.append(probe_tables(probes_in(results)))
    seconds = settings.drift_chunks * 32 / 24
    columns = {name: name.replace("_", ", ") for name in DRIFT} | {
        "left": "fidelity left",
        "steady_films": "films with a figure",
    }
    parts.append(
        _table(
            f"Drift over one shot of {seconds:.0f} s (start: first five chunks, end: last five)",
            found["drift"],
            columns,
        )
    )
    parts.append(_table(f"Drift over one shot of {settings.film_chunks * 32 / 24:.0f} s", found["film"], columns))
    parts.append(_students(results, settings, found))
    parts.append(_claims(said))
    return "\n\n".join(part for part in parts if part) + "\n"


def probes_in(results: Results) -> dict[str, dict[str, Any]]:
    """What was found of each model that was looked into."""
    return {name.removeprefix("probe-"): found for name, found in results.items() if name.startswith("probe-")}


def memory_tables(settings: Settings, rows: dict[str, Any]) -> list[str]:
    """Returns of a subject: over all, by distance, and by subjects between."""
    plain = {
        "colour": "same colour",
        "colour_first": "… first chunk",
        "colour_last": "… last chunk",
        "iou": "shape IoU",
    }
    seconds = {d: f"{d} chunks ({d * 32 / 24:.0f} s)" for d in settings.memory_distances}
    far = min(
        d for d in (*settings.memory_distances, max(settings.memory_between)) if d >= max(settings.memory_between)
    )
    return [
        _table(
            "A subject that returns, over all distances (NVFP4-aware with FP4 cache, but for the bf16 rows)",
            rows,
            plain,
        ),
        _table("… its colour, by distance", rows, {at_distance("colour", d): text for d, text in seconds.items()}),
        _table(
            f"… its colour, by subjects between ({far} chunks and more)",
            rows,
            {past_subjects("colour", n): str(n) for n in settings.memory_between},
        ),
        _table("… its shape IoU, by distance", rows, {at_distance("iou", d): text for d, text in seconds.items()}),
    ]


def fill(page: Path, text: str, out: Path) -> None:
    """Put `text` between the marks of `page`, and pictures and video into a folder beside it, named after it."""
    before = page.read_text(encoding="utf-8")
    if BEGIN not in before or END not in before:
        raise LongtakeError(f"{page} has no place for results", expected=f"{BEGIN} and {END}", fix="restore the page")
    folder = page.parent / page.stem
    folder.mkdir(exist_ok=True)
    links = []
    for name in (*PICTURES, "sheet.png", "sheet.mp4", "results.json"):
        if (out / name).is_file():
            shutil.copyfile(out / name, folder / name)
            link = f"![{Path(name).stem}]" if name.endswith("png") else f"[{name}]"
            links.append(f"{link}({page.stem}/{name})")
    head, rest = before.split(BEGIN, 1)
    inner = f"{BEGIN}\n{text}\n" + "\n\n".join(links) + f"\n{END}"
    with atomic_path(page) as partial:
        partial.write_text(head + inner + rest.split(END, 1)[1], encoding="utf-8")


def _head(results: Results, settings: Settings, machine: str, missing: dict[str, str], seconds: float) -> str:
    judge, habit = results.get("judge", {}), results.get("habit", {})
    lines = [f"**Not complete: {_missing(missing)}.**", ""] if missing else []
    lines += ["**Toy size: the figures mean nothing.**", ""] if settings.quick else []
    lines.append(
        f"{machine}, {seconds / 60:.1f} minutes, {settings.seeds} seeds. Start: {settings.start}; then {settings.base_steps} "
        f"steps in bf16 that all have in common, then {settings.branch_steps} steps for each arm and seed from there. Sampled "
        f"with {settings.steps} steps, guidance {settings.guidance:g}. {settings.flow_stories} held-out stories, each noised "
        f"{settings.flow_draws} times, for the flow loss; {settings.fidelity_stories} for prompt fidelity, "
        f"{settings.identity_stories} for identity, {settings.drift_stories} for drift."
    )
    if judge:
        lines.append(
            f"The judge names {judge['rendered']:.1%} of held-out frames rightly as rendered, {judge['through_vae']:.1%} through the VAE."
        )
    if habit:
        lines.append(
            f"What 4 bits cost in flow loss before the arms part: {habit['shipped_nvfp4'] - habit['shipped_bf16']:+.5f} for the "
            f"shipped model, {habit['base_nvfp4'] - habit['base_bf16']:+.5f} for the bf16 base."
        )
    return "\n".join(lines)


def _missing(missing: dict[str, str]) -> str:
    """Names by reason; of many, some."""
    reasons: dict[str, list[str]] = {}
    for name, why in missing.items():
        reasons.setdefault(why, []).append(name)
    return "; ".join(f"{some(names, 12)}: {why}" for why, names in reasons.items())


def _table(title: str, rows: dict[str, Any], columns: dict[str, str]) -> str:
    if not any(rows.values()):
        return ""
    lines = [f"### {title}", "", "| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, figures in rows.items():
        if figures:
            lines.append(f"| {NAMES.get(name, name)} | " + " | ".join(_cell(figures.get(c)) for c in columns) + " |")
    return "\n".join(lines)


def _cell(figure: dict[str, Any] | None) -> str:
    return f"{figure['mean']:.4f} ± {figure['spread']:.4f}" if figure else "—"


def _reference(results: Results) -> str:
    found = results.get("reference")
    if not found:
        return ""
    best, least = found["identity"], found["another_scan"]
    return (
        f"For comparison, the data set itself through the VAE: same colour {best['colour']:.3f}, shape IoU {best['iou']:.3f}, cosine {best['cosine']:.3f}, same digit "
        f"{best['agreement']:.3f}; another writer's digit of the same class: {least['iou']:.3f}, {least['cosine']:.3f}, "
        f"{least['agreement']:.3f}. Prompt fidelity of the data set through the VAE: {found['fidelity']:.3f}."
    )


def _students(results: Results, settings: Settings, found: dict[str, Any]) -> str:
    rows = {s: row for s, row in found["students"].items() if any(v is not None for v in row.values())}
    if not rows:
        return ""
    teacher = teacher_fidelity(results, settings)
    lines = ["### Distilled students (NVFP4, FP4 cache): prompt fidelity", "", "| steps | student | same steps, not distilled | teacher |", "|---|---|---|---|"]  # fmt: skip
    show = lambda v: "—" if v is None or math.isnan(v) else f"{v:.4f}"  # noqa: E731
    for steps, row in rows.items():
        lines.append(
            f"| {steps} | {show(row['student'])} | {show(row['same steps, not distilled'])} | {show(teacher)} |"
        )
    return "\n".join(lines)


def _claims(said: dict[str, dict[str, Any]]) -> str:
    word = {True: "yes", False: "**no**", None: "not measured"}
    lines = ["### What it shows", "", "| claim | holds | difference | 95 % over stories | spread over seeds |", "|---" * 5 + "|"]  # fmt: skip
    for text, claim in said.items():
        number = [f"{claim[k]:+.4f}" if k in claim else "—" for k in ("difference", "spread")]
        around = " to ".join(f"{x:+.4f}" for x in claim["interval"]) if claim.get("interval") else "—"
        lines.append(f"| {text} | {word[claim['holds']]} | {number[0]} | {around} | {number[1].lstrip('+')} |")
    return "\n".join(lines)
