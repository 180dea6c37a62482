"""Memory as a promise: what a recipe takes on the GPU, term by term, known before anything is allocated.

GB are 10^9 bytes, as the driver's figures are reported. A term says how it is known: "exact" follows from shapes that
the engine spec, the exported networks or the built segments fix; "measured" was written down by an earlier run on this
very folder of engines; "estimated" is a rule of thumb for what only a built or loaded engine tells.

`RecordedTerm`s are what a bundle records of it: from them the budget of every use is added up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

Known = Literal["exact", "measured", "estimated"]
Place = Literal["generate", "decode"]  # the GPU that generates; the one that decodes, which may be another
# When a recorded term counts: always; once more under guidance; to decode, on the GPU that decodes; apart from the rest, at
# a new prompt or before a start from a picture or clip.
When = Literal["always", "guided", "decode", "prompt", "encode"]

# What a process takes on a GPU before it allocates anything: context, torch's and cuBLAS's modules. 0.62 GB as the
# driver counts it (NVML, one H100, driver 580, torch 2.11 with CUDA 13).
CUDA_CONTEXT_BYTES = 620_000_000
# What comes on top once plans and libraries are at work: their kernels' code, cuDNN's and cuBLASLt's handles and
# workspaces, CUDA graphs, and the ends of torch's blocks.
KERNEL_BYTES = 330_000_000

# Beside the plans: arena bytes by lane, and TWICE, written by a run that loaded them.
MEASURED = "memory.json"
PLAIN = ("text_encoder", "context", "camera", "dit")  # what runs on the generating GPU, one after another: one arena
DECODER = ("vae_first", "vae_steady")
LANES = {"denoise": PLAIN, "decode": DECODER}
WORKING = {"denoise": "DiT working memory", "decode": "VAE working memory"}
DECODER_CACHES, TWICE = "VAE caches", "caches twice"
KEPT_WINDOWS = "kept windows"


@dataclass(frozen=True)
class Term:
    """One line of the budget. place: which GPU it is on."""

    name: str
    bytes: int
    known: Known
    place: Place = "generate"


@dataclass(frozen=True)
class RecordedTerm:
    """Bytes, and when they count. Under guidance they are added to the term of the same name."""

    name: str
    bytes: int
    known: Known
    when: When = "always"


@dataclass(frozen=True)
class Use:
    """How a recipe will be used. guided: a second cache, for the negative prompt. decode_apart: on another GPU.

    engines: folder of plans, or None. recorded: the terms that their bundle records; () to work them out. kept_windows: how
    many layers keep their attention's window between passes. ranks: GPUs that share it; it is then the first one's, which
    takes the most.
    """

    guided: bool = False
    decode: bool = True
    decode_apart: bool = False
    encode: bool = False
    engines: Path | None = None
    recorded: tuple[RecordedTerm, ...] = ()
    kept_windows: int = 0
    ranks: int = 1


@dataclass(frozen=True)
class Budget:
    """What `recipe` takes. `apart`: what is taken at other times than the rest (the text encoder, the VAE encoder). ranks: GPUs
    that share it, of the first of which this is."""

    recipe: str
    terms: tuple[Term, ...]
    apart: tuple[Term, ...] = ()
    one_gpu: bool = True
    ranks: int = 1

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


def gigabytes(size: int) -> float:
    """GB of 10^9 bytes, to the megabyte."""
    return round(size / 1e9, 3)


def added_up(recipe: str, terms: Iterable[RecordedTerm], use: Use, measured: Mapping[str, int]) -> Budget:
    """The budget of a use. measured: arena bytes by lane ("denoise", "decode") and TWICE, of an earlier run, or {}."""
    by_time: dict[When, list[RecordedTerm]] = {}
    for term in terms:
        by_time.setdefault(term.when, []).append(_refined(term, measured))
    more = {term.name: term.bytes for term in by_time.get("guided", ()) if use.guided}
    place: Place = "decode" if use.decode_apart else "generate"
    own = [Term("CUDA context", CUDA_CONTEXT_BYTES, "estimated"), Term("kernels, libraries", KERNEL_BYTES, "estimated")]
    own += [Term(term.name, term.bytes + more.get(term.name, 0), term.known) for term in by_time.get("always", ())]
    own += [Term(term.name, term.bytes, term.known, place) for term in by_time.get("decode", ()) if use.decode]
    if use.decode_apart:
        own.append(Term("CUDA context (decode)", CUDA_CONTEXT_BYTES, "estimated", "decode"))
    apart = [*by_time.get("prompt", ()), *(by_time.get("encode", ()) if use.encode else ())]
    return Budget(
        recipe, tuple(own), tuple(Term(t.name, t.bytes, t.known) for t in apart), not use.decode_apart, use.ranks
    )


def _refined(term: RecordedTerm, measured: Mapping[str, int]) -> RecordedTerm:
    """A term as an earlier run of the same engines wrote it down: what their arenas take, and which caches it kept twice.

    Our op writes the VAE's caches in place, which makes them exact. TensorRT's plans do where they pass their proof, which
    only a run can tell (see vae_stream.py).
    """
    for lane, name in WORKING.items():
        if term.name == name and lane in measured:
            return replace(term, bytes=measured[lane], known="measured")
    if term.name == DECODER_CACHES and term.known == "estimated" and measured:
        return replace(term, bytes=term.bytes + measured.get(TWICE, 0), known="measured")
    return term


def budget_table(budget: Budget) -> str:
    """The budget as a table for people."""
    rows = [
        (term.name, term.bytes, term.known + ("" if budget.one_gpu else f", {term.place} GPU")) for term in budget.terms
    ]
    where = (
        "the GPU" if budget.ranks == 1 else f"the first of {budget.ranks} GPUs that share a video, which takes the most"
    )
    lines = [f"memory on {where}, {budget.recipe}:"]
    lines += [f"  {name:34} {size / 1e9:8.3f} GB  {known}" for name, size, known in rows]
    if budget.one_gpu:
        lines.append(f"  {'all of it':34} {budget.total() / 1e9:8.3f} GB")
    else:
        for place in budget.peak:
            lines.append(f"  {f'all of it on the GPU to {place}':34} {budget.total(place) / 1e9:8.3f} GB")
    lines += [f"  apart: {term.name:27} {term.bytes / 1e9:8.3f} GB  {term.known}" for term in budget.apart]
    return "\n".join(lines)
