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
from onnx import numpy_helper
from torch import Tensor

from longtake.engines.segment import constants_of, segments_from_onnx
from longtake.engines.segmented_graph import SegmentedGraph, Step
from longtake.runtime.backends.segmented_network import SegmentedNetwork, aliases_of, arena_layout, storage_bytes
from longtake.runtime.backends.trt_engine import Scratch

_spec = importlib.util.spec_from_file_location("miniature", Path(__file__).parents[1] / "engines" / "miniature.py")
miniature = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(miniature)


class OnnxEngine:
    """Stands for a deserialised plan: runs the segment's ONNX on the CPU, writing into the tensors given."""

    scratch_bytes = 1000

    def __init__(self, model: Any) -> None:
        self.model = model

    def context(self, scratch: Scratch) -> OnnxEngine:
        assert scratch.size >= self.scratch_bytes
        return self

    def keep_compiled_kernels(self) -> None: ...

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        arrays = [tensors[value.name].numpy().copy() for value in self.model.graph.input]
        for value, result in zip(self.model.graph.output, miniature.run_segment_model(self.model, arrays)):
            tensors[value.name].copy_(torch.from_numpy(result))


class CpuNetwork(SegmentedNetwork):
    """The executor with numpy stand-ins for the kernels; they write where the real ones would."""

    def _launcher(self, step: Step) -> Any:
        return SimpleNamespace(workspace_bytes=0)

    def _launch(self, index: int, step: Step, values: Mapping[str, Tensor]) -> None:
        results = miniature.fake_op(step.name, [values[name].numpy() for name in step.inputs])
        for name, result in zip(step.outputs, results):
            values[name].copy_(torch.from_numpy(result))


def network_of(model: Any) -> CpuNetwork:
    cut = segments_from_onnx(model, "dit")
    cpu = torch.device("cpu")
    host = SimpleNamespace(device=cpu, load=lambda name, spec: OnnxEngine(cut.models[name]))
    network = CpuNetwork(host, cut.graph, Scratch(cpu))
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
        offsets, end = arena_layout(graph, {*graph.inputs, *graph.outputs, *graph.weights})
        alive = alive_ranges(graph, set(offsets))
        placed = {n: (offsets[n], offsets[n] + storage_bytes(graph.tensors[n])) for n in offsets}
        for one in placed:
            for other in placed:
                together = alive[one][0] <= alive[other][1] and alive[other][0] <= alive[one][1]
                overlap = placed[one][0] < placed[other][1] and placed[other][0] < placed[one][1]
                assert one == other or not (together and overlap), (one, other)
        sizes.append(end)
    assert sizes[0] == sizes[1]


def test_only_writes_are_in_place() -> None:
    graph = segments_from_onnx(miniature.model_of_layers(1), "dit").graph
    found = {step.name: aliases_of(step) for step in graph.steps}
    assert found["kv_cache_write_bf16"] == {"cache_0_out": "cache_0"}
    assert not any(aliases for name, aliases in found.items() if name != "kv_cache_write_bf16")
