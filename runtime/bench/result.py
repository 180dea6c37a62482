"""The benchmark's report: our figures, PyTorch's beside them, their ratios, and the conditions all of it holds for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from longtake.files import write_json
from longtake.provenance import origin
from longtake.runtime.bench.options import BenchOptions
from longtake.runtime.bench.roofline import roofline
from longtake.training.models.families import family_of

Figures = dict[str, Any]

# ratio name: (our rate, part, its rate)
RATIOS = {
    "dit_vs_eager": ("dit", "torch", "dit"),
    "dit_vs_compiled": ("dit", "torch_compile", "dit"),
    "dit_vs_autotuned": ("dit", "torch_autotune", "dit"),
    "vae_vs_eager": ("vae", "torch_vae", "vae"),
    "vae_vs_best_eager": ("vae", "torch_vae", "vae_best"),
    "end_to_end_vs_serial_eager": ("end_to_end", "torch", "serial"),
    "serial_vs_serial_eager": ("serial", "torch", "serial"),
}


def report_of(options: BenchOptions, parts: dict[str, Figures]) -> Figures:
    """The report (see DESIGN, "Honest figures") of the parts measured so far; what is missing is null or says why."""
    recipe, preset = options.the_recipe, options.model
    ours = parts.get("engine", {})
    machine: Figures = next((figures["machine"] for figures in parts.values() if "machine" in figures), {})
    return {
        "kind": "bench",
        **origin(),
        "preset": preset.name,
        "recipe": recipe.name,
        "precision": recipe.precision,
        "cache": recipe.cache,
        "attention": recipe.attention,
        "backend": ours.get("backend"),
        "reason": ours.get("reason"),
        "weights": "random" if ours.get("backend") != "reference" else "of the export (CPU reference)",
        "gpu": machine.get("gpu"),
        "machine": machine,
        "product_figures": bool(machine.get("gpu")),
        "resolution": f"{preset.width}x{preset.height}",
        "steps": options.steps,
        "guidance": 1.0,
        "chunk_latents": preset.chunk_latents,
        "window_latents": preset.first_frame(preset.window_chunks),
        "sinks": "global and shot" if "cut" in family_of(preset).can else "first chunk",
        "warmup_chunks": options.warm_chunks,
        "chunks": options.steady_chunks,
        "gpus": options.gpus,
        "fps": ours.get("fps", {}),
        "first_chunk_s": ours.get("first_chunk_s"),
        "stage_ms": ours.get("stage_ms", {}),
        "peak_gb": ours.get("peak_gb"),
        "peak_of": "GPU memory of the process, from the driver" if machine.get("gpu") else "resident memory (CPU)",
        "budget": budget_beside(ours),
        "vae_conv": ours.get("vae_conv", {}),
        "kept_windows": ours.get("kept_windows", {}),
        "agreement": agreement(parts),
        "roofline": roofline(recipe, options.steps, machine.get("gpu"), ours.get("stage_ms", {})),
        "error": ours.get("error"),
        "engine": ours,
        "against": {name: figures for name, figures in parts.items() if name != "engine"},
        "ratio": ratios(parts),
    }


def ratios(parts: dict[str, Figures]) -> dict[str, float]:
    """Our frames a second over PyTorch's, and several GPUs' over one's, for every pair of rates that was measured; above 1
    we are, or they are, faster."""
    known = {}
    for name, (rate, part, theirs) in RATIOS.items():
        mine, other = (parts.get(p, {}).get("fps", {}).get(r) for p, r in (("engine", rate), (part, theirs)))
        if mine and other:
            known[name] = round(mine / other, 4)
    rates = {part: parts.get(part, {}).get("fps", {}) for part in ("engine", "ranks")}
    several = {f"{rate}_ranks_vs_one": fps / rates["engine"][rate] for rate, fps in rates["ranks"].items()
               if fps and rates["engine"].get(rate)}  # fmt: skip
    return known | {name: round(ratio, 4) for name, ratio in several.items()}


def budget_beside(ours: Figures) -> Figures | None:
    """{"gb", "measured_gb", "off_by"}: the promise and the peak. None without a promise or a GPU's peak."""
    budget = ours.get("budget") or {}  # with a decoder on another GPU: of the generator's, as the peak is
    promised, measured = budget.get("generate_gb", budget.get("total_gb")), ours.get("peak_gb")
    if not promised or not measured or not ours.get("machine", {}).get("gpu"):
        return None
    return {"gb": promised, "measured_gb": measured, "off_by": round(measured / promised - 1, 4)}


def agreement(parts: dict[str, Figures]) -> dict[str, float]:
    """Relative L2 distance of our first chunk's latents from each side's (same weights, seed and prompt).

    It shows that the sides do the same work; random weights amplify what precision costs, so it is no accuracy figure.
    """
    ours = parts.get("engine", {}).get("sample")
    if not ours or parts["engine"].get("backend") == "reference":  # that one has the export's weights
        return {}
    others = {name: side["sample"] for name, side in parts.items() if name != "engine" and side.get("sample")}
    return {name: round(math.dist(ours, other) / max(math.hypot(*other), 1e-9), 5) for name, other in others.items()}


def write_result(folder: Path, report: Figures) -> Path:
    """Write bench.json, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "bench.json", report)
    return folder / "bench.json"


def table(report: Figures) -> str:
    """The report as lines for people."""
    rows = [
        f"{report['recipe']} on {machine_name(report)}: {report['resolution']}, {report['steps']} steps "
        f"and a clean pass, chunk {report['chunk_latents']}, window {report['window_latents']} latents, "
        f"{report['sinks']} sink, {report['weights']} weights"
    ]
    if not report["product_figures"]:
        rows.append("CPU timings: they show that the benchmark runs, and nothing else")
    rows.append(f"  {'':22} {'DiT':>9} {'VAE':>9} {'serial':>9} {'overlap':>9} {'first s':>9} {'peak GB':>9}")
    rows += [_side_row(name, side) for name, side in _sides(report).items()]
    rows.append(f"  {'':22} frames a second, steady state; first chunk with warm networks and an empty cache")
    rows += [f"  {name:28} {value:6.3f}x" for name, value in report["ratio"].items()]
    rows += [_roofline_row(name, row) for name, row in report["roofline"].items()]
    stages = "  ".join(f"{name} {ms:.2f}" for name, ms in report["stage_ms"].items())
    rows.append(f"  milliseconds: {stages}")
    if counts := [f"{name} {_counts(side)}" for name, side in _sides(report).items() if side.get("vae_conv")]:
        rows.append(f"  convolutions of the VAE: {'; '.join(counts)}")
    if kept := report["kept_windows"]:
        rows.append(f"  windows kept between passes: {kept['layers']} of {kept['of']} layers, {kept['chosen']}")
    ranks = report["against"].get("ranks", {})
    if told := ranks.get("communication"):
        rows.append(f"  a clean pass on {ranks['gpus']} GPUs, step by step, in ms: {told}")
    if apart := report["engine"].get("dit_pass_ms"):
        rows.append(f"  a DiT pass, step by step, in ms: {apart}")
    if budget := report["budget"]:
        rows.append(
            f"  memory: {budget['measured_gb']} GB measured, {budget['gb']} GB promised ({budget['off_by']:+.1%})"
        )
    rows += memory_lines(report["engine"].get("memory") or {})
    for name, distance in report["agreement"].items():
        rows.append(f"  first chunk's latents differ from {name}'s by {distance:.2%}")
    return "\n".join(rows)


def machine_name(report: Figures) -> str:
    """What the figures were taken on."""
    machine: Figures = report["machine"]
    decoding = f", decoding on a second {machine['decode_gpu']}" if machine.get("decode_gpu") else ""
    return f"{report['gpu'] or machine.get('cpu')}{decoding}"


def memory_lines(memory: Figures) -> list[str]:
    """The memory's two tables: what each step added by the driver's figure, and each term, promised and measured, GB."""
    if not memory.get("steps"):
        return [f"  memory step by step: {memory['error']}"] if memory.get("error") else []
    lines = [f"  {'memory, GB, after':32} {'driver':>8} {'added':>8} {'promised':>8} {'slack':>8} {'outside':>8}"]
    keys = ("gb", "added_gb", "promised_gb", "slack_gb", "outside_gb")
    lines += [f"  {row['step']:32} " + " ".join(f"{row[key]:8.3f}" for key in keys) for row in memory["steps"]]
    lines.append("  slack: held by torch without a tensor; outside: not torch's (context, kernels, libraries)")
    lines.append(f"  {'memory, GB, of':32} {'promised':>8} {'measured':>8}")
    for row in memory["terms"]:
        measured = "-" if row["measured_gb"] is None else f"{row['measured_gb']:.3f}"
        lines.append(f"  {row['term']:32} {row['promised_gb']:8.3f} {measured:>8}  {row['known']}")
    return lines


def _sides(report: Figures) -> dict[str, Figures]:
    return {f"longtake {report['engine'].get('backend', '')}": report["engine"], **report["against"]}


def _counts(side: Figures) -> str:
    return ", ".join(f"{count} in {codes}" for codes, count in side["vae_conv"].items())


def _side_row(name: str, side: Figures) -> str:
    fps = side.get("fps", {})
    cells = [*map(fps.get, ("dit", "vae", "serial", "end_to_end")), side.get("first_chunk_s"), side.get("peak_gb")]
    line = f"  {name:22} " + " ".join(f"{'-' if cell is None else format(cell, '.2f'):>9}" for cell in cells)
    return line + (f"  failed: {side['error'][:120]}" if side.get("error") else "")


def _roofline_row(name: str, row: Figures) -> str:
    if row["floor_ms"] is None:
        return f"  {name}: {row['tflop']:.3f} TFLOP and {row['gb']:.2f} GB a chunk; no measured rates for this machine"
    reached = row["share"] is not None and f"{row['measured_ms']:.0f} ms, {row['share']:.0%} of the floor's speed"
    share = reached or "not measured"
    return f"  {name}: {row['tflop']:.0f} TFLOP, {row['gb']:.1f} GB a chunk; floor {row['floor_ms']:.0f} ms; {share}"
