"""A network cut at its custom ops: ordered steps over named tensors, as JSON beside the segment plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from longtake.errors import IntegrityError
from longtake.files import read_json, write_json

StepKind = Literal["segment", "op", "unpack", "view"]


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
    is needed only by the segment that follows, so it may live in reused scratch. view: the output is the input in
    another shape, the same bytes.
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


def save(graph: SegmentedGraph, path: Path) -> None:
    """Write the graph as JSON, atomically."""
    write_json(path, {"format": 1, **asdict(graph)})


def _types(given: dict[str, Any]) -> dict[str, TensorType]:
    return {name: TensorType(value["dtype"], tuple(value["shape"])) for name, value in given.items()}


def load(path: Path) -> SegmentedGraph:
    """Read what `save` wrote.

    Raises:
        IntegrityError: the file is not such a graph.
    """
    given = read_json(path)
    try:
        return SegmentedGraph(
            given["network"],
            tuple(given["inputs"]),
            tuple(given["outputs"]),
            tuple(given["weights"]),
            _types(given["tensors"]),
            tuple(
                Segment(s["name"], tuple(s["inputs"]), tuple(s["outputs"]), _types(s["types"]))
                for s in given["segments"]
            ),
            tuple(Step(s["kind"], s["name"], tuple(s["inputs"]), tuple(s["outputs"])) for s in given["steps"]),
        )
    except (KeyError, TypeError) as error:
        raise IntegrityError(
            f"{path} does not describe a segmented network", got=repr(error), fix="build the engines again"
        ) from None


RunStep = Callable[[str, Sequence[Any]], Sequence[Any]]


def run_steps(
    graph: SegmentedGraph, feeds: Mapping[str, Any], weights: Mapping[str, Any], segment: RunStep, op: RunStep
) -> dict[str, Any]:
    """Execute the steps with any tensors and runners: what every executor of this graph must compute."""
    values = {**weights, **feeds}
    for step in graph.steps:
        if step.kind == "view":
            values[step.outputs[0]] = values[step.inputs[0]].reshape(graph.tensors[step.outputs[0]].shape)
            continue
        run = segment if step.kind == "segment" else op
        values |= zip(step.outputs, run(step.name, [values[name] for name in step.inputs]), strict=True)
    return {name: values[name] for name in graph.outputs}


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
