"""A rank on the segments of its own graph: `python segments_at_work.py RANK RANKS PORT FOLDER`. Not a test itself.

The real executor, its arena and its exchanges, over gloo on the CPU. ONNX Runtime stands for the plans and the references
for the kernels, all in fp32. FOLDER holds the export with the graph of one of RANKS; rank 0 writes what it found.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import torch
import torch.distributed as dist
from torch import Tensor

from longtake.accuracy.ort_session import session_from_view
from longtake.engines.segment import segments_from_onnx
from longtake.export.ort_view import ort_view
from longtake.formats.onnx_file import read_onnx, weights_from_onnx
from longtake.formats.recipe import recipe_named
from longtake.formats.segmented_graph import Step
from longtake.paths import REPOSITORY
from longtake.plugins.kv_cache_write.reference import quantize_kv
from longtake.plugins.registry import op_named
from longtake.runtime.backends.base import Backend, State
from longtake.runtime.backends.segments import planner
from longtake.runtime.backends.segments.exchanges import Exchanges
from longtake.runtime.backends.segments.network import SegmentedNetwork
from longtake.runtime.backends.segments.vae_first import FirstStep, first_steps
from longtake.runtime.backends.trt import graphs
from longtake.runtime.backends.trt.engine import Scratch
from longtake.runtime.backends.trt.graphs import Passes
from longtake.runtime.backends.trt.vae_stream import StreamState
from longtake.runtime.parallel.comm import LOOPBACK, Comm
from longtake.runtime.parallel.rank import EngineRank
from longtake.training.models.families import family_of
from longtake.training.models.load import load_models
from longtake.training.models.network_spec import Binding, rank_network
from longtake.training.models.presets import TINY

RECIPE = replace(recipe_named("tiny_w4a16_sm90"), vae_ops="library")
DECODER = ("vae_first", "vae_steady")
CPU = torch.device("cpu")
SLOT, TABLE = 2, [0, 1, -1]
WIDE = {"fp32": torch.float32, "bf16": torch.float32, "int32": torch.int32, "int8": torch.int8}


class OrtEngine:
    """Stands for a deserialised plan: ONNX Runtime on the view of a segment. Overwrites its scratch, as a plan may."""

    scratch_bytes = 1000

    def __init__(self, model: Any) -> None:
        view = ort_view(model)
        self.session = onnxruntime.InferenceSession(view.SerializeToString(), providers=["CPUExecutionProvider"])

    def context(self, scratch: Scratch) -> OrtEngine:
        self.scratch = scratch
        return self

    def keep_compiled_kernels(self) -> None: ...

    def run(self, tensors: Mapping[str, Tensor], memory: tuple[int, int]) -> None:
        start = memory[0] - self.scratch.address
        self.scratch.memory[start : start + memory[1]] = 0xFF
        feeds = {value.name: tensors[value.name].numpy().copy() for value in self.session.get_inputs()}
        names = [value.name for value in self.session.get_outputs()]
        for name, array in zip(names, self.session.run(names, feeds), strict=True):
            tensors[name].copy_(torch.from_numpy(array))


class OnHost(SegmentedNetwork):
    """The executor with references in place of kernels; they write where the real ones would."""

    def _launcher(self, step: Step) -> Any:
        return SimpleNamespace(workspace_bytes=0)

    def _launch(self, index: int, step: Step, values: Mapping[str, Tensor]) -> None:
        given, op = [values[name] for name in step.inputs], op_named(step.name)
        if op.over_heads:
            k, v, *_, slot = given
            assert self.exchanges is not None
            made = quantize_kv(torch.stack((k, v)), self.exchanges.comm.largest)
            for name, new in zip(step.outputs, made, strict=True):
                values[name][int(slot)].copy_(new)
            return
        results = op.reference(*given)
        for name, result in zip(step.outputs, (results,) if isinstance(results, Tensor) else results, strict=True):
            values[name].copy_(result)


class FirstOnHost(OnHost, FirstStep):
    """A stream's first step, by the steps of the later ones."""


def part_on_host(comm: Comm, folder: Path, network: str) -> OnHost:
    """A rank's part of a network. Its graph lies on the weights of the whole one."""
    part = rank_network(comm.world, network)
    cut = segments_from_onnx(read_onnx(folder / f"{part}.onnx", "small"), part)
    wide = {n: replace(t, dtype="fp32") if t.dtype == "bf16" else t for n, t in cut.graph.tensors.items()}
    host: Any = SimpleNamespace(device=CPU, load=lambda name, *_: OrtEngine(cut.models[name]))
    graph = replace(cut.graph, tensors=wide)
    made = OnHost(host, graph, Scratch(CPU), exchanges=Exchanges(comm))
    read = weights_from_onnx(folder / f"{network}.onnx", set(graph.weights))
    made.load_weights((n, t.float() if t.dtype == torch.bfloat16 else t) for n, t in read)
    return made


class OnCpu(Backend):
    """A rank's DiT and decoder as the TensorRT backend runs them: on static buffers, in place."""

    def __init__(self, comm: Comm, folder: Path) -> None:
        self.recipe, self.preset, self.device, family = RECIPE, TINY, CPU, family_of(TINY)
        parts = {name: rank_network(comm.world, name) for name in ("dit", *DECODER)}
        self.specs = self.specs | {
            name: replace(family.spec(TINY, RECIPE, part), name=name) for name, part in parts.items()
        }
        dit, steady = part_on_host(comm, folder, "dit"), part_on_host(comm, folder, "vae_steady")
        dit.prepare()
        self.passes = Passes(dit, self.specs["dit"], self.allocate, CPU, cuda_graphs=False, captured=lambda: None)
        first = first_steps(steady.exported)
        assert first is not None
        self.decoder = {"vae_steady": steady, "vae_first": FirstOnHost(steady, first)}
        for network in self.decoder.values():
            network.prepare()

    def allocate(self, binding: Binding) -> Tensor:
        sizes = [TINY.window_chunks if isinstance(n, str) else n for n in binding.shape]
        return torch.zeros(sizes, dtype=WIDE[binding.dtype])

    def has(self, network: str) -> bool:
        return network == "dit"

    def new_state(self, network: str) -> State:
        if network in DECODER:
            lock: Any = SimpleNamespace(hold=nullcontext)
            specs = self.specs[DECODER[0]], self.specs[DECODER[1]]
            return StreamState(self.decoder, specs, self.allocate, lock, frozenset())
        spec = self.specs[network]
        return State({b.name: self.allocate(b) for b in spec.inputs if b.name in spec.kept.values()})

    def run(self, network: str, inputs: Any, state: State | None = None, commit: bool = True) -> dict[str, Tensor]:
        assert state is not None
        if isinstance(state, StreamState):
            return state.run(network, inputs)
        return self.passes.run(inputs, state, commit)

    def peak_bytes(self) -> int:
        return 0


def whole_inputs() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A pass's inputs and its cache, the same on every rank."""
    generator, family = torch.Generator().manual_seed(3), family_of(TINY)
    spec = family.spec(TINY, RECIPE, "dit")
    kept = {name for name in spec.kept.values()}
    inputs = {
        b.name: torch.randn([int(n) for n in b.shape], generator=generator)
        for b in spec.inputs
        if b.name not in kept and b.dtype != "int32"
    }
    inputs |= family.chunk_inputs(TINY, 4, 1) | family.pass_inputs(TINY, TINY.chunk_latents, 500.0, 1)
    inputs |= {"table": torch.tensor(TABLE, dtype=torch.int32), "write_slot": torch.tensor([SLOT], dtype=torch.int32)}
    dit, cache = TINY.dit, {}
    for layer in range(dit.layers):
        blocks = torch.randn(TINY.window_chunks, 2, TINY.chunk_tokens, dit.heads, dit.head_dim, generator=generator)
        parts = zip(*(quantize_kv(block) for block in blocks))
        cache |= {f"{n}_{layer}": torch.stack(p) for n, p in zip(("values", "scales", "amax"), parts, strict=True)}
    return inputs, cache


def found_beside_one(own: EngineRank, folder: Path) -> dict[str, float]:
    """A pass that only reads and one that writes, beside the whole network in ONNX Runtime."""
    inputs, cache = whole_inputs()
    state, found = own.new_state("dit"), {}
    own.load("dit", state, cache if own.comm.rank == 0 else None)
    made = {commit: own.run("dit", inputs, state, commit)["velocity"].clone() for commit in (False, True)}
    after = own.whole("dit", state)
    if own.comm.rank:
        return {}
    session = session_from_view(folder / "dit.ort.onnx")
    feeds = {n: t.numpy() for n, t in {**inputs, **cache}.items()}
    names = [output.name for output in session.get_outputs()]
    one = dict(zip(names, map(torch.from_numpy, session.run(names, feeds)), strict=True))
    for commit, velocity in made.items():
        found[f"velocity, commit {commit}"] = float((velocity - one["velocity"]).norm() / one["velocity"].norm())
    for what in ("values", "scales"):
        pairs = [(after[n], one[f"{n}_out"]) for n in after if what in n]
        found[f"codes {what}"] = sum(int((a == b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
    apart = [(after[n] - one[f"{n}_out"]).abs().max() / one[f"{n}_out"].abs().max() for n in after if "amax" in n]
    found["amax"] = float(torch.stack(apart).max())
    found["written"] = float((after["values_0"][SLOT] != cache["values_0"][SLOT]).float().mean())
    found["elsewhere"] = float((after["values_0"][0] != cache["values_0"][0]).float().mean())
    return found


def decoded_beside_one(own: EngineRank) -> dict[str, float]:
    """Three latents of a stream, beside PyTorch's; the histories in the end, and the next latent after those were read back."""
    models, found = load_models(TINY, REPOSITORY / TINY.checkpoints), dict[str, float]()
    one = {name: family_of(TINY).module(models, RECIPE, name) for name in DECODER}
    latents = torch.randn(4, 1, TINY.vae.z_channels, 1, *TINY.latent_hw, generator=torch.Generator().manual_seed(2))
    state, caches = own.new_state("vae_steady"), ()
    for i, latent in enumerate(latents):
        name = DECODER[min(i, 1)]
        frames = own.run(name, {"latent": latent}, state)["frames"]
        wanted, *caches = one[name](latent, *caches)
        if own.comm.rank == 0:
            found[f"frames {i}"] = float((frames - wanted).abs().max()) / 2 * 255  # of [-1, 1]
        if i == 2:
            whole = own.whole("vae_steady", state)
            pairs = zip(whole.values(), caches, strict=True)
            if own.comm.rank == 0:
                found["histories"] = max(float((a - b).norm() / b.norm().clamp(min=1e-9)) for a, b in pairs)
            state = own.new_state("vae_steady")
            own.load("vae_steady", state, whole if own.comm.rank == 0 else None)
    found["rows"] = next(iter(state.tensors.values())).shape[1]
    return found


@torch.no_grad()
def main(rank: int, ranks: int, port: int, folder: Path) -> None:
    graphs.acquire_stream = lambda device, owner: None  # type: ignore[assignment]  # there is no GPU
    comm = Comm(rank, ranks, CPU, 100.0)
    comm.join(dist.TCPStore(LOOPBACK, port, ranks, is_master=rank == 0))
    planner.STREAMS = (*planner.STREAMS, "fp32")  # type: ignore[assignment]  # so that steps are split as in bf16
    own = EngineRank(OnCpu(comm, folder), comm)
    found = found_beside_one(own, folder) | decoded_beside_one(own)
    if rank == 0:
        (folder / f"result_{ranks}.json").write_text(json.dumps(found, indent=1))
    comm.leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
