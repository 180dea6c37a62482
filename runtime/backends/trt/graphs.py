"""Passes of the network with slots: inputs are copied to buffers that never move, and a CUDA graph replays each kind of pass.

A kind is the length of each input of varying length (the slot table's), and whether the pass writes its slot.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from longtake.cuda_streams import acquire_stream
from longtake.errors import LongtakeError
from longtake.runtime.backends.base import NO_SLOT, State
from longtake.runtime.backends.segments.network import SegmentedNetwork
from longtake.runtime.backends.trt.networks import Network
from longtake.training.models.network_spec import Binding, NetworkSpec

log = logging.getLogger(__name__)

MAX_GRAPHS = 16  # window lengths times states in use; beyond it the oldest is dropped


def gone() -> None:
    """A reference to nothing."""


class Passes:
    """Runs one network on states made for it.

    cuda_graphs: whether passes are captured. graphs: by kind and the addresses of the state they were captured with. captured:
    called after each capture. settle: waits for the pass before a capture; where others take part in it, not without end. The
    caller holds the lock of the network's scratch memory.
    """

    def __init__(
        self,
        network: Network,
        spec: NetworkSpec,
        allocate: Callable[[Binding], Tensor],
        device: torch.device,
        cuda_graphs: bool,
        captured: Callable[[], None],
        settle: Callable[[], None] | None = None,
    ) -> None:
        self.network, self.spec, self.device = network, spec, device
        self.cuda_graphs, self._captured = cuda_graphs, captured
        self._settle = settle or (lambda: torch.cuda.current_stream(device).synchronize())
        self.graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}
        self._capture_stream = acquire_stream(device, self)
        self._inputs = [b.name for b in spec.inputs if b.name not in spec.kept.values()]
        self._results = [b.name for b in spec.outputs if b.name not in spec.kept]
        self._dynamic = {b.name for b in spec.inputs if isinstance(b.shape[0], str)}
        bindings = {b.name: b for b in (*spec.inputs, *spec.outputs)}
        self._static = {name: allocate(bindings[name]) for name in (*self._inputs, *self._results)}
        self._last_state: Callable[[], State | None] = (
            gone  # what the last pass read its window from, and by which table
        )
        self._tables: list[Tensor] = []
        self._contents: tuple[int, list[int]] = 0, []
        self._version = 0

    @property
    def static_bytes(self) -> int:
        """Bytes of the buffers that inputs are copied to and results come from."""
        return sum(tensor.nbytes for tensor in self._static.values())

    def run(self, inputs: Mapping[str, Tensor], state: State, commit: bool) -> dict[str, Tensor]:
        """One pass, enqueued on torch's current stream. The results are buffers that the next pass overwrites."""
        tensors = self._filled(inputs if commit else {**inputs, self.spec.slot: NO_SLOT})
        self._tell_window(inputs, state, commit)
        for output, name in self.spec.kept.items():
            tensors[name] = tensors[output] = state.tensors[name]
        # A graph replays on the addresses it was captured with, so all of them tell which one fits: a later state may
        # share some with one that was freed.
        lengths = (tensors[name].shape[0] for name in self._inputs if name in self._dynamic)
        key = (*lengths, int(commit), *(tensor.data_ptr() for tensor in state.tensors.values()))
        self._replay_or_run(key, tensors, commit)
        return {name: self._static[name] for name in self._results}

    def _tell_window(self, inputs: Mapping[str, Tensor], state: State, commit: bool) -> None:
        """Give the network another number where the window may be another one than the last pass's: another state or table,
        the same with other content, or a slot that was written. The tables are held, so that no other takes their place."""
        tables = [inputs[name] for name in sorted(self._dynamic)]
        contents = state.loads, [table._version for table in tables]
        same = self._last_state() is state and self._contents == contents
        if not (same and all(one is other for one, other in zip(tables, self._tables, strict=True))):
            self._version += 1
        if isinstance(self.network, SegmentedNetwork) and self.network.kept_windows:
            self.network.window_version.fill_(self._version)
        self._tables, self._contents = tables, contents
        self._last_state = gone if commit else weakref.ref(state)  # what a pass writes, no earlier one has read

    def release(self) -> None:
        """Destroy the graphs, also those that a traceback still holds: a communicator does not end before what captured it."""
        for graph in self.graphs.values():
            graph.reset()
        self.graphs.clear()

    def _filled(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy a pass's inputs to where the CUDA graphs read them; the slot comes from the host, so nobody waits for it."""
        tensors = {name: self._static[name] for name in self._results}
        for name in self._inputs:
            place, tensor = self._static[name], inputs[name]
            tensors[name] = place[: tensor.shape[0]] if name in self._dynamic else place
            tensors[name].copy_(tensor, non_blocking=True)
        return tensors

    def _replay_or_run(self, key: tuple[int, ...], tensors: Mapping[str, Tensor], write: bool) -> None:
        """The first pass of a kind runs eagerly, which warms everything up; it is then captured for the next one."""
        graph = self.graphs.get(key)
        if graph is not None:
            graph.replay()
            return
        self.network.run(tensors, write)
        if self.cuda_graphs:
            self._capture(key, tensors, write)
            self._captured()

    def _capture(self, key: tuple[int, ...], tensors: Mapping[str, Tensor], write: bool) -> None:
        self._settle()
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the decode thread may allocate memory meanwhile. torch's own stream is one GPU's, the first's.
            with torch.cuda.graph(graph, stream=self._capture_stream, capture_error_mode="thread_local"):
                self.network.run(tensors, write)
        except (RuntimeError, LongtakeError) as error:
            self.cuda_graphs = False
            log.warning("CUDA graphs cannot be captured here, passes are launched one by one: %s", error)
            return
        if len(self.graphs) >= MAX_GRAPHS:
            self.graphs.pop(next(iter(self.graphs)))
        self.graphs[key] = graph
