"""A segmented network's steps, executed plainly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longtake.formats.segmented_graph import SegmentedGraph

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
