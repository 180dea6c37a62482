"""What a check leaves behind: a JSON report, and a plot of every error against its gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longtake.accuracy.rows import Row
from longtake.files import atomic_path, write_json
from longtake.formats.recipe import Recipe
from longtake.runtime.backends.base import Backend
from longtake.runtime.check.chunks import ChunkRow
from longtake.runtime.report import conditions_of_run
from longtake.training.models.presets import SamplingConfig

FLOOR = 1e-9  # an error of 0 is drawn here: the axis is logarithmic
LABELS = 36  # more outputs than this are numbered instead of named


def write_report(
    path: Path,
    recipe: Recipe,
    backend: Backend,
    rows: Sequence[Row],
    chunks: Sequence[ChunkRow],
    against: str,
    sampling: SamplingConfig | None = None,
) -> dict[str, Any]:
    """Write the JSON report at `path` and the plot beside it (.png); returns the report.

    sampling: of the chunks; the preset's if None.
    """
    plot = path.with_suffix(".png")
    sampling = sampling or recipe.model.sampling
    report = {
        "kind": "check",
        **conditions_of_run(backend),
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "gate": asdict(recipe.gate),
        "passed": all(row.passed for row in rows) and all(row.passed for row in chunks),
        "fps": {},
        "first_chunk_s": None,
        "stage_ms": {},
        "comparisons": [row.as_json() for row in rows],
        "chunks_against": against if chunks else None,
        "chunks": [row.as_json() for row in chunks],
        "plot": plot.name,
    }
    draw(plot, recipe.name, rows)
    write_json(path, report)
    return report


def draw(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Error of every compared tensor on a logarithmic axis, a panel a network, with the gate as a line."""
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(row.network for row in rows))
    figure = Figure(figsize=(10, 2.6 * len(networks) + 0.6), layout="constrained")
    figure.suptitle(f"{title}: relative L2 error against the PyTorch model of the recipe")
    axes = figure.subplots(len(networks), 1, squeeze=False)[:, 0]
    for panel, network in zip(axes, networks):
        _draw_network(panel, network, [row for row in rows if row.network == network])
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=110, metadata={"Software": "longtake"})


def _draw_network(panel: Any, network: str, rows: list[Row]) -> None:
    outputs = list(dict.fromkeys(row.output for row in rows))
    place = {name: i for i, name in enumerate(outputs)}
    for against in dict.fromkeys(row.against for row in rows):
        points = [row for row in rows if row.against == against]
        heights = [max(row.error, FLOOR) for row in points]
        panel.plot([place[row.output] for row in points], heights, "o", markersize=4, alpha=0.7, label=against)
    panel.axhline(min(row.gate for row in rows), color="tab:red", linewidth=1, label="gate")
    panel.set_yscale("log")
    panel.set_ylim(FLOOR / 2, 10)
    panel.set_ylabel("error")
    panel.set_title(network, loc="left", fontsize=10)
    panel.legend(fontsize=8, loc="upper right", ncols=4)
    if len(outputs) <= LABELS:
        panel.set_xticks(range(len(outputs)), outputs, rotation=60, ha="right", fontsize=7)
    else:
        panel.set_xlabel(f"{len(outputs)} outputs and layers, in order", fontsize=8)
