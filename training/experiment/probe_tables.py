"""Tables and a picture of what `probe` found, one row or panel a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longtake.files import atomic_path
from longtake.training.experiment.probe import CONDITIONS, ROLES

COLOURS = ("#4878a8", "#d98a3d", "#7fb069", "#cccccc")  # of ROLES
Found = Mapping[str, Mapping[str, Any]]


def probe_tables(found: Found) -> str:
    """Loss at the cut, asked and told, and attention at the cut and in the last chunk, the mean over layers."""
    if not found:
        return ""
    lines = [
        "### Where attention falls when a subject returns unnamed, the past being the data's",
        "",
        "| model | window | loss at the cut, told | unread: asked − told | "
        + " | ".join(f"{role}, at the cut" for role in ROLES)
        + " | "
        + " | ".join(f"{role}, last chunk" for role in ROLES)
        + " |",
        "|---" * (4 + 2 * len(ROLES)) + "|",
    ]
    for name, one in found.items():
        for condition in (c for c in CONDITIONS if c in one):
            told, mass = one[condition], one[condition]["mass"]
            shares = [f"{value:.3f}" for chunk in (0, -1) for value in mean_over_layers(mass[chunk])]
            unread = f"{told['unread']:+.4f} ± {told['unread_error']:.4f}"
            lines.append(f"| {name} | {condition} | {told['told'][0]:.4f} | {unread} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def mean_over_layers(mass_LR: list[list[float]]) -> list[float]:
    """Share of the attention by role."""
    return [sum(layer) / len(mass_LR) for layer in zip(*mass_LR)]


def draw_probes(found: Found, path: Path) -> None:
    """Attention by layer and role with both sinks, at the cut and in the last chunk; below, what is not read, by window."""
    from matplotlib.figure import Figure

    if not found:
        return
    figure = Figure(figsize=(3.2 * len(found) + 1, 7.5))
    axes = figure.subplots(3, len(found), squeeze=False)
    for column, (name, one) in enumerate(found.items()):
        for row, (chunk, title) in enumerate(((0, "at the cut"), (-1, "last chunk"))):
            axis, bottom = axes[row, column], [0.0] * len(one["both"]["mass"][chunk])
            for role, colour, values in zip(ROLES, COLOURS, zip(*one["both"]["mass"][chunk])):
                axis.bar(range(len(values)), values, bottom=bottom, color=colour, label=role)
                bottom = [low + value for low, value in zip(bottom, values)]
            axis.set_title(f"{name}: attention {title}", fontsize=8)
            axis.set_xlabel("layer", fontsize=8)
        known = [condition for condition in CONDITIONS if condition in one]
        axis = axes[2, column]
        axis.bar(
            known, [one[c]["unread"] for c in known], yerr=[one[c]["unread_error"] for c in known], color="#9db8d9"
        )
        axis.set_title("unread: loss asked − told, at the cut", fontsize=8)
        axis.tick_params(axis="x", labelsize=7, rotation=20)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=100)
