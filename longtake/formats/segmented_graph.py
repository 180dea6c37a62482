"""A network cut at its custom ops: ordered steps over named tensors, as JSON beside the segment plans."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from longtake.record import Kind

KIND = Kind("a segmented network", "`longtake engines`", "build it again: longtake engines --recipe NAME")
StepKind = Literal["segment", "op", "unpack", "view", "exchange"]


@dataclass(frozen=True)
class TensorType:
    """dtype: "fp32", "fp16", "bf16", "int8", "int32", "int64", "bool", "fp8" or "fp4". A str dimension is dynamic."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Segment:
    """One distinct plan. Its tensors are called by position: `inputs` and `outputs` are the plan's binding names."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    types: dict[str, TensorType]


@dataclass(frozen=True)
class Step:
    """One thing to run, in order; `inputs` and `outputs` are tensors of the whole graph.

    segment: run plan `name`. op: launch custom op `name`. unpack: like op, but all inputs are weights, and the output
    is needed only by the segment or op that follows, so it may live in reused scratch. view: the output is the input in
    another shape, the same bytes. exchange: all ranks trade parts of the inputs (plugins/exchange.py);
    a halo is traded in place and has no output; "halo_2" has two ghost rows.
    """

    kind: StepKind
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class SegmentedGraph:
    """`weights` are constants of the ONNX file that segments and ops take as inputs, in the precision stored there."""

    network: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...]
    tensors: dict[str, TensorType]
    segments: tuple[Segment, ...]
    steps: tuple[Step, ...]

    def segment(self, name: str) -> Segment:
        return next(segment for segment in self.segments if segment.name == name)

    @classmethod
    def read(cls, path: Path) -> SegmentedGraph:
        """What `write` wrote. Raises IntegrityError if the file is no such graph."""
        return KIND.read(cls, path)

    def write(self, path: Path) -> None:
        """Write the graph as JSON, atomically."""
        KIND.write(self, path)


def segment_spec(segment: Segment) -> dict[str, Any]:
    """A segment's bindings in the form of NetworkSpec.as_json."""
    rows = {name: [name, kind.dtype, list(kind.shape)] for name, kind in segment.types.items()}
    return {
        "name": segment.name,
        "inputs": [rows[name] for name in segment.inputs],
        "outputs": [rows[name] for name in segment.outputs],
        "aliases": [],
        "carried": [],
        "profile": [],
    }
