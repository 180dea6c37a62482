"""Chunks of video by two backends, from the same restored session and seed, and the structural similarity of frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from longtake.accuracy.compare import difference
from longtake.accuracy.ssim import ssim
from longtake.errors import GateError
from longtake.formats.recipe import Gate, Recipe
from longtake.runtime.generator import Generator, Script


@dataclass(frozen=True)
class ChunkRow:
    """One chunk of video by two backends from the same state: mean and worst SSIM of its frames."""

    chunk: int
    ssim: float
    worst_frame: float
    latent_error: float
    gate: float

    @property
    def passed(self) -> bool:
        return self.ssim >= self.gate

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def check_chunks(
    candidate: Generator,
    reference: Generator,
    script: Script,
    gate: Gate,
    chunks: int | None,
    seed: int = 0,
    **options: Any,
) -> Iterator[ChunkRow]:
    """Generate `chunks` chunks (None: the whole script) with `reference`; from each one's start, also with `candidate`.

    `options` go to `Generator.session` (steps, guidance).
    """
    with (
        reference.session(script, seed, chunks=chunks, **options) as theirs,
        candidate.session(script, seed, chunks=chunks, **options) as ours,
    ):
        while theirs.remaining:
            ours.restore(theirs.snapshot())
            wanted, got = next(theirs), next(ours)
            similarity = ssim(wanted.frames, got.frames)
            error, _ = difference(wanted.latents.cpu(), got.latents.cpu())
            yield ChunkRow(wanted.index, float(similarity.mean()), float(similarity.min()), error, gate.ssim)


def require_chunks(chunks: Sequence[ChunkRow], recipe: Recipe) -> None:
    """Raise GateError naming the worst chunk if any fails."""
    failed = [row for row in chunks if not row.passed]
    if failed:
        low = min(failed, key=lambda row: row.ssim)
        raise GateError(
            f"recipe {recipe.name}: {len(failed)} of {len(chunks)} chunks fail the accuracy gate",
            got=f"chunk {low.chunk}: SSIM {low.ssim:.4f}",
            expected=f"at least {low.gate:g}",
            fix="compare the networks layer by layer: longtake check --layers",
        )


def chunk_table(chunks: Sequence[ChunkRow], names: tuple[str, str]) -> list[str]:
    """One line a chunk."""
    lines = [f"{names[0]} against {names[1]}, each chunk from the same restored session:"]
    lines.append(f"{'chunk':>5} {'SSIM':>8} {'worst':>8} {'latents':>9} {'gate':>6}")
    for row in chunks:
        verdict = "ok" if row.passed else "FAIL"
        lines.append(
            f"{row.chunk:5} {row.ssim:8.4f} {row.worst_frame:8.4f} {row.latent_error:9.2e} {row.gate:6g} {verdict}"
        )
    return lines
