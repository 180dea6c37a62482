"""A run's timings chunk by chunk, and the report's figures of them."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from longtake.formats.memory import Budget
from longtake.runtime.chunk import Chunk
from longtake.runtime.report import Report, conditions_of_run
from longtake.runtime.session import Session

DIT_STAGES = ("conditions", "denoise", "clean")


class Meter:
    """The clock runs from the start. Call `add` for every chunk once its frames are on the host, then `figures`."""

    def __init__(self, started: float | None = None) -> None:
        """`started`: when, on time.perf_counter's clock, if not now."""
        self._started = self._latest = time.perf_counter() if started is None else started
        self.first_chunk_s: float | None = None
        self.chunks = self.frames = 0
        self.prompts: dict[str, None] = {}
        self._total_ms: Counter[str] = Counter()

    def add(self, chunk: Chunk) -> None:
        """Count a finished chunk; waits for its frames."""
        self.frames += len(chunk.frames)
        self.chunks += 1
        self.prompts[chunk.prompt] = None
        self._latest = chunk.finished_at  # not "now": frames may have waited for the next chunk's passes
        if self.first_chunk_s is None:
            self.first_chunk_s = self._latest - self._started
        self._total_ms.update(chunk.timings)

    def fps(self) -> dict[str, float | None]:
        """Frames a second: DiT alone, VAE alone, end to end."""
        dit = sum(self._total_ms[stage] for stage in DIT_STAGES) / 1e3
        rates = {"dit": dit, "vae": self._total_ms["decode"] / 1e3, "end_to_end": self._latest - self._started}
        return {name: round(self.frames / spent, 3) if spent and self.frames else None for name, spent in rates.items()}

    def figures(self) -> dict[str, Any]:
        """The report's fields that are measured here."""
        first = self.first_chunk_s
        return {
            "chunks": self.chunks,
            "frames": self.frames,
            "prompts": list(self.prompts),
            "fps": self.fps(),
            "first_chunk_s": None if first is None else round(first, 4),
            "stage_ms": {stage: round(total / self.chunks, 2) for stage, total in self._total_ms.items()},
        }

    def report(self, session: Session, budget: Budget | None, **more: Any) -> Report:
        """Of what `session` generated; `budget`: what was announced before, if anything was."""
        options, conditions = session.options, conditions_of_run(session.model.backend, budget)
        how: dict[str, Any] = {"steps": options.steps, "guidance": options.guidance, "seed": options.seed}
        return Report(kind="generate", start=session.told, **how, **more, **conditions, **self.figures())
