"""The backend of TensorRT plans, fused or segmented: buffers that never move, and a CUDA graph a window length.

Legend: C latent channels, F latent frames of a chunk, H, W latent size, T video frames.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from longtake.engines import segmented_graph
from longtake.engines.bundle import Bundle
from longtake.engines.flavour import Flavour
from longtake.engines.spec import NETWORKS, Binding, NetworkSpec, network_spec
from longtake.runtime.backends.base import Cache
from longtake.runtime.backends.segmented_network import SegmentedNetwork
from longtake.runtime.backends.trt_engine import TORCH_DTYPES, EngineHost, Scratch, TrtEngine, device_bytes_used
from longtake.runtime.errors import LongtakeError, UnavailableError

log = logging.getLogger(__name__)

MAX_GRAPHS = 16  # window lengths times caches in use; beyond it the oldest is dropped


class Network(Protocol):
    """A network on the device, whole or cut."""

    def prepare(self) -> None: ...

    def run(self, tensors: Mapping[str, Tensor], write: bool = True) -> None: ...


class Lane:
    """Engines that share scratch memory take turns: one caller at a time, on whatever stream it works.

    Work stays on the caller's stream, except that the default stream is left for one of our own: TensorRT synchronizes
    the device there. Ours waits for what the caller has enqueued and the caller's then waits for ours, so to the
    caller it looks like one stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.RLock()
        self._own = torch.cuda.Stream(device)
        self._done = torch.cuda.Event()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside, torch's current stream is the one to enqueue on, and nobody else uses these engines."""
        caller = torch.cuda.current_stream(self.device)
        stream = caller if caller.cuda_stream else self._own
        with self._lock:
            if stream is self._own:
                stream.wait_stream(caller)
            stream.wait_event(self._done)  # the last turn may have been on another stream, with the same buffers
            try:
                with torch.cuda.stream(stream):
                    yield
            finally:  # also after a failure: what was enqueued before it still uses the buffers
                self._done.record(stream)
                if stream is self._own:
                    caller.wait_stream(stream)


class WholeNetwork:
    """A network that is one plan, plugins inside or not."""

    def __init__(self, engine: TrtEngine, scratch: Scratch) -> None:
        self.engine, self.scratch = engine, scratch
        scratch.reserve(engine.scratch_bytes)

    def prepare(self) -> None:
        self.context = self.engine.context(self.scratch)
        self.engine.keep_compiled_kernels()

    def run(self, tensors: Mapping[str, Tensor], write: bool = True) -> None:
        """Enqueue on torch's current stream; `write` makes no difference inside an engine."""
        self.context.run(tensors)


def network_from_bundle(bundle: Bundle, name: str, host: EngineHost, scratch: Scratch) -> Network:
    """Load one network: verified plans, and for a cut network the weights of its verified ONNX file."""
    cut = bundle.folder / f"{name}.segments.json"
    if not cut.is_file():
        spec = network_spec(bundle.recipe.model, bundle.recipe.cache, name).as_json()
        return WholeNetwork(host.load(name, spec), scratch)
    bundle.check_file(cut)
    network = SegmentedNetwork(host, segmented_graph.load(cut), scratch)
    network.load_weights_from(bundle.onnx_file(f"{name}.onnx"))
    return network


class TrtBackend:
    """Backend (see base.py) on TensorRT plans. Subclasses say which mode they are."""

    name = ""

    def __init__(
        self, bundle: Bundle, flavour: Flavour, device: torch.device, reason: str, cuda_graphs: bool = True
    ) -> None:
        if not torch.cuda.is_available():
            raise UnavailableError(
                f"backend {self.name} needs an NVIDIA GPU",
                got="no GPU that torch can use",
                expected=f"a GPU of compute capability {bundle.recipe.compute_capability}",
                fix="use --backend reference",
            )
        self.bundle, self.recipe, self.preset = bundle, bundle.recipe, bundle.recipe.model
        self.device = torch.device("cuda", device.index or 0)
        self.reason, self.cuda_graphs = reason, cuda_graphs
        self.specs = {name: network_spec(self.preset, self.recipe.cache, name) for name in NETWORKS}
        self._graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}
        self.lanes = {name: Lane(self.device) for name in ("denoise", "decode")}
        self._peak = 0
        with torch.cuda.device(self.device):
            self._load(flavour)
        self._sample_memory()

    def _load(self, flavour: Flavour) -> None:
        host = EngineHost(self.bundle.folder, flavour, self.device)
        # The decoder runs beside the DiT, on another stream, so it has scratch of its own.
        denoise, decode = Scratch(self.device), Scratch(self.device)
        self.networks: dict[str, Network] = {
            name: network_from_bundle(self.bundle, name, host, decode if name.startswith("vae") else denoise)
            for name in NETWORKS
        }
        for network in self.networks.values():
            network.prepare()
        self._static = {b.name: self.allocate(b) for b in self.specs["dit"].inputs if not self._is_cache(b.name)}
        self._static |= {"velocity": self.allocate(self.specs["dit"].outputs[0])}

    def _is_cache(self, name: str) -> bool:
        return any(name == source for _, source in self.specs["dit"].aliases)

    def allocate(self, binding: Binding, zero: bool = False) -> Tensor:
        """A device tensor for a binding; a dynamic dimension gets its largest size."""
        largest = {name: sizes[2] for spec in self.specs.values() for name, sizes in spec.profile}
        shape = [largest[size] if isinstance(size, str) else size for size in binding.shape]
        make = torch.zeros if zero else torch.empty
        return make(shape, dtype=TORCH_DTYPES[binding.dtype], device=self.device)

    def _call(self, name: str, inputs: list[Tensor]) -> list[Tensor]:
        """Run a network that is called once a prompt: inputs in spec order, new output tensors."""
        spec = self.specs[name]
        outputs = [self.allocate(binding) for binding in spec.outputs]
        given = [self._as_binding(tensor, binding) for tensor, binding in zip(inputs, spec.inputs, strict=True)]
        named = zip((*spec.inputs, *spec.outputs), (*given, *outputs), strict=True)
        with self.lanes["denoise"].turn():
            self.networks[name].run({binding.name: tensor for binding, tensor in named})
        return outputs

    def _as_binding(self, tensor: Tensor, binding: Binding) -> Tensor:
        return tensor.to(self.device, TORCH_DTYPES[binding.dtype]).contiguous()

    @torch.no_grad()
    def text(self, tokens: Tensor) -> Tensor:
        """See Backend.text."""
        return self._call("text_encoder", [tokens])[0]

    @torch.no_grad()
    def context(self, embeddings: Tensor) -> list[Tensor]:
        """See Backend.context."""
        return self._call("context", [embeddings])

    def new_cache(self) -> Cache:
        """See Backend.new_cache."""
        bindings = [b for b in self.specs["dit"].inputs if self._is_cache(b.name)]
        tensors = [self.allocate(binding, zero=True) for binding in bindings]
        size = len(tensors) // self.preset.dit.layers
        self._sample_memory()
        return [tuple(tensors[i : i + size]) for i in range(0, len(tensors), size)]

    @torch.no_grad()
    def dit(
        self,
        latents_BCFHW: Tensor,
        sinusoid: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        context: list[Tensor],
        cache: Cache,
        table: Tensor,
        write_slot: Tensor,
    ) -> Tensor:
        """See Backend.dit. The velocity is a buffer that the next call overwrites."""
        given = (latents_BCFHW, sinusoid, rope_cos, rope_sin, table, write_slot, *context)
        # Only a slot on the host can be looked at without waiting; on the device the kernel itself skips slot -1.
        write = write_slot.is_cuda or int(write_slot) >= 0
        # A graph replays on the addresses it was captured with, so all of them tell which one fits: a later cache may
        # share some with one that was freed.
        key = (table.numel(), int(write), *(part.data_ptr() for layer in cache for part in layer))
        with self.lanes["denoise"].turn():
            self._replay_or_run(key, self._fill(given) | self._cache_bindings(cache), write)
        return self._static["velocity"]

    def _fill(self, given: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Copy a pass's inputs to where the CUDA graphs read them."""
        filled = {"velocity": self._static["velocity"]}
        inputs = self.specs["dit"].inputs
        for binding, tensor in zip(inputs[: len(given)], given, strict=True):
            place = self._static[binding.name]
            filled[binding.name] = place[: tensor.shape[0]] if isinstance(binding.shape[0], str) else place
            filled[binding.name].copy_(tensor, non_blocking=True)
        return filled

    def _cache_bindings(self, cache: Cache) -> dict[str, Tensor]:
        parts = [part for layer in cache for part in layer]
        pairs = zip(self.specs["dit"].aliases, parts, strict=True)
        return {name: part for (out, source), part in pairs for name in (out, source)}

    def _replay_or_run(self, key: tuple[int, ...], tensors: Mapping[str, Tensor], write: bool) -> None:
        """The first pass of a kind runs eagerly, which warms everything up; it is then captured for the next one."""
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
            return
        self.networks["dit"].run(tensors, write)
        if self.cuda_graphs:
            self._capture(key, tensors, write)
            self._sample_memory()

    def _capture(self, key: tuple[int, ...], tensors: Mapping[str, Tensor], write: bool) -> None:
        torch.cuda.current_stream(self.device).synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the decode thread may allocate memory meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.networks["dit"].run(tensors, write)
        except (RuntimeError, LongtakeError) as error:
            self.cuda_graphs = False
            log.warning("CUDA graphs cannot be captured here, passes are launched one by one: %s", error)
            return
        if len(self._graphs) >= MAX_GRAPHS:
            self._graphs.pop(next(iter(self._graphs)))
        self._graphs[key] = graph

    def new_decoder(self) -> TrtDecoder:
        """See Backend.new_decoder."""
        decoder = TrtDecoder(self)
        self._sample_memory()
        return decoder

    def _sample_memory(self) -> None:
        """All memory is allocated at a few known points, so sampling there finds the peak."""
        self._peak = max(self._peak, device_bytes_used(self.device))

    def peak_bytes(self) -> int:
        """See Backend.peak_bytes; from the driver, in bytes."""
        self._sample_memory()
        return self._peak

    def close(self) -> None:
        """See Backend.close."""
        if self.networks:
            torch.cuda.synchronize(self.device)
            self._graphs.clear()
            self.networks.clear()
            self._static.clear()


class TrtDecoder:
    """Streaming decoder: two sets of feature caches that take turns as input and output of the steady network."""

    def __init__(self, backend: TrtBackend) -> None:
        self.backend = backend
        steady: NetworkSpec = backend.specs["vae_steady"]
        self._caches = [[backend.allocate(b) for b in steady.outputs[1:]] for _ in range(2)]
        self._frames = {n: backend.allocate(backend.specs[n].outputs[0]) for n in ("vae_first", "vae_steady")}
        self._latent = backend.allocate(steady.inputs[0])
        self._turn, self._started = 0, False

    @torch.no_grad()
    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """See Decoder.decode: fp32 [1, C, H, W] to fp32 [3, T, H, W], a buffer that the next call overwrites."""
        name = "vae_steady" if self._started else "vae_first"
        spec = self.backend.specs[name]
        before, after = self._caches[self._turn], self._caches[1 - self._turn]
        inputs = [self._latent, *(before if self._started else ())]
        named = zip((*spec.inputs, *spec.outputs), (*inputs, self._frames[name], *after), strict=True)
        with self.backend.lanes["decode"].turn():
            self._latent.copy_(latent_BCHW[:, :, None])
            self.backend.networks[name].run({binding.name: tensor for binding, tensor in named})
        self._turn, self._started = 1 - self._turn, True
        return self._frames[name][0]

    def state(self) -> list[Tensor]:
        """See Decoder.state."""
        return list(self._caches[self._turn]) if self._started else []

    def load_state(self, tensors: list[Tensor]) -> None:
        """See Decoder.load_state."""
        self._started = bool(tensors)
        for own, given in zip(self._caches[self._turn], tensors, strict=False):
            own.copy_(given)


def check_mode(bundle: Bundle, mode: str, folder: Path) -> None:
    """Raise UnavailableError if the plans in `folder` were built for another mode."""
    if bundle.recipe.mode != mode:
        raise UnavailableError(
            f"{folder} was not built for backend {mode}",
            got=f"recipe {bundle.recipe.name}, built {bundle.recipe.mode}",
            expected=f"a recipe with mode: {mode}",
            fix=f"use --backend {bundle.recipe.mode}, or build another recipe",
        )
