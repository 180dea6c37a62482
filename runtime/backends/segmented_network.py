"""Segmented execution: engine segments, the plugins' kernels launched between them, all on one stream.

Weights are engine inputs, read straight from the exported ONNX file; 4-bit ones stay 4-bit on the device and are
unpacked into one reused scratch just before the segment that needs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from longtake.engines.build import segment_spec
from longtake.engines.onnx_file import weights_from_onnx
from longtake.engines.segmented_graph import SegmentedGraph, Step, TensorType
from longtake.plugins.kernels import dims_from_shapes
from longtake.plugins.launch import Launcher
from longtake.plugins.spec import OPS
from longtake.runtime.backends.trt_engine import TORCH_DTYPES, EngineHost, Scratch, TrtContext

ALIGNMENT = 256  # bytes, what TensorRT asks of a binding's address


def storage_bytes(kind: TensorType) -> int:
    """Bytes of a tensor, rounded up to ALIGNMENT."""
    size = prod(int(n) for n in kind.shape) * TORCH_DTYPES[kind.dtype].itemsize
    return -(-max(size, 1) // ALIGNMENT) * ALIGNMENT


def arena_layout(graph: SegmentedGraph, given: set[str]) -> tuple[dict[str, int], int]:
    """Byte offsets of all tensors made on the way, and the arena's size; memory is reused after the last reader.

    Tensors in `given` (inputs, outputs, weights) and outputs written over an input need no place.
    """
    last = {name: i for i, step in enumerate(graph.steps) for name in (*step.inputs, *step.outputs)}
    free: list[tuple[int, int]] = []  # (offset, size), exact sizes: layers repeat, so they fit again
    offsets: dict[str, int] = {}
    end = 0
    for i, step in enumerate(graph.steps):
        for name in step.outputs:
            if name in given or name in aliases_of(step):
                continue
            size = storage_bytes(graph.tensors[name])
            fitting = next((entry for entry in free if entry[1] == size), None)
            if fitting is None:
                offsets[name], end = end, end + size
            else:
                free.remove(fitting)
                offsets[name] = fitting[0]
        for name in dict.fromkeys((*step.inputs, *step.outputs)):
            if last[name] == i and name in offsets:
                free.append((offsets[name], storage_bytes(graph.tensors[name])))
    return offsets, end


def aliases_of(step: Step) -> dict[str, str]:
    """Outputs of a step that are written over one of its inputs."""
    if step.kind == "segment":
        return {}
    return {step.outputs[out]: step.inputs[source] for out, source in OPS[step.name].aliases}


class SegmentedNetwork:
    """One cut network on the device. `run` takes the whole network's inputs and outputs by name."""

    def __init__(self, host: EngineHost, graph: SegmentedGraph, scratch: Scratch, contexts_per_step: bool = False):
        self.graph, self.device, self.scratch = graph, host.device, scratch
        self.contexts_per_step = contexts_per_step
        self.engines = {s.name: host.load(s.name, segment_spec(s)) for s in graph.segments}
        for engine in self.engines.values():
            scratch.reserve(engine.scratch_bytes)
        self._contexts: dict[tuple[str, int], TrtContext] = {}
        self._fixed: dict[str, Tensor] = {}
        self._compiled: dict[tuple[str, tuple[tuple[str, int], ...]], Launcher] = {}

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Upload the weights, one at a time."""
        for name, tensor in tensors:
            self._fixed[name] = tensor.to(self.device)

    def load_weights_from(self, onnx_path: Path) -> None:
        """Upload the weights straight from the exported file."""
        self.load_weights(weights_from_onnx(onnx_path, set(self.graph.weights)))

    def prepare(self) -> None:
        """Allocate the arena and create the contexts (TensorRT-RTX compiles kernels here); keep those for next time."""
        given = {*self.graph.inputs, *self.graph.outputs, *self.graph.weights}
        offsets, size = arena_layout(self.graph, given)
        arena = torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)
        for name, offset in offsets.items():
            kind = self.graph.tensors[name]
            piece = arena[offset : offset + prod(map(int, kind.shape)) * TORCH_DTYPES[kind.dtype].itemsize]
            self._fixed[name] = piece.view(TORCH_DTYPES[kind.dtype]).view(tuple(map(int, kind.shape)))
        for i, step in enumerate(self.graph.steps):
            key = (step.name, i if self.contexts_per_step else 0)
            if step.kind == "segment" and key not in self._contexts:
                self._contexts[key] = self.engines[step.name].context(self.scratch)
        for engine in self.engines.values():
            engine.keep_compiled_kernels()
        self._launchers = {i: self._launcher(step) for i, step in enumerate(self.graph.steps) if step.kind != "segment"}
        size = max((launcher.workspace_bytes for launcher in self._launchers.values()), default=0)
        self._workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)

    def _launcher(self, step: Step) -> Launcher:
        """The op's kernels, compiled and loaded for this step's shapes; a table's length is told at each launch."""
        shapes = [[n if isinstance(n, int) else 1 for n in self.graph.tensors[name].shape] for name in step.inputs]
        dims = dims_from_shapes(OPS[step.name], shapes)
        fixed = tuple(sorted((letter, size) for letter, size in dims.items() if letter != "W"))
        if (step.name, fixed) not in self._compiled:
            self._compiled[step.name, fixed] = Launcher(step.name, dict(fixed), "bf16").prepare()
        return self._compiled[step.name, fixed]

    def run(self, tensors: Mapping[str, Tensor], write: bool = True) -> None:
        """Enqueue every step on torch's current stream.

        Args:
            tensors: the network's inputs and outputs; an aliased output is the tensor of its input.
            write: False leaves out the ops that write in place (a pass whose write slot is -1 does not need them).
        """
        values = self.values_for(tensors)
        for i, step in enumerate(self.graph.steps):
            self.run_step(i, step, values, write)

    def run_step(self, index: int, step: Step, values: dict[str, Tensor], write: bool = True) -> None:
        """Enqueue one step; `values` holds every tensor by name and gains this step's aliased outputs."""
        if step.kind == "segment":
            segment = self.graph.segment(step.name)
            names = zip((*segment.inputs, *segment.outputs), (*step.inputs, *step.outputs), strict=True)
            context = self._contexts[step.name, index if self.contexts_per_step else 0]
            context.run({binding: values[name] for binding, name in names})
            return
        aliases = aliases_of(step)
        values |= {output: values[source] for output, source in aliases.items()}
        if write or not aliases:
            self._launch(index, step, values)

    def values_for(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor by name before the first step, for callers that run step by step (the profiler)."""
        return {**self._fixed, **tensors}

    def _launch(self, index: int, step: Step, values: Mapping[str, Tensor]) -> None:
        pointers = [values[name].data_ptr() for name in (*step.inputs, *step.outputs)]
        inputs = zip(OPS[step.name].inputs, step.inputs, strict=True)
        table_length = next((values[name].numel() for spec, name in inputs if spec.shape == ("W",)), 0)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self._launchers[index].launch(pointers, stream, self._workspace.data_ptr(), table_length)
