"""The report as a picture: milliseconds a stage, and the ratios to PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

STAGES = ("denoise", "clean", "vae_chunk", "serial_chunk", "overlapped_chunk")
OURS, THEIRS = "#2f6f4f", "#9a9a9a"


def write_plot(report: dict[str, Any], path: Path) -> Path:
    """Bars of a chunk's stages for every side, and bars of ratios, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5))
    left, right = figure.subplots(1, 2)
    sides = {"longtake": report["engine"], **report["against"]}
    sides = {name: side for name, side in sides.items() if side.get("stage_ms")}
    for i, (name, side) in enumerate(sides.items()):
        heights = [side["stage_ms"].get(stage, 0.0) for stage in STAGES]
        offsets = [at + (i - (len(sides) - 1) / 2) * 0.8 / max(len(sides), 1) for at in range(len(STAGES))]
        shade = OURS if name == "longtake" else (0.45 + 0.12 * i,) * 3
        left.bar(offsets, heights, 0.8 / max(len(sides), 1), label=name, color=shade)
    left.set_xticks(range(len(STAGES)), [stage.replace("_", " ") for stage in STAGES], rotation=15)
    left.set_ylabel("milliseconds a chunk, steady state")
    if sides:
        left.legend()
    ratio = report["ratio"]
    right.barh(list(ratio), list(ratio.values()), color=[OURS if value >= 1 else THEIRS for value in ratio.values()])
    right.axvline(1.0, color="black", linewidth=0.8)
    right.set_xlabel("our frames a second / PyTorch's")
    for at, value in enumerate(ratio.values()):
        right.text(value, at, f" {value:.2f}", va="center")
    where = report["gpu"] or "CPU: not a figure"
    sizes = f"{report['recipe']}, {report['resolution']}, {report['steps']} steps"
    figure.suptitle(f"{sizes}, {where}, {report['weights']} weights")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return path
