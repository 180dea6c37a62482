"""Cutting at the custom ops: the steps compute what the whole graph does, and equal layers share one plan."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from segment_steps import run_steps

from longtake.engines.segment import CutNetwork, segments_from_onnx
from longtake.errors import IntegrityError, LongtakeError
from longtake.formats.onnx_file import constants_of
from longtake.formats.segmented_graph import SegmentedGraph

_spec = importlib.util.spec_from_file_location("miniature", Path(__file__).with_name("miniature.py"))
miniature = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(miniature)
T, DIM = miniature.T, miniature.DIM
model_of_layers, fake_op = miniature.model_of_layers, miniature.fake_op
feeds_for, run_whole, run_segment_model = miniature.feeds_for, miniature.run_whole, miniature.run_segment_model


def run_cut(cut: CutNetwork, model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    constants = constants_of(model)
    weights = {name: numpy_helper.to_array(constants[name]) for name in cut.graph.weights}
    return run_steps(
        cut.graph, feeds, weights, lambda name, arrays: run_segment_model(cut.models[name], arrays), fake_op
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_steps_compute_what_the_whole_graph_does(layers: int, packed: bool) -> None:
    model = model_of_layers(layers, packed)
    whole, feeds = run_whole(model, feeds_for(layers)), feeds_for(layers)
    parts = run_cut(segments_from_onnx(model, "dit"), model, feeds)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("packed", [False, True])
def test_middle_layers_share_one_plan(packed: bool) -> None:
    graph = segments_from_onnx(model_of_layers(6, packed), "dit").graph
    calls = [step.name for step in graph.steps if step.kind == "segment"]
    assert calls == ["dit_seg0", *["dit_seg1"] * 5, "dit_seg2"]
    assert [s.name for s in graph.segments] == ["dit_seg0", "dit_seg1", "dit_seg2"]


def test_weights_are_inputs_and_plans_hold_only_equal_small_constants() -> None:
    model = model_of_layers(6)
    cut = segments_from_onnx(model, "dit")
    assert {"embed.w", "o3.w", "scale_3"} <= set(cut.graph.weights)
    assert all(len(t.raw_data) <= 1024 for m in cut.models.values() for t in m.graph.initializer)
    first, second = [s for s in cut.graph.steps if s.name == "dit_seg1"][:2]
    assert "scale_0" in first.inputs and "scale_1" in second.inputs


def test_ops_follow_each_other_and_take_their_weights_however_small() -> None:
    graph = segments_from_onnx(model_of_layers(3), "dit").graph
    ops = ["qk_norm_rope", "kv_cache_write_bf16", "sink_attention_bf16"]
    assert [s.name for s in graph.steps] == ["dit_seg0", *ops, "dit_seg1", *ops, "dit_seg1", *ops, "dit_seg2"]
    assert {"norm_q0", "norm_k2"} <= set(graph.weights)
    assert graph.tensors["q1.turned"] == graph.tensors["k1.turned"] == graph.tensors["k1"]


def test_packed_weights_stay_packed_until_just_before_their_segment() -> None:
    graph = segments_from_onnx(model_of_layers(3, packed=True), "dit").graph
    assert all(not name.endswith((".wide", ".fp")) for name in graph.weights)
    pending: set[str] = set()
    for step in graph.steps:
        if step.kind == "unpack":
            pending.add(step.outputs[0])
        elif step.kind == "segment":
            assert pending == {name for name in step.inputs if name.endswith(".wide")}
            pending.clear()


def test_what_one_layer_needs_is_computed_in_its_own_segment() -> None:
    graph = segments_from_onnx(model_of_layers(6), "dit").graph
    first = next(step for step in graph.steps if step.kind == "segment")
    assert not {"m3", "ctx3"} & set(first.outputs)


def test_json_round_trip(tmp_path) -> None:
    graph = segments_from_onnx(model_of_layers(2, packed=True), "dit").graph
    graph.write(tmp_path / "dit.segments.json")
    assert SegmentedGraph.read(tmp_path / "dit.segments.json") == graph
    (tmp_path / "dit.segments.json").write_text("{}")
    with pytest.raises(IntegrityError, match="is not a segmented network"):
        SegmentedGraph.read(tmp_path / "dit.segments.json")


def test_nested_subgraphs_are_refused() -> None:
    model = model_of_layers(1)
    inner = helper.make_graph([], "inner", [], [helper.make_tensor_value_info("p0", TensorProto.FLOAT, [T, DIM])])
    model.graph.node.append(helper.make_node("If", ["flag"], ["z"], then_branch=inner, else_branch=inner))
    with pytest.raises(LongtakeError, match="nested subgraphs"):
        segments_from_onnx(model, "dit")
