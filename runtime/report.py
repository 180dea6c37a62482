"""The run report: what was run, on what, and how fast. Figures are never shown without the conditions they hold for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from longtake.files import write_json
from longtake.formats.memory import Budget
from longtake.plugins.registry import conv_ops
from longtake.provenance import origin
from longtake.runtime.backends.base import Backend
from longtake.training.models.presets import Preset


@dataclass(frozen=True)
class Report:
    """One run.

    kind: "generate", "bench", "train" or "check". gpu: its name, None on a CPU. resolution: "WIDTHxHEIGHT" pixels.
    fps: video frames a second of the DiT alone ("dit": conditions, all passes), of the VAE decoder alone ("vae"), and
    of the whole run, from the first chunk's start to the last frame on the host ("end_to_end"); warm-up included.
    first_chunk_s: from the start to the first frames on the host. stage_ms: mean milliseconds a chunk.
    peak_gb: peak memory in GB of 10^9 bytes; peak_of says which memory. against, ratio: for a comparison.
    checkpoint: its name and the digests of its parts. export: its state, and why where it is not "passed".
    prompts: of the video, each once. story: the file. rerun_with: a command that does the same.
    start: the picture or clip that the video began with, and where its camera went, {} if it began with nothing.
    decode_device: where the VAE ran. budget: what was announced before the run, term by term ("total_gb", "terms",
    "apart"; see longtake/formats/memory.py), None on a CPU. vae_conv: how many of the VAE decoder's convolutions, those that are
    ops, ran in which codes. kept_windows: see `Backend.windows`.
    """

    kind: str
    command: str
    commit: str | None
    date: str
    preset: str
    recipe: str
    backend: str
    reason: str
    gpu: str | None
    cpu: str
    versions: dict[str, str]
    resolution: str
    steps: int
    guidance: float
    seed: int
    chunk_latents: int
    window_latents: int
    chunks: int
    frames: int
    fps: dict[str, float | None]
    first_chunk_s: float | None
    stage_ms: dict[str, float]
    peak_gb: float
    peak_of: str
    decode_device: str = ""
    budget: dict[str, Any] | None = None
    checkpoint: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    story: str | None = None
    start: dict[str, Any] = field(default_factory=dict)
    rerun_with: str = ""
    complete: bool = True
    output: str | None = None
    against: dict[str, Any] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)
    vae_conv: dict[str, int] = field(default_factory=dict)
    kept_windows: dict[str, Any] = field(default_factory=dict)


def write_report(report: Report, path: Path | str) -> None:
    """Write a report as JSON, atomically."""
    write_json(path, asdict(report))


def conv_counts(backend: Any) -> dict[str, int]:
    """Convolutions of the VAE's later steps by what they run in; {} where they are no ops."""
    graph = getattr(getattr(backend, "networks", {}).get("vae_steady"), "exported", None)
    if graph is None:
        return dict(getattr(backend, "vae_conv", {}))
    return conv_ops(step.name for step in graph.steps if step.kind == "op")


def conditions_of_run(backend: Backend, budget: Budget | None = None) -> dict[str, Any]:
    """The fields of a report that say under which conditions it holds, timings aside.

    `budget`: what was announced for the backend, if anything was.
    """
    preset: Preset = backend.preset
    on_gpu = backend.device.type == "cuda"
    return {
        **origin(),
        "checkpoint": {"name": backend.made_of.get("model", ""), "digests": dict(backend.weights)},
        "export": dict(backend.made_of.get("export", {})),
        "preset": preset.name,
        "recipe": backend.recipe.name,
        "backend": backend.name,
        "reason": backend.reason,
        "gpu": torch.cuda.get_device_name(backend.device) if on_gpu else None,
        "resolution": f"{preset.width}x{preset.height}",
        "chunk_latents": preset.chunk_latents,
        "window_latents": preset.first_frame(preset.window_chunks),
        "peak_gb": round(backend.peak_bytes() / 1e9, 3),
        "decode_device": str(backend.decode_device),
        "budget": budget.as_json() if budget else None,
        "vae_conv": conv_counts(backend),
        "kept_windows": dict(backend.windows),
        "peak_of": "GPU memory" if on_gpu else "resident memory of the process (CPU)",
    }


def table(report: Report) -> str:
    """The report as a few lines for people."""
    rows = [
        ("backend", f"{report.backend}: {report.reason}"),
        ("recipe", f"{report.recipe} (preset {report.preset})"),
        ("model", _model(report)),
        ("machine", report.gpu or report.cpu),
        ("video", f"{report.frames} frames in {report.chunks} chunks at {report.resolution}"
                  + ("" if report.complete else "; interrupted")),
        *([("start", "  ".join(f"{name} {value}" for name, value in report.start.items()))] if report.start else []),
        ("sampling", f"{report.steps} steps and a clean pass, guidance {report.guidance:g}, seed {report.seed}"),
        ("frames a second", "  ".join(f"{name} {_number(value)}" for name, value in report.fps.items())),
        ("first chunk", f"{_number(report.first_chunk_s)} s"),
        ("a chunk takes", "  ".join(f"{name} {value:.0f} ms" for name, value in report.stage_ms.items())),
        ("peak memory", f"{report.peak_gb:.2f} GB {report.peak_of}"
                        + (f"; {report.budget['total_gb']:.2f} GB announced" if report.budget else "")),
    ]  # fmt: skip
    return "\n".join(f"  {name:16} {value}" for name, value in rows)


def _model(report: Report) -> str:
    name, digests = report.checkpoint.get("name", ""), report.checkpoint.get("digests", {})
    told = " ".join(f"{kind} {digest[:12]}" for kind, digest in digests.items())
    state, why = report.export.get("state", ""), report.export.get("why", "")
    export = f"export {state}" + (f" ({why})" if why else "") if state else ""
    return ", ".join(part for part in (name, told, export) if part) or "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
