"""Figures of several ways to compute the same stories, each held against the first: what two commands print and write."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longtake.files import write_json
from longtake.options import option
from longtake.training.data.held_out_stories import MIXED_SEED
from longtake.training.experiment.summary import paired_interval

GATE = 0.95  # SSIM of a chunk
Row = dict[str, Any]


@dataclass(frozen=True)
class StoryOptions:
    """Stories and figures"""

    chunks: int = option(3, metavar="N")
    """of a story"""
    seed: int = option(MIXED_SEED, metavar="N")
    """of the stories"""
    judge: Path | None = option(None, metavar="FILE")
    """judge.safetensors of an experiment (default: one is trained)"""
    json: Path | None = option(None, metavar="FILE")
    """write the figures there as well, after each row (default: they are printed only)"""


def figures_of(fidelity: Sequence[float], likeness: Sequence[Sequence[float]]) -> Row:
    """A row: fidelity of each story, and SSIM of each chunk of the stories that were compared, if any was."""
    row: Row = {"fidelity": float(np.mean(fidelity)), "fidelity_by_story": [round(x, 4) for x in fidelity]}
    if likeness:
        row |= {
            "ssim": float(np.mean(likeness)),
            "ssim_by_chunk": np.mean(likeness, 0).round(5).tolist(),
            "ssim_below": float(np.mean(np.array(likeness) < GATE)),
            "ssim_lowest": float(np.min(likeness)),
            "ssim_stories": len(likeness),
        }
    return row


def tell(found: Iterable[tuple[str, Row]], path: Path | None, conditions: dict[str, Any], head: str = "") -> int:
    """Write rows as they come, with their difference to the first and its 95 % interval over stories; print the table."""
    rows: dict[str, Row] = {}
    for name, row in found:
        for first in list(rows.values())[:1]:
            row["difference"] = row["fidelity"] - first["fidelity"]
            row["interval"] = paired_interval([row["fidelity_by_story"]], [first["fidelity_by_story"]])
        rows[name] = row
        if path:
            write_json(path, {**conditions, "rows": rows})
    sys.stdout.write(head + "\n".join(table(rows)) + "\n")
    return 0


def table(rows: dict[str, Row]) -> list[str]:
    lines = [f"{'recipe':40} fidelity  difference          95 %        SSIM by chunk, below {GATE}, lowest"]
    for name, row in rows.items():
        line = f"{name[-40:]:40} {row['fidelity']:8.4f}"
        if "difference" in row:
            low, high = row["interval"]
            line += f"  {row['difference']:+10.4f}  [{low:+.4f}, {high:+.4f}]"
        if "ssim" in row:
            by_chunk = " ".join(f"{x:.4f}" for x in row["ssim_by_chunk"])
            line += f"  {by_chunk}  {row['ssim_below']:.0%}  {row['ssim_lowest']:.4f}"
        lines.append(line)
    return lines
