"""Which cases `longtake bench parallel` runs; results are collected while ranks run.

Legend: N chunks of a clip, P ranks.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from longtake.training.data.base import chunk_frames
from longtake.training.parallel.bench.options import ParallelBenchOptions
from longtake.training.parallel.bench.worker import Case, Job
from longtake.training.parallel.launch import run_ranks
from longtake.training.parallel.layout import NONE

logger = logging.getLogger(__name__)

Row = dict[str, Any]
STEP_S = 8  # of the search for the longest clip
ROUNDS = 3  # trials a mode in that search
START_S = 25  # processes, weights and the first kernels
KEPT_FREE = 3e9  # bytes of a GPU that are not torch's: CUDA context, NCCL's and cuDNN's own


@dataclass
class Runs:
    """Runs cases on P ranks until the budget's time is over. save: told of all results."""

    options: ParallelBenchOptions
    ranks: int
    save: Callable[[list[Row], dict[str, Row]], None]
    cases: list[Row] = field(default_factory=list)
    longest: dict[str, Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.options.budget_seconds

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def case(self, mode: str, seconds: float, rehearsed: bool = False) -> Case:
        """A clip of about `seconds`, of as many chunks as a multiple of the ranks."""
        preset = self.options.sized
        chunk = preset.chunk_latents * preset.vae.stride[0] / preset.fps
        return Case(mode, max(1, round(seconds / chunk / self.ranks)) * self.ranks, rehearsed)

    def head(self, case: Case) -> Row:
        """What is known of a case beforehand."""
        preset = self.options.sized
        return {
            "mode": case.mode,
            "seconds": round(chunk_frames(preset, case.chunks) / preset.fps, 2),
            "chunks": case.chunks,
            "tokens": 2 * case.chunks * preset.chunk_tokens,
            "samples": self.ranks if case.mode == NONE else 1,
        }

    def measure(self) -> None:
        """Time every mode at every length, shortest first."""
        wanted = [self.case(mode, seconds) for seconds in sorted(self.options.seconds) for mode in self.options.modes]
        while wanted:
            wanted = wanted[len(self.together(wanted)) :]

    def together(self, cases: Sequence[Case]) -> list[Row]:
        """Rows of the first cases, in one start of the ranks: all of them, or those up to the first that fails."""
        rows: list[Row] = []
        if self.left < 5:
            for case in cases:
                self.keep(rows, {**self.head(case), "failed": "no time left"}, case)
            return rows
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            job = Job(self.options, tuple(cases), self.deadline)
            (folder / "job.json").write_text(json.dumps(asdict(job), default=str), encoding="utf-8")

            def collect() -> None:
                while len(rows) < len(cases) and (row := self.row_of(folder, len(rows), cases[len(rows)])):
                    self.keep(rows, row, cases[len(rows)])

            words = ["-m", "longtake.training.parallel.bench.worker", name]
            failure = run_ranks(words, self.ranks, folder, self.deadline, collect)
            collect()
        if len(rows) < len(cases):
            case = cases[len(rows)]
            self.keep(rows, {**self.head(case), "failed": failure or "a rank left no result"}, case)
        return rows

    def keep(self, rows: list[Row], row: Row, case: Case) -> None:
        rows.append(row)
        if not case.rehearsed:
            self.cases.append(row)
        self.save(self.cases, self.longest)
        what = row.get("failed") or f"{row['s_per_iteration']:.2f} s/iteration, {row['peak_gb']:.1f} GB"
        how = f"{case.mode} at {row['seconds']:.0f} s{', rehearsed' * case.rehearsed}"
        logger.info("%s: %s (%.0f s left)", how, what, self.left)

    def row_of(self, folder: Path, number: int, case: Case) -> Row | None:
        """A case's row once all ranks left their files."""
        paths = [folder / f"{number}-{rank}.json" for rank in range(self.ranks)]
        if not all(path.is_file() for path in paths):
            return None
        found = [json.loads(path.read_text()) for path in paths]
        head, slowest = self.head(case), max(one["iteration_s"] for one in found)
        return {
            **head,
            "iterations": found[0]["iterations"],
            "s_per_iteration": slowest,
            "s_per_sample": slowest / head["samples"],
            "peak_gb": max(one["peak_gb"] for one in found),
            "ranks": found,
        }

    def find_longest(self, most: float) -> None:
        """By each mode the longest clip up to `most` seconds that runs, in steps of 8 s; the first trial is what peaks at
        two lengths promise."""
        modes = self.options.modes
        self.longest = {mode: known_of(mode, self.cases, self.options.on) for mode in modes}
        for _ in range(ROUNDS):
            trials = {mode: trial for mode in modes if (trial := next_trial(self.longest[mode], most)) is not None}
            wanted = [self.case(mode, seconds, rehearsed=True) for mode, seconds in trials.items()]
            while wanted and self.left > START_S / 2:
                rows = self.together(wanted)
                for row in rows:
                    note_trial(self.longest[row["mode"]], row)
                wanted = wanted[len(rows) :]
        self.save(self.cases, self.longest)


def known_of(mode: str, cases: Sequence[Row], device: str) -> Row:
    """What the timed cases tell of the longest clip of a mode."""
    done = [row for row in cases if row["mode"] == mode and "failed" not in row]
    failed = [r["seconds"] for r in cases if r["mode"] == mode and "memory" in r.get("failed", "")]
    guess = None
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
        guess = longest_fitting([(row["seconds"], 1e9 * row["peak_gb"]) for row in done], memory)
    return {
        "fits_s": max((row["seconds"] for row in done), default=0.0),
        "fails_s": min(failed, default=None),
        "why": "out of memory" if failed else None,
        "estimated_s": None if guess is None or math.isinf(guess) else round(guess, 1),
    }


def longest_fitting(points: list[tuple[float, float]], memory: float) -> float | None:
    """Seconds of clip at which the peak would reach `memory` bytes, of (seconds, peak bytes): it grows linearly.

    None where fewer than two lengths are known.
    """
    points = sorted(set(points))
    if len(points) < 2 or points[0][0] == points[-1][0]:
        return None
    (first, low), (last, high) = points[0], points[-1]
    if high <= low:
        return math.inf
    return last + (memory - KEPT_FREE - high) * (last - first) / (high - low)


def next_trial(known: Row, most: float) -> float | None:
    """Seconds to try next, None where the answer is known to a step."""
    low, high, guess = known["fits_s"], known["fails_s"] or math.inf, known["estimated_s"]
    steps = [s for s in range(STEP_S, int(most) + 1, STEP_S) if low + STEP_S / 2 < s < high - STEP_S / 2]
    if not steps or (known["why"] and "memory" not in known["why"]):
        return None
    promised = [s for s in steps if guess is not None and s <= guess]
    return float(promised[-1] if promised else steps[0])


def note_trial(known: Row, row: Row) -> None:
    """Enter what a trial showed."""
    if "failed" not in row:
        known["fits_s"] = max(known["fits_s"], row["seconds"])
    elif "time" not in row["failed"]:
        known["fails_s"], known["why"] = row["seconds"], row["failed"]
