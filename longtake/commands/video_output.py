"""What `longtake generate` writes: the video, its contact sheet, the report."""

from __future__ import annotations

import sys
from pathlib import Path

from longtake.commands.contact_sheet import ContactSheet, write_contact_sheet
from longtake.commands.meter import Meter
from longtake.commands.progress_bar import GenerateProgress
from longtake.runtime.budget.terms_table import Budget
from longtake.runtime.chunk import Chunk
from longtake.runtime.report import Report, conditions_of_run, table, write_report
from longtake.runtime.session import Session
from longtake.video import VideoWriter


class VideoOutput:
    """What a run produces besides latents: the video, its contact sheet, and the figures."""

    def __init__(self, out: Path, fps: int) -> None:
        self.out, self.fps = out, fps
        self.meter, self.sheet = Meter(), ContactSheet()
        self._writer: VideoWriter | None = None

    def add(self, chunk: Chunk, progress: GenerateProgress) -> None:
        """Write a chunk's frames; waits for the decoder."""
        frames = chunk.frames
        if self._writer is None:
            self._writer = VideoWriter(self.out, self.fps)
        self._writer.write(frames)
        self.meter.add(chunk)
        self.sheet.add(chunk.index, chunk.prompt, chunk.cut, frames)
        progress.update(chunk, self.meter)

    def close(self) -> None:
        """Put the video under its final name, however many frames it has; without any there is no file."""
        if self._writer is not None:
            self._writer.close()

    @property
    def sheet_path(self) -> Path:
        return self.out.with_suffix(".png")


def conclude(
    session: Session, output: VideoOutput, report_to: Path | None, complete: bool, budget: Budget | None
) -> None:
    """Write the report and the contact sheet, and say where everything is."""
    if not output.sheet.stills:
        print("interrupted before the first chunk was whole: there is nothing to keep", file=sys.stderr)
        return
    options = session.options
    report = Report(
        kind="generate",
        steps=options.steps,
        guidance=options.guidance,
        seed=options.seed,
        complete=complete,
        output=str(output.out),
        **conditions_of_run(session.model.backend, budget),
        **output.meter.figures(),
    )
    report_path = report_to or output.out.with_suffix(".json")
    write_report(report, report_path)
    write_contact_sheet(output.sheet.stills, output.sheet_path)
    print(table(report))
    kept = "" if complete else " (interrupted: the frames finished so far)"
    print(f"video:  {output.out}{kept}\nsheet:  {output.sheet_path}\nreport: {report_path}")
