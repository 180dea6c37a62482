"""The segmented executor: on the CPU its wiring and memory reuse, on a GPU the whole backend against the reference."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engines_here import engines_of, on_engines
from onnx import numpy_helper
from torch import Tensor

from longtake.engines.segment import segments_from_onnx
from longtake.errors import LongtakeError
from longtake.formats.onnx_file import constants_of
from longtake.formats.segmented_graph import SegmentedGraph, Step
from longtake.runtime.backends.segments.arena import Piece, aliases_of, memory_layout, placed, storage_bytes
from longtake.runtime.backends.segments.network import SegmentedNetwork
from longtake.runtime.backends.trt.engine import Scratch, device_bytes_used
from longtake.runtime.video_model import VideoModel

_spec = importlib.util.spec_from_file_location("miniature", Path(__file__).parents[1] / "engines" / "miniature.py")
miniature = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(miniature)


class OnnxEngine:
    """Stands for a deserialised plan: runs the segment's ONNX on the CPU, writing into the tensors given."""

    scratch_bytes = 1000

    def __init__(self, model: Any) -> None:
        self.model = model

    def context(self, scratch: Scratch) -> OnnxEngine:
        self.scratch = scratch
        return self

    def keep_compiled_kernels(self) -> None: ...

    def run(self, tensors: Mapping[str, Tensor], memory: tuple[int, int] | None = None) -> None:
        """Overwrites all of the scratch it is given, before it reads and once it has written."""
        address, size = memory or (0, 0)
        assert size >= self.scratch_bytes
        offset = address - self.scratch.address
        assert 0 <= offset <= self.scratch.size - size
        self.scratch.memory[offset : offset + size] = 0xFF
        arrays = [tensors[value.name].numpy().copy() for value in self.model.graph.input]
        for value, result in zip(self.model.graph.output, miniature.run_segment_model(self.model, arrays)):
            tensors[value.name].copy_(torch.from_numpy(result))
        self.scratch.memory[offset : offset + size] = 0xFF


class CpuNetwork(SegmentedNetwork):
    """The executor with numpy stand-ins for the kernels; they write where the real ones would."""

    def _launcher(self, step: Step) -> Any:
        return SimpleNamespace(workspace_bytes=0)

    def _launch(self, index: int, step: Step, values: Mapping[str, Tensor]) -> None:
        results = miniature.fake_op(step.name, [values[name].numpy() for name in step.inputs])
        for name, result in zip(step.outputs, results):
            values[name].copy_(torch.from_numpy(result))


def network_of(model: Any, arena: Scratch | None = None) -> CpuNetwork:
    cut = segments_from_onnx(model, "dit")
    cpu = torch.device("cpu")
    host = SimpleNamespace(device=cpu, load=lambda name, spec, bundle: OnnxEngine(cut.models[name]))
    network = CpuNetwork(host, cut.graph, arena or Scratch(cpu))
    constants = constants_of(model)
    network.load_weights((n, torch.from_numpy(numpy_helper.to_array(constants[n]).copy())) for n in cut.graph.weights)
    network.prepare()
    return network


def tensors_for(layers: int) -> dict[str, Tensor]:
    tensors = {name: torch.from_numpy(value.copy()) for name, value in miniature.feeds_for(layers).items()}
    tensors |= {f"cache_{i}_out": tensors[f"cache_{i}"] for i in range(layers)}
    return tensors | {"velocity": torch.zeros(miniature.T, miniature.DIM)}


@pytest.mark.parametrize("packed", [False, True])
def test_running_cut_in_reused_memory_equals_the_whole_graph(packed: bool) -> None:
    model = miniature.model_of_layers(4, packed)
    whole = miniature.run_whole(model, miniature.feeds_for(4))
    network, tensors = network_of(model), tensors_for(4)
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    for _ in range(2):  # the second pass finds the first one's leftovers everywhere
        network.run(tensors)
        for name, value in whole.items():
            np.testing.assert_allclose(tensors[name].numpy(), value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert addresses == {name: tensor.data_ptr() for name, tensor in tensors.items()}


def test_a_pass_that_does_not_write_leaves_the_cache_alone() -> None:
    network, tensors = network_of(miniature.model_of_layers(2)), tensors_for(2)
    before = {name: tensor.clone() for name, tensor in tensors.items() if name.startswith("cache")}
    network.run(tensors, write=False)
    assert all(torch.equal(tensors[name], value) for name, value in before.items())
    assert tensors["velocity"].abs().sum() > 0


def alive_ranges(graph: SegmentedGraph, names: set[str]) -> dict[str, tuple[int, int]]:
    made = {name: i for i, step in enumerate(graph.steps) for name in step.outputs if name in names}
    read = {name: i for i, step in enumerate(graph.steps) for name in step.inputs if name in names}
    return {name: (first, read.get(name, first)) for name, first in made.items()}


@pytest.mark.parametrize("packed", [False, True])
def test_tensors_alive_together_never_overlap_and_depth_costs_no_memory(packed: bool) -> None:
    sizes = []
    for layers in (4, 12):
        graph = segments_from_onnx(miniature.model_of_layers(layers, packed), "dit").graph
        offsets, _, end = memory_layout(graph, {*graph.inputs, *graph.outputs, *graph.weights})
        alive = alive_ranges(graph, set(offsets))
        placed = {n: (offsets[n], offsets[n] + storage_bytes(graph.tensors[n])) for n in offsets}
        for one in placed:
            for other in placed:
                together = alive[one][0] <= alive[other][1] and alive[other][0] <= alive[one][1]
                overlap = placed[one][0] < placed[other][1] and placed[other][0] < placed[one][1]
                assert one == other or not (together and overlap), (one, other)
        sizes.append(end)
    assert sizes[0] == sizes[1]


def test_networks_that_take_turns_share_their_memory() -> None:
    cpu = torch.device("cpu")
    arena = Scratch(cpu)
    networks = [network_of(miniature.model_of_layers(layers), arena) for layers in (4, 2)]
    for layers, network in zip((4, 2), networks):
        tensors = tensors_for(layers)
        whole = miniature.run_whole(miniature.model_of_layers(layers), miniature.feeds_for(layers))
        network.run(tensors)
        assert np.allclose(tensors["velocity"].numpy(), whole["velocity"], rtol=1e-4, atol=1e-5)
    places = [network._fixed[name].data_ptr() for network in networks for name in network._offsets]
    assert all(arena.address <= place < arena.address + arena.size for place in places)


def test_weights_in_common_are_kept_once_and_only_if_equal() -> None:
    cpu = torch.device("cpu")
    cut = segments_from_onnx(miniature.model_of_layers(1), "dit")
    host, shared = SimpleNamespace(device=cpu, load=lambda name, spec, bundle: OnnxEngine(cut.models[name])), {}
    one, two = (CpuNetwork(host, cut.graph, Scratch(cpu), shared=shared) for _ in range(2))
    nan = torch.tensor([1.0, float("nan")])
    one.load_weights([("a", nan), ("b", torch.ones(2)), ("c", torch.tensor(1.0))])
    two.load_weights([("a", nan.clone()), ("b", torch.zeros(2)), ("c", torch.tensor(1.0))])
    assert [one._fixed[n] is two._fixed[n] for n in "abc"] == [True, False, True]


def test_a_large_piece_takes_the_place_of_small_ones_that_are_over() -> None:
    """In the order they come up, the last piece would find two gaps that are each too small."""
    pieces = [Piece("a", 100, 0, 1), Piece("kept", 50, 0, 3), Piece("b", 100, 0, 1), Piece("late", 200, 2, 3)]
    offsets, end = placed(pieces)
    assert end == 250 and offsets["late"] == 0
    assert placed([]) == ({}, 0)


def test_a_steps_scratch_is_beside_what_is_alive_then_and_nowhere_else() -> None:
    graph = segments_from_onnx(miniature.model_of_layers(2), "dit").graph
    given = {*graph.inputs, *graph.outputs, *graph.weights}
    plain = memory_layout(graph, given)[2]
    for i in range(len(graph.steps)):
        scratch = [1 << 20 if j == i else 0 for j in range(len(graph.steps))]
        offsets, places, end = memory_layout(graph, given, scratch)
        alive = alive_ranges(graph, set(offsets))
        for name, (first, last) in alive.items():
            start, stop = offsets[name], offsets[name] + storage_bytes(graph.tensors[name])
            assert not first <= i <= last or stop <= places[i] or start >= places[i] + scratch[i], name
        assert 1 << 20 <= end <= plain + (1 << 20)
    least = memory_layout(graph, given, [1 << 20] * len(graph.steps))[2]
    assert least < plain + (1 << 21)


def test_a_source_that_lacks_weights_is_named() -> None:
    network = network_of(miniature.model_of_layers(1))
    network._fixed.clear()
    with pytest.raises(LongtakeError, match="network dit lacks weights"):
        network.load_weights_from(lambda names: iter([(sorted(names)[0], torch.zeros(1))]))


def test_only_writes_are_in_place() -> None:
    graph = segments_from_onnx(miniature.model_of_layers(1), "dit").graph
    found = {step.name: aliases_of(step) for step in graph.steps}
    assert found["kv_cache_write_bf16"] == {"cache_0_out": "cache_0"}
    assert not any(aliases for name, aliases in found.items() if name != "kv_cache_write_bf16")


# ---- on a GPU: the whole backend against the reference -------------------------------------------------------------

RECIPES = ("tiny_w4a16_sm90", "tiny_bf16_sm90", "tiny_fp8_sm90")


@pytest.fixture(scope="module", params=RECIPES)
def pair(request: pytest.FixtureRequest) -> Any:
    """(segmented backend, oracle) of one recipe."""
    from longtake.runtime.backends.reference import ReferenceBackend
    from longtake.runtime.backends.trt.open import backend_from_engines

    segmented = backend_from_engines("segmented", engines_of(request.param), reason="test")
    yield segmented, ReferenceBackend(segmented.bundle.onnx, segmented.recipe)
    segmented.close()


def error(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.detach().float().cpu(), wanted.detach().float().cpu()
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-12))


def conditions(backend: Any, seed: int) -> dict[str, Tensor]:
    """latents, sinusoid, rope tables for one chunk, on the CPU."""
    from longtake.training.models.wan.rope import rope_tables, timestep_sinusoid

    preset = backend.preset
    generator = torch.Generator().manual_seed(seed)
    spec = {b.name: b.shape for b in backend.specs["dit"].inputs}
    latents = torch.randn(spec["latents"], generator=generator)
    sinusoid = timestep_sinusoid([624.0] * preset.chunk_latents, preset.dit.freq_dim)
    cos, sin = rope_tables(preset.dit, [float(8 * seed + i) for i in range(preset.chunk_latents)], preset.grid_hw)
    return {"latents": latents, "timestep_sinusoid": sinusoid, "rope_cos": cos, "rope_sin": sin}


def context_of(backend: Any) -> dict[str, Tensor]:
    tokens = torch.zeros(1, backend.preset.text.length, dtype=torch.int32)
    tokens[0, :6] = torch.arange(3, 9)
    model = VideoModel(backend)
    return dict(model.context(model.text(tokens.to(backend.device))))


def one_pass(backend: Any, cache: Any, seed: int, table: list[int], slot: int, context: dict[str, Tensor]) -> Tensor:
    inputs = {name: tensor.to(backend.device) for name, tensor in conditions(backend, seed).items()} | context
    inputs["table"] = torch.tensor(table, dtype=torch.int32, device=backend.device)
    inputs["write_slot"] = torch.tensor([slot], dtype=torch.int32)
    return backend.run("dit", inputs, cache, commit=slot >= 0)["velocity"].clone()


def layers_of(backend: Any, cache: Any) -> list[tuple[Tensor, ...]]:
    """Each layer's tensors of the state."""
    tensors = list(cache.tensors.values())
    size = len(tensors) // backend.preset.dit.layers
    return [tuple(tensors[i : i + size]) for i in range(0, len(tensors), size)]


def slot_values(backend: Any, parts: tuple[Tensor, ...], slot: int) -> Tensor:
    """K and V of a slot, dequantized, [2, L, H, D]."""
    from longtake.plugins.nvfp4.reference import Packed, dequantize

    if backend.recipe.cache == "bf16":
        return parts[0][slot].float().cpu()
    values, scales, amax = (part[slot].cpu() for part in parts)
    packed = Packed(values.view(torch.uint8), scales.view(torch.float8_e4m3fn), amax[:, None, None, None], "mse")
    return dequantize(packed, order="longlive")


@on_engines
@pytest.mark.parametrize("graphs", [True, False])
def test_windows_of_every_length_equal_the_reference(pair: Any, graphs: bool) -> None:
    """Four blocks: each is denoised (no write), then written, and read by the next ones."""
    segmented, reference = pair
    segmented.passes.cuda_graphs = graphs
    segmented.passes.graphs.clear()
    gate = segmented.recipe.gate.dit
    backends = (segmented, reference)
    contexts = [context_of(backend) for backend in backends]
    assert max(error(contexts[0][name], wanted) for name, wanted in contexts[1].items()) < segmented.recipe.gate.context
    caches = [backend.new_state("dit") for backend in backends]
    for block in range(5):
        table = [*range(min(block, 3)), -1]
        for slot in (-1, -1, min(block, 3)):
            before = [part.clone() for part in caches[0].tensors.values()]
            got, wanted = (one_pass(b, c, block, table, slot, x) for b, c, x in zip(backends, caches, contexts))
            assert error(got, wanted) < gate, (block, slot)
            if slot < 0:
                assert all(map(torch.equal, before, caches[0].tensors.values()))
        for mine, theirs in zip(*(layers_of(*pair) for pair in zip(backends, caches))):
            a, b = (slot_values(segmented, parts, min(block, 3)) for parts in (mine, theirs))
            assert error(a, b) < (gate if segmented.recipe.cache == "bf16" else 0.2)  # codes near a tie flip
    assert bool(segmented.passes.graphs) == graphs


@on_engines
def test_graph_replay_is_bit_identical_to_launching(pair: Any) -> None:
    segmented, _ = pair
    context, results = context_of(segmented), []
    for graphs in (False, True):
        segmented.passes.cuda_graphs = graphs
        segmented.passes.graphs.clear()
        cache = segmented.new_state("dit")
        passes = [one_pass(segmented, cache, i % 3, [0, -1], (-1, 0)[i % 2], context) for i in range(6)]
        results.append([*passes, *cache.tensors.values()])
        assert bool(segmented.passes.graphs) == graphs
    assert all(map(torch.equal, *results))


@on_engines
def test_decoding_equals_the_reference_and_can_be_resumed(pair: Any) -> None:
    segmented, reference = pair
    generator = torch.Generator().manual_seed(3)
    shape = (1, segmented.preset.vae.z_channels, *segmented.preset.latent_hw)
    latents = [torch.randn(shape, generator=generator) for _ in range(4)]
    mine, theirs, resumed = (VideoModel(backend).decoder() for backend in (segmented, reference, segmented))
    for i, latent in enumerate(latents):
        if i == 2:
            resumed.load_state([tensor.clone() for tensor in mine.state()])
        got = mine.decode(latent.to(segmented.device)).clone()
        assert error(got, theirs.decode(latent)) < segmented.recipe.gate.vae, i
        if i >= 2:
            assert torch.equal(resumed.decode(latent.to(segmented.device)), got)


@on_engines
def test_steady_loop_allocates_nothing_and_keeps_one_set_of_vae_caches(pair: Any) -> None:
    segmented, _ = pair
    segmented.passes.cuda_graphs = True
    cache, decoder = segmented.new_state("dit"), VideoModel(segmented).decoder()
    given = {name: tensor.to(segmented.device) for name, tensor in conditions(segmented, 1).items()}
    latent = given["latents"][:, :, 0].clone()
    given |= context_of(segmented) | {"write_slot": torch.tensor([2], dtype=torch.int32)}
    given["table"] = torch.tensor([0, 1, -1], dtype=torch.int32, device=segmented.device)

    def chunk() -> None:
        for commit in (False, True):
            segmented.run("dit", given, cache, commit)
        decoder.decode(latent)

    for _ in range(3):
        chunk()
    torch.cuda.synchronize()
    counted, used = torch.cuda.memory_stats()["allocation.all.allocated"], device_bytes_used(segmented.device)
    for _ in range(10):
        chunk()
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == counted
    assert device_bytes_used(segmented.device) == used
    if segmented.recipe.vae_ops == "library":  # our op writes them in place; a plan does where the trial shows it can
        assert not segmented._twice


@on_engines
def test_decoder_on_a_second_gpu(pair: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    from longtake.runtime.backends.trt.open import backend_from_engines

    one, _ = pair
    two = backend_from_engines("segmented", one.bundle.folder, reason="test", decode_device=torch.device("cuda:1"))
    latent = torch.randn(1, one.preset.vae.z_channels, *one.preset.latent_hw)
    decoders = VideoModel(one).decoder(), VideoModel(two).decoder()
    for _ in range(3):
        here, there = (d.decode(latent.to(b.decode_device)) for d, b in zip(decoders, (one, two)))
        assert there.device.index == 1 and error(there, here) < 1e-3
    two.close()


@on_engines
def test_weights_stay_four_bit_on_the_device(pair: Any) -> None:
    segmented, _ = pair
    if segmented.recipe.precision != "w4a16":
        pytest.skip("unquantized recipe")
    network = segmented.networks["dit"]
    linears = [n.removesuffix(".values") for n in network.graph.weights if n.endswith(".weight.values")]
    bits = sum(8 * network._fixed[f"{n}.{part}"].nbytes for n in linears for part in ("values", "scales"))
    assert bits / sum(2 * network._fixed[f"{n}.values"].numel() for n in linears) == 4.5


@on_engines
def test_a_second_start_finds_its_compiled_kernels(pair: Any) -> None:
    segmented, _ = pair
    host = segmented.networks["dit"].engines["dit_seg1"].host
    for path in (path for path in host.folder.glob("*.plan") if not path.stem.startswith("vae_encoder")):
        kept = host.caches.folder / f"{path.stem}.cache"
        assert kept.is_file() and kept.with_suffix(".json").is_file()


@on_engines
def test_every_step_is_profiled(pair: Any) -> None:
    """A cut network by CUDA events, a whole one through TensorRT's profiler, both in trtexec's format."""
    from longtake.runtime.profile.gpu import backend_profile

    segmented, _ = pair
    steps = segmented.networks["dit"].graph.steps
    for name in ("dit", "text_encoder", "vae_encoder_steady"):
        rows = backend_profile(segmented, name, 3)
        assert rows[0] == {"count": 3}
        assert sum(row["averageMs"] for row in rows[1:]) > 0
    assert len(backend_profile(segmented, "dit", 1)) == 1 + len(steps)
