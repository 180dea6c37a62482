"""Segmented execution: engine segments, the plugins' kernels launched between them, all on one stream.

Weights are engine inputs, from a WeightSource (the exported ONNX file, by default); 4-bit ones stay 4-bit on the
device and are unpacked just before the segment that needs them, into memory that is free again right after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from longtake.engines.build import segment_spec
from longtake.engines.onnx_file import WeightSource, weights_from_onnx
from longtake.engines.segmented_graph import SegmentedGraph, Step, TensorType
from longtake.plugins.kernels import dims_from_shapes
from longtake.plugins.launch import Launcher, OpLauncher
from longtake.plugins.linear.library import linear_launcher
from longtake.plugins.sink_attention.library import attention_launcher
from longtake.plugins.spec import LIBRARY_OPS, OPS
from longtake.runtime.backends.trt_engine import TORCH_DTYPES, EngineHost, Scratch, TrtContext
from longtake.runtime.errors import LongtakeError

ALIGNMENT = 256  # bytes, what TensorRT asks of a binding's address


def storage_bytes(kind: TensorType) -> int:
    """Bytes of a tensor, rounded up to ALIGNMENT."""
    size = prod(int(n) for n in kind.shape) * TORCH_DTYPES[kind.dtype].itemsize
    return -(-max(size, 1) // ALIGNMENT) * ALIGNMENT


def arena_layout(graph: SegmentedGraph, given: set[str]) -> tuple[dict[str, int], int]:
    """Byte offsets of all tensors made on the way, and the arena's size; memory is reused after the last reader.

    Tensors in `given` (inputs, outputs, weights) and outputs written over an input need no place; a view has the place
    of what it shows, which is kept until both have been read.
    """
    shown = {step.outputs[0]: step.inputs[0] for step in graph.steps if step.kind == "view"}
    last = {shown.get(name, name): i for i, step in enumerate(graph.steps) for name in (*step.inputs, *step.outputs)}
    offsets: dict[str, int] = {}
    space = FreeSpace()
    for i, step in enumerate(graph.steps):
        for name in step.outputs:
            if name not in given and name not in aliases_of(step):
                offsets[name] = space.take(storage_bytes(graph.tensors[name]))
        for name in dict.fromkeys(shown.get(name, name) for name in (*step.inputs, *step.outputs)):
            if last[name] == i and name in offsets:
                space.give_back(offsets[name], storage_bytes(graph.tensors[name]))
    return offsets | {view: offsets[source] for view, source in shown.items() if source in offsets}, space.end


class FreeSpace:
    """Which bytes of an arena are free: the tightest gap that fits is taken, neighbouring gaps become one."""

    def __init__(self) -> None:
        self.end = 0  # bytes the arena needs
        self._gaps: list[tuple[int, int]] = []  # (first byte, one past the last), in order

    def take(self, size: int) -> int:
        """The offset of `size` bytes."""
        fitting = [gap for gap in self._gaps if gap[1] - gap[0] >= size]
        if not fitting:  # the end grows; a gap that ends there is used as well
            at_end = [gap for gap in self._gaps if gap[1] == self.end]
            start = at_end[0][0] if at_end else self.end
            self._gaps = [gap for gap in self._gaps if gap not in at_end]
            self.end = start + size
            return start
        start, stop = min(fitting, key=lambda gap: (gap[1] - gap[0], gap[0]))
        self._gaps.remove((start, stop))
        if stop > start + size:
            self._gaps = sorted([*self._gaps, (start + size, stop)])
        return start

    def give_back(self, offset: int, size: int) -> None:
        """Free what `take` returned."""
        joined: list[tuple[int, int]] = []
        for start, stop in sorted([*self._gaps, (offset, offset + size)]):
            if joined and joined[-1][1] == start:
                start = joined.pop()[0]
            joined.append((start, stop))
        self._gaps = joined


def aliases_of(step: Step) -> dict[str, str]:
    """Outputs of a step that are written over one of its inputs."""
    if step.kind == "segment":
        return {}
    if step.kind == "view":
        return {step.outputs[0]: step.inputs[0]}
    return {step.outputs[out]: step.inputs[source] for out, source in OPS[step.name].aliases}


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors are equal in dtype, shape and every bit (NaNs included)."""
    alike = a.dtype == b.dtype and a.shape == b.shape
    return alike and (a is b or torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)))


class SegmentedNetwork:
    """One cut network on the device. `run` takes the whole network's inputs and outputs by name.

    scratch: what a plan or an op needs while it runs; they take turns. arena: the tensors between steps, which nobody
    needs after `run`. Both may be shared by networks that run one after another.
    attention: what the recipe wants sink attention computed in, "bf16" or "fp8". shared: weights on the device by name,
    of networks that may have some in common (the two of a VAE decoder do); they are kept once.
    """

    def __init__(
        self,
        host: EngineHost,
        graph: SegmentedGraph,
        scratch: Scratch,
        contexts_per_step: bool = False,
        attention: str = "bf16",
        arena: Scratch | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> None:
        self.graph, self.device, self.scratch = graph, host.device, scratch
        self.contexts_per_step, self.attention = contexts_per_step, attention
        self.engines = {s.name: host.load(s.name, segment_spec(s)) for s in graph.segments}
        for engine in self.engines.values():
            scratch.reserve(engine.scratch_bytes)
        self.arena, self._shared = arena or Scratch(host.device), {} if shared is None else shared
        self._offsets, size = arena_layout(graph, {*graph.inputs, *graph.outputs, *graph.weights})
        self.arena.reserve(size)
        self._contexts: dict[tuple[str, int], TrtContext] = {}
        self._fixed: dict[str, Tensor] = {}
        self._compiled: dict[tuple[str, tuple[tuple[str, int], ...]], OpLauncher] = {}

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Upload the weights, one at a time."""
        for name, tensor in tensors:
            placed = tensor.to(self.device)
            kept = self._shared.setdefault(name, placed)
            self._fixed[name] = kept if same_bytes(kept, placed) else placed

    def load_weights_from(self, source: WeightSource | Path) -> None:
        """Upload the weights from a source, or straight from the exported file."""
        read = partial(weights_from_onnx, source) if isinstance(source, Path) else source
        wanted = set(self.graph.weights)
        self.load_weights(read(wanted))
        if missing := wanted - self._fixed.keys():
            raise LongtakeError(
                f"network {self.graph.network} lacks weights",
                got=sorted(missing)[:3],
                expected=f"{len(wanted)} weights",
            )

    def prepare(self) -> None:
        """Create the contexts (TensorRT-RTX compiles kernels here) and keep them for next time; place the arena.

        All networks that share scratch or arena must have been constructed: neither grows after this.
        """
        for i, step in enumerate(self.graph.steps):
            key = (step.name, i if self.contexts_per_step else 0)
            if step.kind == "segment" and key not in self._contexts:
                self._contexts[key] = self.engines[step.name].context(self.scratch)
        for engine in self.engines.values():
            engine.keep_compiled_kernels()
        ops = {i: step for i, step in enumerate(self.graph.steps) if step.kind in ("op", "unpack")}
        self._launchers = {i: self._launcher(step) for i, step in ops.items()}
        self.scratch.reserve(max((launcher.workspace_bytes for launcher in self._launchers.values()), default=0))
        for name, offset in self._offsets.items():
            kind = self.graph.tensors[name]
            size = prod(map(int, kind.shape)) * TORCH_DTYPES[kind.dtype].itemsize
            piece = self.arena.memory[offset : offset + size]
            self._fixed[name] = piece.view(TORCH_DTYPES[kind.dtype]).view(tuple(map(int, kind.shape)))

    def _launcher(self, step: Step) -> OpLauncher:
        """The op's kernels, compiled and loaded for this step's shapes; a table's length is told at each launch."""
        shapes = [[n if isinstance(n, int) else 1 for n in self.graph.tensors[name].shape] for name in step.inputs]
        dims = dims_from_shapes(OPS[step.name], shapes)
        fixed = tuple(sorted((letter, size) for letter, size in dims.items() if letter != "W"))
        if (step.name, fixed) not in self._compiled:
            if step.name.startswith("sink_attention"):
                made: OpLauncher = attention_launcher(step.name, dict(fixed), self.attention)
            elif step.name in LIBRARY_OPS:
                made = linear_launcher(step.name, dict(fixed))
            else:
                made = Launcher(step.name, dict(fixed), "bf16").prepare()
            self._compiled[step.name, fixed] = made
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
        if step.kind == "view":
            return  # it has its own place, or rather the one of what it shows, since `prepare`
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
        self._launchers[index].launch(pointers, stream, self.scratch.address, table_length)
