"""The backend of TensorRT plans, fused or segmented: what is loaded, in which order, and what runs under which lock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from longtake.dtypes import DTYPES
from longtake.errors import LongtakeError, UnavailableError
from longtake.formats.bundle import Bundle
from longtake.formats.memory import KEPT_WINDOWS
from longtake.formats.onnx_file import WeightSource
from longtake.formats.segmented_graph import TensorType
from longtake.machine.flavour import Flavour
from longtake.runtime.backends.base import Backend, State
from longtake.runtime.backends.segments.arena import storage_bytes
from longtake.runtime.backends.trt.engine import EngineHost, ReadPlan, Scratch, compute_capability_of
from longtake.runtime.backends.trt.graphs import Passes
from longtake.runtime.backends.trt.memory_log import MemoryLog
from longtake.runtime.backends.trt.networks import Network, network_from_bundle, networks_in, part_of, verified_plans
from longtake.runtime.backends.trt.stream_lock import StreamLock
from longtake.runtime.backends.trt.vae_stream import StreamState, caches_kept_twice
from longtake.runtime.parallel.comm import Comm
from longtake.training.models.families import family_of
from longtake.training.models.network_spec import Binding, rank_network

DECODER = ("vae_first", "vae_steady")
ENCODER = ("vae_encoder_first", "vae_encoder_steady")  # loaded while one is in use: few videos start from a picture


class TrtBackend(Backend):
    """Backend (see base.py) on TensorRT plans. Its name is the mode that they were built in.

    Args:
        weights: by network, where a cut network's weights come from; by default its ONNX file.
        networks: which ones to load, by default all that the bundle has. The rest cannot be called.
        decode_device: the decoder's GPU, by default `device`.
        checkpoints: where a text or VAE encoder that is not among the plans comes from, by default the preset's.
        kept_windows: how many layers keep their window, laid out for attention, between the passes of a chunk (0.2 GB each for
            the 5B's in FP8); 0 lays out every window in every pass.
        comm: of one of several ranks that share a stream: its part of the DiT is loaded, and `specs` says so.
    """

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
        comm: Comm | None = None,
        kept_windows: int = 0,
    ) -> None:
        self.name = bundle.recipe.mode
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
        self.reason, self.checkpoints, self.comm, self.kept_windows = reason, checkpoints, comm, kept_windows
        if comm:
            parts = {name: part_of(name, comm, bundle) for name in ("dit", DECODER[1])}
            if parts[DECODER[1]] != DECODER[1]:  # whose steps make a stream's first one, too
                parts[DECODER[0]] = rank_network(comm.world, DECODER[0])
            family = family_of(self.preset)
            specs = {n: replace(family.spec(self.preset, self.recipe, part), name=n) for n, part in parts.items()}
            self.specs = self.specs | specs
        self._flavour, self._weights = flavour, dict(weights or {})
        self.locks = {"denoise": StreamLock(self.device), "decode": StreamLock(self.decode_device)}
        self.memory = MemoryLog(self.device)
        self.memory_rows = self.memory.rows
        self.memory.add("the CUDA context", "CUDA context")
        self.sizes: dict[str, int] = {}  # bytes by the name of the budget's term, of what sessions allocate
        self.networks: dict[str, Network] = {}
        self.passes: Passes | None = None
        wanted = tuple(networks_in(bundle) if networks is None else networks)
        decoders = [name for name in wanted if name.startswith("vae") and name not in ENCODER]
        others = [name for name in wanted if not name.startswith("vae")]
        self._plans = self._verified(decoders, self.decode_device) | self._verified(others, self.device)
        self._verified([name for name in wanted if name in ENCODER], self.device)  # loaded when a picture comes
        # The decoder first: finding out which caches can be in place needs two sets of them for a moment.
        self._load(decoders, self.decode_device)
        self.memory.add("loading the VAE", "weights, VAE decoder", "VAE working memory")
        self._twice = self._find_caches_kept_twice() if "vae_steady" in self.networks else frozenset[str]()
        self.memory.add("trying its caches in place")
        self._load(others, self.device)
        self._plans.clear()
        terms = ("weights, context", "weights, dit", "weights, text_encoder", "DiT working memory", KEPT_WINDOWS)
        self.memory.add("loading the DiT", *terms)
        self.windows = self._windows() if kept_windows else {}
        if "dit" in self.networks:
            self.passes = self._new_passes(cuda_graphs)
            self.sizes["static buffers"] = self.passes.static_bytes
        self.memory.add("its buffers", "static buffers")

    def _windows(self) -> dict[str, int]:
        """See Backend.windows."""
        found = [size for network in self.networks.values() for size in getattr(network, "windows", ())]
        self.sizes[KEPT_WINDOWS] = sum(found)
        return {"layers": len(found), "of": self.preset.dit.layers}

    def _new_passes(self, cuda_graphs: bool) -> Passes:
        captured = partial(self.memory.add, "a pass and its CUDA graph", "prompts' K/V and embeddings", "solver")
        settle = self.comm.settle if self.comm else None
        return Passes(
            self.networks["dit"], self.specs["dit"], self.allocate, self.device, cuda_graphs, captured, settle
        )

    def _verified(self, names: Sequence[str], device: torch.device) -> dict[str, ReadPlan]:
        parts = [part_of(name, self.comm, self.bundle) for name in names]
        return verified_plans(self.bundle, parts, self._flavour, compute_capability_of(device))

    def _load(self, names: Sequence[str], device: torch.device) -> None:
        """Networks that run one after another: they share scratch, which those on another stream may not."""
        with torch.cuda.device(device):
            self.networks |= self._prepared(names, device)
            torch.cuda.synchronize(device)  # weights made there: another GPU's events say nothing about this one

    def _prepared(self, names: Sequence[str], device: torch.device) -> dict[str, Network]:
        host, arena = EngineHost(self.bundle.folder, self._flavour, device, self._plans), Scratch(device)
        shared: dict[str, Tensor] = {}
        loaded: dict[str, Network] = {}
        # The steady decoder first: it can stand for the other one, or else its library says how both keep their weights.
        for name in sorted(names, key=lambda name: name != "vae_steady"):
            source, steady = self._weights.get(name), loaded.get("vae_steady")
            loaded[name] = network_from_bundle(
                self.bundle, name, host, arena, shared, source, steady, self.comm, self.kept_windows
            )
        for network in loaded.values():
            network.prepare()
        # What loading, quantizing and trying took in passing would stay with torch's allocator, to no use.
        torch.cuda.empty_cache()
        if loaded:
            _ = arena.memory  # only now: each has said how much it needs; nothing is allocated in the loop
        return loaded

    def _find_caches_kept_twice(self) -> frozenset[str]:
        with torch.cuda.device(self.decode_device):
            with self.locks["decode"].hold():
                found = caches_kept_twice(self.networks["vae_steady"], self.specs["vae_steady"], self._allocate_decode)
            torch.cuda.empty_cache()  # the second set: nothing else would fit its place
        return found

    @property
    def twice_bytes(self) -> int:  # type: ignore[override]
        """Bytes of the VAE caches that need a second buffer."""
        caches = [b for b in self.specs["vae_steady"].inputs if b.name in self._twice]
        return sum(DTYPES[b.dtype].bytes(prod(int(n) for n in b.shape)) for b in caches)

    def _allocate_decode(self, binding: Binding) -> Tensor:
        return self.allocate(binding, device=self.decode_device)

    def network(self, name: str) -> Network:
        """A network that is loaded. Raises LongtakeError if it is not."""
        if name not in self.networks:
            raise self._not_loaded(name)
        return self.networks[name]

    def _not_loaded(self, name: str) -> LongtakeError:
        return LongtakeError(
            f"network {name} is not loaded",
            got=", ".join(self.networks) or "none",
            fix=f"build it: longtake engines --recipe {self.recipe.name}",
        )

    def allocate(self, binding: Binding, zero: bool = False, device: torch.device | None = None) -> Tensor:
        """A device tensor for a binding; a dynamic dimension gets its largest size."""
        largest = {name: sizes[2] for spec in self.specs.values() for name, sizes in spec.profile}
        shape = [largest[size] if isinstance(size, str) else size for size in binding.shape]
        make = torch.zeros if zero else torch.empty
        return make(shape, dtype=DTYPES[binding.dtype].torch, device=device or self.device)

    def _zeros_side_by_side(self, bindings: Sequence[Binding]) -> dict[str, Tensor]:
        """Tensors of zeros in one piece of memory: in pieces of their own, some 0.1 GB between them stays unused."""
        kinds = [TensorType(binding.dtype, binding.shape) for binding in bindings]
        memory = torch.zeros(sum(map(storage_bytes, kinds)), dtype=torch.uint8, device=self.device)
        pieces = memory.split([storage_bytes(kind) for kind in kinds])
        shapes = [tuple(map(int, kind.shape)) for kind in kinds]
        dtypes = [DTYPES[kind.dtype].torch for kind in kinds]
        return {
            binding.name: piece[: prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for binding, piece, shape, dtype in zip(bindings, pieces, shapes, dtypes, strict=True)
        }

    def has(self, network: str) -> bool:
        """See Backend.has. The VAE encoder is loaded when it is needed."""
        return network in self.networks or (network in ENCODER and set(ENCODER) <= set(networks_in(self.bundle)))

    def new_state(self, network: str) -> State:
        """See Backend.new_state."""
        if network in DECODER:
            return self._decoder_state()
        if network in ENCODER:
            return self._encoder_state()
        spec = self.specs[network]
        tensors = self._zeros_side_by_side([b for b in spec.inputs if b.name in spec.kept.values()])
        self.sizes["K/V cache"] = sum(tensor.nbytes for tensor in tensors.values())
        self.memory.add("a K/V cache", "K/V cache")
        return State(tensors)

    @torch.no_grad()
    def run(
        self, network: str, inputs: Mapping[str, Tensor], state: State | None = None, commit: bool = True
    ) -> Mapping[str, Tensor]:
        """See Backend.run."""
        if isinstance(state, StreamState):
            return state.run(network, inputs)
        if state is None:
            return self._run_once(network, inputs)
        if self.passes is None:
            raise self._not_loaded(network)
        with self.locks["denoise"].hold():
            return self.passes.run(inputs, state, commit)

    def _run_once(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a network that is called once a prompt and keeps nothing; new output tensors."""
        spec, network = self.specs[name], self.network(name)
        outputs = {binding.name: self.allocate(binding) for binding in spec.outputs}
        moved = {b.name: inputs[b.name].to(self.device, DTYPES[b.dtype].torch).contiguous() for b in spec.inputs}
        with self.locks["denoise"].hold():
            network.run({**moved, **outputs})
        return outputs

    def _decoder_state(self) -> StreamState:
        specs = self.specs[DECODER[0]], self.specs[DECODER[1]]
        networks = {spec.name: self.network(spec.name) for spec in specs}
        with torch.cuda.device(self.decode_device):
            state = StreamState(networks, specs, self._allocate_decode, self.locks["decode"], self._twice)
        self.sizes |= state.sizes()
        self.memory.add("a decoder", "VAE caches", "decode buffers")
        return state

    def _encoder_state(self) -> StreamState:
        networks = self.encoder_networks()
        with torch.cuda.device(self.device):
            specs = self.specs[ENCODER[0]], self.specs[ENCODER[1]]
            twice = frozenset(specs[1].kept.values())
            state = StreamState(networks, specs, self.allocate, StreamLock(self.device), twice)
        self.memory.add("a VAE encoder")
        return state

    def encoder_networks(self) -> dict[str, Network]:
        """The VAE encoder's networks, loaded anew: they are dropped with what was returned."""
        with torch.cuda.device(self.device):
            return self._prepared(ENCODER, self.device)

    def peak_bytes(self) -> int:
        """See Backend.peak_bytes; from the driver, in bytes: all is allocated at a few known points, noted there."""
        self.memory.add("running")
        return self.memory.peak

    def close(self) -> None:
        """See Backend.close."""
        if self.networks:
            for device in {self.device, self.decode_device}:
                torch.cuda.synchronize(device)
            self.networks.clear()
            self.passes = None  # its graphs and buffers
