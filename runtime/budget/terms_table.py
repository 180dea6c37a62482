"""Memory as a promise: what a recipe takes on the GPU, term by term, known before anything is allocated.

GB are 10^9 bytes, as the driver's figures are reported. A term says how it is known: "exact" follows from shapes that
the engine spec, the exported networks or the built segments fix; "measured" was written down by an earlier run on this
very folder of engines; "estimated" is a rule of thumb for what only a built or loaded engine tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from longtake.errors import LongtakeError

Known = Literal["exact", "measured", "estimated"]
Place = Literal["generate", "decode"]  # the GPU that generates; the one that decodes, which may be another

# What a process takes on a GPU before it allocates anything: context, torch's and cuBLAS's modules. 0.62 GB as the
# driver counts it (NVML, one H100, driver 580, torch 2.11 with CUDA 13).
CUDA_CONTEXT_BYTES = 620_000_000
# What comes on top once plans and libraries are at work: their kernels' code, cuDNN's and cuBLASLt's handles and
# workspaces, CUDA graphs, and the ends of torch's blocks.
KERNEL_BYTES = 330_000_000


@dataclass(frozen=True)
class Term:
    """One line of the budget. place: which GPU it is on."""

    name: str
    bytes: int
    known: Known
    place: Place = "generate"


@dataclass(frozen=True)
class Budget:
    """What `recipe` takes. `apart`: what is taken at other times than the rest (the text encoder, the VAE encoder)."""

    recipe: str
    terms: tuple[Term, ...]
    apart: tuple[Term, ...] = ()
    one_gpu: bool = True

    def total(self, place: Place | None = None) -> int:
        """Bytes of all terms, or of those on one of two GPUs."""
        return sum(term.bytes for term in self.terms if place in (None, term.place))

    @property
    def peak(self) -> dict[Place, int]:
        """Bytes a GPU must have: everything that is there at once, on each GPU that is used."""
        apart = max((term.bytes for term in self.apart), default=0)
        first = self.total() if self.one_gpu else self.total("generate")
        # What comes apart is over before the caches are allocated, or runs between chunks: it counts on top.
        peak: dict[Place, int] = {"generate": first + apart}
        return peak if self.one_gpu else {**peak, "decode": self.total("decode")}

    def as_json(self) -> dict[str, Any]:
        """For reports: {"total_gb", "terms": [...], "apart": [...]}."""
        return {
            "total_gb": gigabytes(self.total()),
            "terms": [{**asdict(term), "gb": gigabytes(term.bytes)} for term in self.terms],
            "apart": [{**asdict(term), "gb": gigabytes(term.bytes)} for term in self.apart],
        }

    def against(self, measured: Mapping[str, int]) -> list[dict[str, Any]]:
        """Term by term beside measured bytes by term name; "total" may be among them. off_by is measured / budget - 1."""
        budgeted = {term.name: term.bytes for term in self.terms} | {"total": self.total()}
        return [
            {"term": name, "gb": gigabytes(budgeted[name]), "measured_gb": gigabytes(found),
             "off_by": round(found / budgeted[name] - 1, 4) if budgeted[name] else None}
            for name, found in measured.items() if name in budgeted
        ]  # fmt: skip


def gigabytes(size: int) -> float:
    """GB of 10^9 bytes, to the megabyte."""
    return round(size / 1e9, 3)


def budget_table(budget: Budget) -> str:
    """The budget as a table for people."""
    rows = [(term.name, term.bytes, term.known + ("" if budget.one_gpu else f", {term.place} GPU"))
            for term in budget.terms]  # fmt: skip
    lines = [f"memory on the GPU, {budget.recipe}:"]
    lines += [f"  {name:34} {size / 1e9:8.3f} GB  {known}" for name, size, known in rows]
    if budget.one_gpu:
        lines.append(f"  {'all of it':34} {budget.total() / 1e9:8.3f} GB")
    else:
        for place in ("generate", "decode"):
            lines.append(f"  {f'all of it on the GPU to {place}':34} {budget.total(place) / 1e9:8.3f} GB")  # type: ignore[arg-type]
    lines += [f"  apart: {term.name:27} {term.bytes / 1e9:8.3f} GB  {term.known}" for term in budget.apart]
    return "\n".join(lines)


def require_fits(budget: Budget, free: Mapping[Place, tuple[str, int]], fixes: list[str]) -> None:
    """Raise LongtakeError with the figures if a GPU has less memory free than the budget says.

    Args:
        free: name of each GPU used and its free bytes.
        fixes: what would help, the best first.
    """
    for place, needed in budget.peak.items():
        name, available = free[place]
        if needed <= available:
            continue
        own = [term for term in budget.terms if budget.one_gpu or term.place == place]
        largest = sorted(own, key=lambda term: -term.bytes)[:4]
        parts = ", ".join(f"{term.name} {term.bytes / 1e9:.2f}" for term in largest)
        raise LongtakeError(
            f"recipe {budget.recipe} does not fit the memory of {name}",
            got=f"{available / 1e9:.2f} GB free",
            expected=f"{needed / 1e9:.2f} GB: {parts} GB and smaller ones (longtake budget shows all)",
            fix="; or ".join([*fixes, "close what else uses this GPU"]),
        )
