"""The backend of TensorRT plans, fused or segmented: buffers that never move, and a CUDA graph a window length."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from longtake.cuda_streams import lend_stream
from longtake.dtypes import DTYPES
from longtake.errors import LongtakeError, UnavailableError
from longtake.formats.bundle import Bundle
from longtake.formats.onnx_file import WeightSource
from longtake.formats.segmented_graph import SegmentedGraph, TensorType
from longtake.machine.flavour import Flavour
from longtake.runtime.backends.base import Cache, Encoder
from longtake.runtime.backends.segments.arena import storage_bytes
from longtake.runtime.backends.segments.network import SegmentedNetwork
from longtake.runtime.backends.segments.vae_first import FirstStep, first_steps
from longtake.runtime.backends.torch_parts import TextRunner, TorchEncoder, text_runner, vae_from_checkpoints
from longtake.runtime.backends.trt.engine import EngineHost, Scratch, TrtEngine
from longtake.runtime.backends.trt.lane import Lane
from longtake.runtime.backends.trt.memory_log import MemoryLog
from longtake.runtime.backends.trt.vae_stream import (
    Network,
    TrtDecoder,
    TrtEncoder,
    TrtStream,
    caches_kept_twice,
    carried_pairs,
)
from longtake.training.models.network_spec import Binding
from longtake.training.models.wan.spec import NETWORKS, context_bindings, recipe_spec

log = logging.getLogger(__name__)

MAX_GRAPHS = 16  # window lengths times caches in use; beyond it the oldest is dropped
ENCODER = ("vae_encoder_first", "vae_encoder_steady")  # loaded while one is in use: few videos start from a picture


class WholeNetwork:
    """A network that is one plan, plugins inside or not."""

    def __init__(self, engine: TrtEngine, arena: Scratch) -> None:
        self.engine, self.arena = engine, arena
        arena.reserve(engine.scratch_bytes)

    def prepare(self) -> None:
        self.context = self.engine.context(self.arena)
        self.engine.keep_compiled_kernels()

    def run(self, tensors: Mapping[str, Tensor], write: bool = True) -> None:
        """Enqueue on torch's current stream; `write` makes no difference inside an engine."""
        self.context.run(tensors)


def network_from_bundle(
    bundle: Bundle,
    name: str,
    host: EngineHost,
    arena: Scratch,
    shared: dict[str, Tensor],
    weights: WeightSource | None = None,
    steady: Network | None = None,
) -> Network:
    """Load one network: verified plans; a cut network's weights come from `weights`, or its verified ONNX file. A stream's
    first step needs none if `steady`, its later ones' network, can do it."""
    if name == "vae_first" and isinstance(steady, SegmentedNetwork) and (first := first_steps(steady.exported)):
        return FirstStep(steady, first)
    cut = bundle.folder / f"{name}.segments.json"
    if not cut.is_file():
        if weights is not None:
            raise LongtakeError(f"{name}.plan holds its own weights", got="other ones", fix="use a segmented recipe")
        spec = recipe_spec(bundle.recipe, name).as_json()
        return WholeNetwork(host.load(name, spec), arena)
    bundle.check_file(cut)
    graph, attention = SegmentedGraph.read(cut), bundle.recipe.attention
    network = SegmentedNetwork(host, graph, arena, attention=attention, shared=shared)
    network.load_weights_from(weights or bundle.onnx_file(f"{name}.onnx"))
    return network


def networks_in(bundle: Bundle) -> tuple[str, ...]:
    """The networks that a bundle has plans of."""
    return tuple(n for n in NETWORKS if f"{n}.plan" in bundle.files or f"{n}.segments.json" in bundle.files)


class TrtBackend:
    """Backend (see base.py) on TensorRT plans. Subclasses say which mode they are.

    Args:
        weights: by network, where a cut network's weights come from; by default its ONNX file.
        networks: which ones to load, by default all that the bundle has. The rest cannot be called.
        decode_device: the decoder's GPU, by default `device`.
        checkpoints: where a text or VAE encoder that is not among the plans comes from, by default the preset's.
    """

    name = ""

    def __init__(
        self,
        bundle: Bundle,
        flavour: Flavour,
        device: torch.device,
        reason: str,
        cuda_graphs: bool = True,
        weights: Mapping[str, WeightSource] | None = None,
        networks: Sequence[str] | None = None,
        decode_device: torch.device | None = None,
        checkpoints: Path | None = None,
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
        self.decode_device = torch.device("cuda", decode_device.index or 0) if decode_device else self.device
        self.reason, self.cuda_graphs, self.checkpoints = reason, cuda_graphs, checkpoints
        self._flavour, self._weights = flavour, dict(weights or {})
        self.specs = {name: recipe_spec(self.recipe, name) for name in NETWORKS}
        self._graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}
        self.lanes = {"denoise": Lane(self.device), "decode": Lane(self.decode_device)}
        self._capture_stream = lend_stream(self.device, self)
        self._text: TextRunner | None = None
        self.memory = MemoryLog(self.device)
        self.memory.add("the CUDA context", "CUDA context")
        self.sizes: dict[str, int] = {}  # bytes by the name of the budget's term, of what sessions allocate
        self.networks: dict[str, Network] = {}
        self._static: dict[str, Tensor] = {}
        wanted = tuple(networks_in(bundle) if networks is None else networks)
        # The decoder first: finding out which caches can be in place needs two sets of them for a moment.
        self._load([name for name in wanted if name.startswith("vae") and name not in ENCODER], self.decode_device)
        self.memory.add("loading the VAE", "weights, VAE decoder", "VAE working memory")
        self._twice = self._find_caches_kept_twice() if "vae_steady" in self.networks else frozenset[str]()
        self.memory.add("trying its caches in place")
        self._load([name for name in wanted if not name.startswith("vae")], self.device)
        self.memory.add("loading the DiT", "weights, context", "weights, dit", "weights, text_encoder",
                        "DiT working memory")  # fmt: skip
        if "dit" in self.networks:
            self._static = {b.name: self.allocate(b) for b in self.specs["dit"].inputs if not self._is_cache(b.name)}
            self._static |= {"velocity": self.allocate(self.specs["dit"].outputs[0])}
        self.memory.add("its buffers", "static buffers")

    def _load(self, names: Sequence[str], device: torch.device) -> None:
        """Networks that run one after another: they share scratch, which those on another stream may not."""
        with torch.cuda.device(device):
            self.networks |= self._prepared(names, device)
            torch.cuda.synchronize(device)  # weights made there: another GPU's events say nothing about this one

    def _prepared(self, names: Sequence[str], device: torch.device) -> dict[str, Network]:
        host, arena = EngineHost(self.bundle.folder, self._flavour, device), Scratch(device)
        shared: dict[str, Tensor] = {}
        loaded: dict[str, Network] = {}
        # The steady decoder first: it can stand for the other one, or else its library says how both keep their weights.
        for name in sorted(names, key=lambda name: name != "vae_steady"):
            source, steady = self._weights.get(name), loaded.get("vae_steady")
            loaded[name] = network_from_bundle(self.bundle, name, host, arena, shared, source, steady)
        for network in loaded.values():
            network.prepare()
        # What loading, quantizing and trying took in passing would stay with torch's allocator, to no use.
        torch.cuda.empty_cache()
        if loaded:
            _ = arena.memory  # only now: each has said how much it needs; nothing is allocated in the loop
        return loaded

    def _find_caches_kept_twice(self) -> frozenset[str]:
        with torch.cuda.device(self.decode_device):
            with self.lanes["decode"].turn():
                found = caches_kept_twice(self.networks["vae_steady"], self.specs["vae_steady"], self._allocate_decode)
            torch.cuda.empty_cache()  # the second set: nothing else would fit its place
        return found

    def bytes_kept_twice(self) -> int:
        """Bytes of the VAE caches that need a second buffer."""
        caches = [b for b in self.specs["vae_steady"].inputs if b.name in self._twice]
        return sum(DTYPES[b.dtype].bytes(prod(int(n) for n in b.shape)) for b in caches)

    def _allocate_decode(self, binding: Binding) -> Tensor:
        return self.allocate(binding, device=self.decode_device)

    def network(self, name: str) -> Network:
        """A network that is loaded. Raises LongtakeError if it is not."""
        if name not in self.networks:
            raise LongtakeError(
                f"network {name} is not loaded", got=", ".join(self.networks) or "none",
                fix=f"build it: longtake engines --recipe {self.recipe.name}",
            )  # fmt: skip
        return self.networks[name]

    def _is_cache(self, name: str) -> bool:
        return any(name == source for _, source in self.specs["dit"].aliases)

    def allocate(self, binding: Binding, zero: bool = False, device: torch.device | None = None) -> Tensor:
        """A device tensor for a binding; a dynamic dimension gets its largest size."""
        largest = {name: sizes[2] for spec in self.specs.values() for name, sizes in spec.profile}
        shape = [largest[size] if isinstance(size, str) else size for size in binding.shape]
        make = torch.zeros if zero else torch.empty
        return make(shape, dtype=DTYPES[binding.dtype].torch, device=device or self.device)

    def _zeros_side_by_side(self, bindings: Sequence[Binding]) -> list[Tensor]:
        """Tensors of zeros in one piece of memory: in pieces of their own, some 0.1 GB between them stays unused."""
        kinds = [TensorType(binding.dtype, binding.shape) for binding in bindings]
        memory = torch.zeros(sum(map(storage_bytes, kinds)), dtype=torch.uint8, device=self.device)
        pieces = memory.split([storage_bytes(kind) for kind in kinds])
        shapes = [tuple(map(int, kind.shape)) for kind in kinds]
        dtypes = [DTYPES[kind.dtype].torch for kind in kinds]
        return [
            piece[: prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for piece, shape, dtype in zip(pieces, shapes, dtypes, strict=True)
        ]

    def _call(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Run a network that is called once a prompt on its only input; new output tensors."""
        spec = self.specs[name]
        outputs = {binding.name: self.allocate(binding) for binding in spec.outputs}
        (binding,) = spec.inputs
        given = {binding.name: tensor.to(self.device, DTYPES[binding.dtype].torch).contiguous()}
        with self.lanes["denoise"].turn():
            self.network(name).run({**given, **outputs})
        return outputs

    @torch.no_grad()
    def text(self, tokens: Tensor) -> Tensor:
        """See Backend.text; a text encoder that is not among the plans runs in PyTorch."""
        if "text_encoder" not in self.networks:
            if self._text is None:
                self._text = text_runner(self.preset, self.checkpoints, self.device)
            return self._text(tokens)
        return self._call("text_encoder", tokens)[self.specs["text_encoder"].outputs[0].name]

    @torch.no_grad()
    def context(self, embeddings: Tensor) -> list[Tensor]:
        """See Backend.context."""
        outputs = self._call("context", embeddings)
        return [outputs[binding.name] for binding in context_bindings(self.preset)]

    def new_cache(self) -> Cache:
        """See Backend.new_cache."""
        bindings = [b for b in self.specs["dit"].inputs if self._is_cache(b.name)]
        tensors = self._zeros_side_by_side(bindings)
        size = len(tensors) // self.preset.dit.layers
        self.sizes["K/V cache"] = sum(tensor.nbytes for tensor in tensors)
        self.memory.add("a K/V cache", "K/V cache")
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
        names = [binding.name for binding in context_bindings(self.preset)]
        given = {"latents": latents_BCFHW, "timestep_sinusoid": sinusoid, "rope_cos": rope_cos, "rope_sin": rope_sin,
                 "table": table, "write_slot": write_slot, **dict(zip(names, context, strict=True))}  # fmt: skip
        # Only a slot on the host can be looked at without waiting; on the device the kernel itself skips slot -1.
        write = write_slot.is_cuda or int(write_slot) >= 0
        # A graph replays on the addresses it was captured with, so all of them tell which one fits: a later cache may
        # share some with one that was freed.
        key = (table.numel(), int(write), *(part.data_ptr() for layer in cache for part in layer))
        with self.lanes["denoise"].turn():
            self._replay_or_run(key, self._fill(given) | self._cache_bindings(cache), write)
        return self._static["velocity"]

    def _fill(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy a pass's inputs to where the CUDA graphs read them."""
        filled = {"velocity": self._static["velocity"]}
        dynamic = {b.name for b in self.specs["dit"].inputs if isinstance(b.shape[0], str)}
        for name, tensor in given.items():
            place = self._static[name]
            filled[name] = place[: tensor.shape[0]] if name in dynamic else place
            filled[name].copy_(tensor, non_blocking=True)
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
        self.network("dit").run(tensors, write)
        if self.cuda_graphs:
            self._capture(key, tensors, write)
            self.memory.add("a pass and its CUDA graph", "prompts' K/V and embeddings", "solver")

    def _capture(self, key: tuple[int, ...], tensors: Mapping[str, Tensor], write: bool) -> None:
        torch.cuda.current_stream(self.device).synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the decode thread may allocate memory meanwhile. torch's own stream is one GPU's, the first's.
            with torch.cuda.graph(graph, stream=self._capture_stream, capture_error_mode="thread_local"):
                self.network("dit").run(tensors, write)
        except (RuntimeError, LongtakeError) as error:
            self.cuda_graphs = False
            log.warning("CUDA graphs cannot be captured here, passes are launched one by one: %s", error)
            return
        if len(self._graphs) >= MAX_GRAPHS:
            self._graphs.pop(next(iter(self._graphs)))
        self._graphs[key] = graph

    def new_decoder(self) -> TrtDecoder:
        """See Backend.new_decoder."""
        specs = self.specs["vae_first"], self.specs["vae_steady"]
        networks = {spec.name: self.network(spec.name) for spec in specs}
        with torch.cuda.device(self.decode_device):
            stream = TrtStream(networks, specs, self._allocate_decode, self.lanes["decode"], self._twice)
        self.sizes |= stream.sizes()
        self.memory.add("a decoder", "VAE caches", "decode buffers")
        return TrtDecoder(stream)

    def encoder_networks(self) -> dict[str, Network]:
        """The VAE encoder's networks, loaded anew: they are dropped with what was returned."""
        with torch.cuda.device(self.device):
            return self._prepared(ENCODER, self.device)

    def new_encoder(self) -> Encoder:
        """See Backend.new_encoder; one that is not among the plans runs in PyTorch."""
        if not set(ENCODER) <= set(networks_in(self.bundle)):
            return TorchEncoder(vae_from_checkpoints(self.preset, self.checkpoints), self.device)
        networks = self.encoder_networks()
        with torch.cuda.device(self.device):
            specs = self.specs[ENCODER[0]], self.specs[ENCODER[1]]
            twice = frozenset(name for _, name in carried_pairs(specs[1]))
            stream = TrtStream(networks, specs, self.allocate, Lane(self.device), twice)
        self.memory.add("a VAE encoder")
        return TrtEncoder(stream)

    def peak_bytes(self) -> int:
        """See Backend.peak_bytes; from the driver, in bytes: all is allocated at a few known points, noted there."""
        self.memory.add("running")
        return self.memory.peak

    def close(self) -> None:
        """See Backend.close."""
        if self.networks:
            for device in {self.device, self.decode_device}:
                torch.cuda.synchronize(device)
            self._graphs.clear()
            self.networks.clear()
            self._static.clear()


def check_mode(bundle: Bundle, mode: str, folder: Path) -> None:
    """Raise UnavailableError if the plans in `folder` were built for another mode."""
    if bundle.recipe.mode != mode:
        raise UnavailableError(
            f"{folder} was not built for backend {mode}",
            got=f"recipe {bundle.recipe.name}, built {bundle.recipe.mode}",
            expected=f"a recipe with mode: {mode}",
            fix=f"use --backend {bundle.recipe.mode}, or build another recipe",
        )
