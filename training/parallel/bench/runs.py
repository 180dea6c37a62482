"""Which cases `training.parallel.bench` runs and how long each may take; results are collected while ranks run.

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

from longtake.files import write_json
from longtake.training.models.presets import Preset
from longtake.training.parallel.bench.cost import iteration_seconds, longest_fitting
from longtake.training.parallel.bench.worker import Case
from longtake.training.parallel.halo import evened, halo_needed
from longtake.training.parallel.launch import run_ranks
from longtake.training.parallel.layout import NONE

logger = logging.getLogger(__name__)

Row = dict[str, Any]
STEP_S = 8  # of the search for the longest clip
ROUNDS = 3  # trials a mode in that search
START_S = 25  # processes, weights and the first kernels
REHEARSAL = 0.25  # of an iteration's time, about
TIMED = 0.85  # of the time left is planned for


@dataclass(frozen=True)
class Plan:
    """What all cases have in common. rehearse_oom: a mode whose last rank is to run out of memory, to try that out."""

    preset: Preset
    ranks: int
    halo: str
    attention: str
    bf16: bool
    vae: bool
    rehearse_oom: str = ""

    def chunks(self, seconds: float) -> int:
        """Chunks of a clip of about `seconds`, a multiple of the ranks."""
        chunk = self.preset.chunk_latents * self.preset.vae.stride[0] / self.preset.fps
        return max(1, round(seconds / chunk / self.ranks)) * self.ranks

    def seconds(self, chunks: int) -> float:
        """Length of a clip of `chunks` chunks."""
        frames = 1 + self.preset.vae.stride[0] * (self.preset.chunk_latents * chunks - 1)
        return round(frames / self.preset.fps, 2)

    def case(self, mode: str, seconds: float, **more: Any) -> Case:
        oom = self.ranks - 1 if mode == self.rehearse_oom else None
        return Case(mode, self.chunks(seconds), vae=self.vae, halo=self.halo, attention=self.attention, bf16=self.bf16,
                    fails_on=oom, **more)  # fmt: skip

    def head(self, case: Case) -> Row:
        """What is known of a case beforehand."""
        return {
            "mode": case.mode,
            "seconds": self.seconds(case.chunks),
            "chunks": case.chunks,
            "tokens": 2 * case.chunks * self.preset.chunk_tokens,
            "samples": self.ranks if case.mode == NONE else 1,
        }

    def expected(self, case: Case) -> float:
        """Seconds of an iteration on H100s; elsewhere only good for comparing cases."""
        latents = case.chunks * self.preset.chunk_latents
        if case.mode == "balanced":
            bounds = evened(latents, self.ranks, halo_needed(self.preset.vae))
            latents = min(latents, bounds[0][1] - bounds[0][0])
        sharing = 1 if case.mode == NONE else self.ranks
        return iteration_seconds(self.preset, case.chunks, sharing, latents * case.vae)


@dataclass
class Runs:
    """Runs cases until `deadline` (of time.monotonic()). words: the worker's command line; save: told of all results."""

    plan: Plan
    words: list[str]
    deadline: float
    save: Callable[[list[Row], dict[str, Row]], None]
    cases: list[Row] = field(default_factory=list)
    longest: dict[str, Row] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def measure(self, lengths: Sequence[float], modes: Sequence[str], iterations: int, warmup: int) -> None:
        """Time every mode at every length, shortest first."""
        wanted = [
            self.plan.case(mode, seconds, iterations=iterations, warmup=warmup)
            for seconds in sorted(lengths)
            for mode in modes
        ]
        weights = [(iterations + REHEARSAL) * self.plan.expected(case) for case in wanted]
        while wanted:
            share = max(1.0, self.left * TIMED - START_S) / sum(weights)
            given = [Case(**{**asdict(c), "allowed_s": share * w}) for c, w in zip(wanted, weights)]
            rows = self.together(given)
            wanted, weights = wanted[len(rows) :], weights[len(rows) :]

    def together(self, cases: list[Case]) -> list[Row]:
        """Rows of the first cases, in one start of the ranks: all of them, or those up to the first that fails."""
        rows: list[Row] = []
        if self.left < 5:
            rows = [{**self.plan.head(case), "failed": "no time left"} for case in cases]
            self.cases += [row for row, case in zip(rows, cases) if not case.rehearsed]
            self.save(self.cases, self.longest)
            return rows
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_json(folder / "cases.json", [asdict(case) for case in cases])

            def collect() -> float:
                while len(rows) < len(cases) and (row := self.row_of(folder, len(rows), cases[len(rows)])):
                    self.keep(rows, row, cases[len(rows)])
                return 0.0

            failure = run_ranks([*self.words, "--record", name], self.plan.ranks, folder, self.deadline, collect)
            collect()
        if len(rows) < len(cases):
            case = cases[len(rows)]
            self.keep(rows, {**self.plan.head(case), "failed": failure or "a rank left no result"}, case)
        return rows

    def keep(self, rows: list[Row], row: Row, case: Case) -> None:
        rows.append(row)
        if not case.rehearsed:
            self.cases.append(row)
            self.save(self.cases, self.longest)
        what = row.get("failed") or f"{row['s_per_iteration']:.2f} s/iteration, {row['peak_gb']:.1f} GB"
        logger.info("%s at %.0f s%s: %s (%.0f s left)", case.mode, row["seconds"],
                    ", rehearsed" * case.rehearsed, what, self.left)  # fmt: skip

    def row_of(self, folder: Path, number: int, case: Case) -> Row | None:
        """A case's row once all ranks left their files."""
        paths = [folder / f"{number}-{rank}.json" for rank in range(self.plan.ranks)]
        if not all(path.is_file() for path in paths):
            return None
        found = [json.loads(path.read_text()) for path in paths]
        head, slowest = self.plan.head(case), max(one["iteration_s"] for one in found)
        return {
            **head,
            "iterations": found[0]["iterations"],
            "s_per_iteration": slowest,
            "s_per_sample": slowest / head["samples"],
            "peak_gb": max(one["peak_gb"] for one in found),
            "took_s": max(one["took_s"] for one in found),
            "expected_s": round(self.plan.expected(case), 3),
            "ranks": found,
        }

    def find_longest(self, modes: Sequence[str], most: float, memory: float) -> None:
        """By each mode the longest clip up to `most` seconds that runs, in steps of 8 s.

        memory: bytes of a GPU, 0 where that isn't known; the first trial is what peaks at two lengths promise.
        """
        for mode in modes:
            done = [row for row in self.cases if row["mode"] == mode and "failed" not in row]
            failed = min((r["seconds"] for r in self.cases if r["mode"] == mode and "memory" in r.get("failed", "")),
                         default=None)  # fmt: skip
            fits = max((row["seconds"] for row in done), default=0.0)
            points = [(row["seconds"], 1e9 * row["peak_gb"]) for row in done]
            guess = longest_fitting(points, memory) if memory else None
            self.longest[mode] = {
                "fits_s": fits, "fails_s": failed, "why": "out of memory" if failed else None,
                "estimated_s": None if guess is None or math.isinf(guess) else round(guess, 1),
            }  # fmt: skip
        self.save(self.cases, self.longest)
        for _ in range(ROUNDS):
            trials = {mode: trial for mode in modes if (trial := next_trial(self.longest[mode], most)) is not None}
            wanted = [self.plan.case(mode, seconds, rehearsed=True) for mode, seconds in trials.items()]
            while wanted and self.left > START_S / 2:
                rows = self.together(wanted)
                for row in rows:
                    note_trial(self.longest[row["mode"]], row)
                wanted = wanted[len(rows) :]
                self.save(self.cases, self.longest)


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
