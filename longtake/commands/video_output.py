"""What `longtake generate` writes: the video, its contact sheet, the report."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from longtake.files import atomic_path
from longtake.formats.memory import Budget
from longtake.runtime.chunk import Chunk
from longtake.runtime.meter import Meter
from longtake.runtime.report import table, write_report
from longtake.runtime.session import Session
from longtake.video import VideoWriter

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
    """One picture of a video, with prompts and cuts: collects the middle frame of each chunk; of a long video only every 2nd, 4th, 8th, … so that memory is bounded."""

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


class VideoOutput:
    """What a run produces besides latents: the video, its contact sheet, and the figures."""

    def __init__(self, out: Path, fps: int, chunks: int) -> None:
        self.out, self.fps = out, fps
        self.sheet, self._started = ContactSheet(), time.perf_counter()
        self._bar = tqdm(total=chunks, unit="chunk", desc="generating", file=sys.stderr, dynamic_ncols=True)
        self._writer: VideoWriter | None = None

    @cached_property
    def meter(self) -> Meter:
        """Its clock has run since this was made."""
        return Meter(self._started)

    def add(self, chunk: Chunk) -> None:
        """Write a chunk's frames; waits for the decoder."""
        frames = chunk.frames
        if self._writer is None:
            self._writer = VideoWriter(self.out, self.fps)
        self._writer.write(frames)
        self.meter.add(chunk)
        self.sheet.add(chunk.index, chunk.prompt, chunk.cut, frames)
        mark = "CUT " if chunk.cut else ""
        prompt = textwrap.shorten(chunk.prompt, 50, placeholder="…")
        self._bar.set_postfix_str(f"{self.meter.fps()['end_to_end'] or 0.0:.1f} frames/s, {mark}{prompt}")
        self._bar.update()

    def close(self) -> None:
        """Put the video under its final name, however many frames it has; without any there is no file."""
        self._bar.close()
        if self._writer is not None:
            self._writer.close()

    @property
    def sheet_path(self) -> Path:
        return self.out.with_suffix(".png")


def conclude(
    session: Session,
    output: VideoOutput,
    report_to: Path | None,
    complete: bool,
    budget: Budget | None,
    story: str | None = None,
) -> None:
    """Write the report and the contact sheet, and say where everything is."""
    if not output.sheet.stills:
        print("interrupted before the first chunk was whole: there is nothing to keep", file=sys.stderr)
        return
    report = output.meter.report(session, budget, complete=complete, output=str(output.out), story=story)
    report_path = report_to or output.out.with_suffix(".json")
    write_report(report, report_path)
    write_contact_sheet(output.sheet.stills, output.sheet_path)
    print(table(report))
    kept = "" if complete else " (interrupted: the frames finished so far)"
    print(f"video:  {output.out}{kept}\nsheet:  {output.sheet_path}\nreport: {report_path}")


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
