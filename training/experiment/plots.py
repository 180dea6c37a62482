"""Plots of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longtake.files import atomic_path

PICTURES = ("arms.png", "sinks.png", "memory.png", "probe.png", "drift.png")


def draw(results: dict[str, dict[str, Any]], found: dict[str, Any], out: Path) -> None:
    """Write each of PICTURES for which there are figures."""
    arms = {"flow": "held-out flow loss (lower is better)", "fidelity": "prompt fidelity"}
    sinks = {"colour": "returning subject has its colour", "iou": "shape IoU", "agreement": "same digit seen"}
    _bars(found["eval"], arms, out / "arms.png")
    _bars(found["sinks"], sinks, out / "sinks.png")
    _returns(found["memory"], out / "memory.png")
    _curves(results, out / "drift.png")


def _bars(rows: dict[str, Any], metrics: dict[str, str], path: Path) -> None:
    """One panel a metric: mean, spread and each seed's value of every condition."""
    from matplotlib.figure import Figure

    names = [name for name, figures in rows.items() if set(metrics) <= set(figures)]
    if not names:
        return
    figure = Figure(figsize=(5 * len(metrics), 3.4))
    axes = figure.subplots(1, len(metrics))
    for axis, (metric, title) in zip(axes, metrics.items()):
        figures = [rows[name][metric] for name in names]
        axis.bar(names, [f["mean"] for f in figures], yerr=[f["spread"] for f in figures], capsize=4, color="#9db8d9")
        for place, f in enumerate(figures):
            axis.plot([place] * len(f["values"]), f["values"], "k.", markersize=4)
        values = [v for f in figures for v in f["values"]]
        room = max(1e-3, max(values) - min(values))
        axis.set_ylim(max(0.0, min(values) - room), max(values) + room / 2)
        axis.set_title(title, fontsize=10)
        axis.tick_params(axis="x", labelsize=8)
    figure.tight_layout()
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _returns(rows: dict[str, Any], path: Path) -> None:
    """Colour kept by distance and by subjects between: mean and spread over seeds of every condition."""
    from matplotlib.figure import Figure

    panels = {"colour_at_": "chunks until it returns", "colour_past_": "subjects between"}
    known = {name: figures for name, figures in rows.items() if "colour" in figures}
    if not known:
        return
    figure = Figure(figsize=(10, 3.6))
    for axis, (prefix, title) in zip(figure.subplots(1, 2), panels.items()):
        for name, figures in known.items():
            points = {int(m[len(prefix) :]): f for m, f in figures.items() if m.startswith(prefix)}
            means, spreads = ([f[k] for f in points.values()] for k in ("mean", "spread"))
            axis.errorbar(list(points), means, spreads, marker="o", markersize=3, capsize=3, label=name)
        axis.axhline(1 / 8, color="grey", linewidth=0.8, linestyle=":")
        axis.set(xlabel=title, ylabel="same colour", ylim=(0, 1))
    figure.axes[0].legend(fontsize=7)
    figure.tight_layout()
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _curves(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Fidelity and image statistics over the chunks of the long shots, the mean over seeds."""
    from matplotlib.figure import Figure

    metrics = ("fidelity", "contrast", "saturation", "detail", "motion")
    conditions: dict[str, list[dict[str, Any]]] = {}
    for name, result in results.items():
        if name.startswith("drift-"):
            conditions.setdefault(name[len("drift-") :].rpartition("-")[0], []).append(result)
    if not conditions:
        return
    figure = Figure(figsize=(4 * len(metrics), 3.2))
    axes = figure.subplots(1, len(metrics))
    for axis, metric in zip(axes, metrics):
        for name, seeds in conditions.items():
            curves = [seed[key] for seed in seeds if (key := f"{metric}_by_chunk") in seed]
            axis.plot([sum(values) / len(values) for values in zip(*curves)], label=name)
        axis.set_title(metric, fontsize=10)
        axis.set_xlabel("chunk (1.33 s)")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
