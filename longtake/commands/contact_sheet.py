"""One picture of a video: a frame of every chunk with its prompt beneath, cuts marked."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longtake.files import atomic_path

COLUMNS = 4
WIDTH_INCHES, DPI = 2.4, 100
MOST_STILLS = 24
STILL_PIXELS = 320


@dataclass(frozen=True)
class Still:
    """A frame uint8 [H, W, 3] of chunk `index`, with its prompt."""

    index: int
    prompt: str
    cut: bool
    frame: np.ndarray


class ContactSheet:
    """Collects the middle frame of each chunk; of a long video only every 2nd, 4th, 8th, … so that memory is bounded."""

    def __init__(self) -> None:
        self.stills: list[Still] = []
        self._every = 1

    def add(self, index: int, prompt: str, cut: bool, frames_THWC: np.ndarray) -> None:
        """Take a still from chunk `index`."""
        if index % self._every:
            return
        middle = frames_THWC[len(frames_THWC) // 2]
        step = max(1, middle.shape[1] // STILL_PIXELS)
        self.stills.append(Still(index, prompt, cut, middle[::step, ::step].copy()))
        if len(self.stills) > MOST_STILLS:
            self._every *= 2
            self.stills = [still for still in self.stills if still.index % self._every == 0]


def write_contact_sheet(stills: Sequence[Still], path: Path | str) -> None:
    """Write the stills to `path` as PNG, in reading order, atomically."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(stills))
    rows = -(-len(stills) // columns)
    height = WIDTH_INCHES * stills[0].frame.shape[0] / stills[0].frame.shape[1] + 0.9
    figure = Figure(figsize=(WIDTH_INCHES * columns, height * rows), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axis in axes:
        axis.set_axis_off()
    for axis, still in zip(axes, stills):
        axis.imshow(still.frame, interpolation="lanczos")
        title = f"chunk {still.index}" + (", cut" if still.cut else "")
        text = textwrap.fill(still.prompt.replace("$", r"\$"), 34, max_lines=3, placeholder=" …")
        axis.set_title(title, fontsize=8, loc="left", color="darkred" if still.cut else "black", pad=2)
        axis.text(0.5, -0.03, text, transform=axis.transAxes, fontsize=7, ha="center", va="top")
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": "longtake"})
