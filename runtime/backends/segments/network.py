"""Segmented execution: engine segments, the plugins' kernels launched between them, all on one stream.

Weights are engine inputs, from a WeightSource (the exported ONNX file, by default); 4-bit ones stay 4-bit on the
device and are unpacked just before the segment or op that needs them, into memory that is free again right after it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from longtake.dtypes import DTYPES
from longtake.errors import LongtakeError
from longtake.formats.bundle import Bundle
from longtake.formats.onnx_file import WeightSource, weights_from_onnx
from longtake.formats.segmented_graph import SegmentedGraph, Step, segment_spec
from longtake.plugins.conv.reference import library_weight
from longtake.plugins.launch import Launcher, OpLauncher
from longtake.plugins.registry import op_named
from longtake.plugins.run import launcher_for
from longtake.plugins.shapes import dims_from_shapes
from longtake.plugins.sink_attention.hopper import HopperSinkAttention
from longtake.runtime.backends.segments.arena import aliases_of, aligned, step_scratch, storage_bytes
from longtake.runtime.backends.segments.exchanges import Exchanges, exchange_bytes
from longtake.runtime.backends.segments.planner import PlannedSteps, planned_steps
from longtake.runtime.backends.trt.engine import EngineHost, Scratch, TrtContext, TrtEngine


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and every bit (NaNs included), however they lie in memory."""
    alike = a.dtype == b.dtype and a.shape == b.shape
    return alike and (a is b or torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)))


class WeightBlock:
    """Memory for the weights of `graph` but those in `apart`, in one piece."""

    def __init__(self, graph: SegmentedGraph, device: torch.device, apart: Collection[str] = ()) -> None:
        self.device, self._used = device, 0
        self._expected = {name for name in graph.weights if name not in apart}
        kinds = [graph.tensors[name] for name in self._expected]
        size = sum(storage_bytes(kind) for kind in kinds if DTYPES[kind.dtype].torch_name)
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)

    def placed(self, name: str, tensor: Tensor, channels_last: bool = False) -> Tensor:
        """A copy of `tensor` in the next place; apart if the graph has none of that name.

        channels_last: [N,C,t,y,x] lies in memory as a library wants it, in shape as it was.
        """
        source = library_weight(tensor.to(self.device)) if channels_last else tensor
        start, self._used = self._used, self._used + aligned(source.nbytes)
        if name in self._expected and self._used <= self._memory.nbytes:
            made = self._memory[start : start + source.nbytes].view(source.dtype).view(source.shape)
        else:
            self._used = start
            made = torch.empty_like(source, device=self.device, memory_format=torch.contiguous_format)
        made.copy_(source)
        return made.permute(0, 4, 1, 2, 3) if channels_last else made


class SegmentedNetwork:
    """One cut network on the device. `run` takes the whole network's inputs and outputs by name.

    arena: the tensors between steps, and beside them what the plan or op that runs needs for itself; nobody needs any of
    it after `run`, so networks that run one after another may share it, and `scratch` of whole plans with it.
    attention: what the recipe wants sink attention computed in, "bf16" or "fp8". shared: weights on the device by name,
    of networks that may have some in common (the two of a VAE decoder do); they are kept once. engines: the segments'
    engines by name, where they are loaded already. bundle: what the plans must belong to. exchanges: of a network that is
    a rank's. kept_windows: how many layers' windows lie in memory of their own, where attention keeps them between passes;
    the caller then tells `window_version`, see HopperSinkAttention.launch_kept.
    """

    def __init__(
        self,
        host: EngineHost,
        graph: SegmentedGraph,
        arena: Scratch,
        contexts_per_step: bool = False,
        attention: str = "bf16",
        shared: dict[str, Tensor] | None = None,
        engines: Mapping[str, TrtEngine] | None = None,
        bundle: Bundle | None = None,
        exchanges: Exchanges | None = None,
        kept_windows: int = 0,
    ) -> None:
        self.exchanges, self.kept_windows = exchanges, kept_windows
        self.window_version = torch.zeros(1, dtype=torch.int32, device=host.device)
        self._windows: dict[int, Tensor] = {}
        self.host, self.device, self.arena, self.exported = host, host.device, arena, graph
        self.contexts_per_step, self.attention = contexts_per_step, attention
        own = {} if engines else {s.name: host.load(s.name, segment_spec(s), bundle) for s in graph.segments}
        self.engines = dict(engines or own)
        self._segment_scratch = {name: aligned(engine.scratch_bytes) for name, engine in self.engines.items()}
        self.plan = self._planned(graph)
        self.graph = self.plan.graph
        self._shared = {} if shared is None else shared
        self._offsets: dict[str, int] = {}
        self._places: list[int] = []
        self.step_scratch: list[int] = []
        self._placed = False
        self._contexts: dict[tuple[str, int], TrtContext] = {}
        self._turned_weights = {name for step in graph.steps for name in _channels_last_weights(step)}
        self._fixed: dict[str, Tensor] = {}
        self._compiled: dict[tuple[str, tuple[tuple[str, int], ...]], OpLauncher] = {}

    @property
    def windows(self) -> tuple[int, ...]:
        """Bytes of the windows that layers keep."""
        return tuple(window.nbytes for window in self._windows.values())

    @property
    def weight_tensors(self) -> list[Tensor]:
        """The weights on the device."""
        return [self._fixed[name] for name in self.graph.weights]

    def _planned(self, graph: SegmentedGraph) -> PlannedSteps:
        return planned_steps(graph, self._segment_scratch)

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Upload the weights, one at a time, side by side in one piece of memory: in pieces of their own, torch's allocator
        would leave some 0.2 GB of the 5B model's unused between them."""
        block = WeightBlock(self.graph, self.device, apart=self._shared)
        for name, tensor in tensors:
            kept = self._shared.get(name)
            if kept is None or not same_bytes(kept, tensor.to(self.device)):
                kept = block.placed(name, tensor, channels_last=name in self._turned_weights)
            self._fixed[name] = kept
            self._shared.setdefault(name, kept)

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
        """Create the contexts (TensorRT-RTX compiles kernels here) and keep them for next time; say how much arena it
        takes. All networks that share the arena must be prepared before one of them runs: it does not grow after that.
        """
        for i, step in enumerate(self.graph.steps):
            key = (step.name, i if self.contexts_per_step else 0)
            if step.kind == "segment" and key not in self._contexts:
                self._contexts[key] = self.engines[step.name].context(self.arena)
        for engine in self.engines.values():
            engine.keep_compiled_kernels()
        ops = {i: step for i, step in enumerate(self.graph.steps) if step.kind in ("op", "unpack")}
        self._launchers = {i: self._launcher(step) for i, step in ops.items()}
        own = {i: launcher.workspace_bytes for i, launcher in self._launchers.items()}
        keeping = [i for i, launcher in self._launchers.items() if isinstance(launcher, HopperSinkAttention)]
        for i in keeping[: self.kept_windows]:
            self._windows[i] = torch.zeros(own[i], dtype=torch.uint8, device=self.device)  # the arena stays as it is
        if self.exchanges:
            steps = [(i, step) for i, step in enumerate(self.graph.steps) if step.kind == "exchange"]
            own |= {i: exchange_bytes(self.graph, step) for i, step in steps}
        self.step_scratch = step_scratch(self.graph, self._segment_scratch, own)
        self._offsets, self._places, size = self.plan.layout(self._segment_scratch, own)
        self.arena.reserve(size)
        self._placed = False

    def place(self) -> None:
        """Give every tensor between steps its place in the arena, which is allocated here at the latest: once all
        networks that share it are prepared, and before the first run."""
        for name, offset in self._offsets.items():
            kind = self.graph.tensors[name]
            size = DTYPES[kind.dtype].bytes(prod(map(int, kind.shape)))
            piece = self.arena.memory[offset : offset + size]
            self._fixed[name] = piece.view(DTYPES[kind.dtype].torch).view(tuple(map(int, kind.shape)))
        self._placed = True

    def _launcher(self, step: Step) -> OpLauncher:
        """The op's kernels, compiled and loaded for this step's shapes; a table's length is told at each launch."""
        shapes = [[n if isinstance(n, int) else 1 for n in self.graph.tensors[name].shape] for name in step.inputs]
        op = op_named(step.name)
        dims = dims_from_shapes(op.spec, shapes)
        fixed = tuple(sorted((letter, size) for letter, size in dims.items() if letter != "W"))
        if (step.name, fixed) not in self._compiled:
            self._compiled[step.name, fixed] = launcher_for(op, dict(fixed), self.attention)
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
            place = self.arena.address + self._places[index], self.step_scratch[index]
            # A weight that lies as a library wants it is turned back for the moment; all else is contiguous already.
            context.run({binding: values[name].contiguous() for binding, name in names}, place)
            return
        if step.kind == "view":
            return  # it has its own place, or rather the one of what it shows, since `prepare`
        if step.kind == "exchange":
            assert self.exchanges is not None
            self.exchanges.run(step, values, self._scratch(index))
            return
        aliases = aliases_of(step)
        values |= {output: values[source] for output, source in aliases.items()}
        if write or not aliases:
            self._launch(index, step, values)

    def values_for(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor by name before the first step, for callers that run step by step (the profiler)."""
        if not self._placed:
            self.place()
        return {**self._fixed, **tensors}

    def _launch(self, index: int, step: Step, values: Mapping[str, Tensor]) -> None:
        pointers = [values[name].data_ptr() for name in (*step.inputs, *step.outputs)]
        inputs = zip(op_named(step.name).spec.inputs, step.inputs, strict=True)
        table_length = next((values[name].numel() for spec, name in inputs if spec.shape == ("W",)), 0)
        stream, launcher = torch.cuda.current_stream(self.device).cuda_stream, self._launchers[index]
        workspace = self.arena.address + self._places[index]
        if index in self._windows and isinstance(launcher, HopperSinkAttention):
            window, version = self._windows[index].data_ptr(), self.window_version.data_ptr()
            launcher.launch_kept(version, pointers, stream, window, table_length)
        elif self.exchanges and launcher.op.over_heads and isinstance(launcher, Launcher):
            between = partial(self.exchanges.largest, self._scratch(index)[: launcher.workspace_bytes])
            launcher.launch_around(between, pointers, stream, workspace, table_length)
        else:
            launcher.launch(pointers, stream, workspace, table_length)

    def _scratch(self, index: int) -> Tensor:
        """uint8, what a step may use while it runs."""
        return self.arena.memory[self._places[index] : self._places[index] + self.step_scratch[index]]


def _channels_last_weights(step: Step) -> list[str]:
    """The weights of a step that a library reads with their channels last."""
    if step.kind != "op":
        return []
    return [name for tensor, name in zip(op_named(step.name).spec.inputs, step.inputs) if tensor.channels_last]
