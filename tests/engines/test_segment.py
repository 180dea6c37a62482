"""Cutting at the custom ops: the steps compute what the whole graph does, and equal layers share one plan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from longtake.engines import segmented_graph
from longtake.engines.segment import CutNetwork, constants_of, segments_from_onnx
from longtake.engines.segmented_graph import run_steps
from longtake.plugins.spec import DOMAIN
from longtake.runtime.errors import IntegrityError, LongtakeError

T, H, D = 4, 2, 16
DIM = H * D


def model_of_layers(layers: int, packed: bool = False, seed: int = 0) -> onnx.ModelProto:
    """A transformer in miniature: shared conditioning, q/k/v, cache write and attention, projection with a scale."""
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    constants: list[TensorProto] = []
    wide: list[onnx.ValueInfoProto] = []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(value, name))
        return name

    def node(op: str, inputs: list[str], output: str, domain: str = "", **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=f"node_{output}", domain=domain, **attributes))
        return output

    def weight(name: str) -> str:
        value = rng.normal(size=(DIM, DIM)).astype(np.float32) / 8
        if not packed:
            return constant(name, value)
        values = constant(f"{name}.values", rng.integers(-128, 127, (DIM, DIM), dtype=np.int8))
        scales = constant(f"{name}.scales", rng.integers(40, 60, (DIM, 2 * DIM // 16), dtype=np.int8))
        unpacked = node("nvfp4_dequantize", [values, scales], f"{name}.wide", DOMAIN)
        wide.append(helper.make_tensor_value_info(unpacked, TensorProto.FLOAT, [DIM, 2 * DIM]))  # bf16 where it is real
        sliced = node("Slice", [unpacked, constant(f"{name}.s", np.array([0])), constant(f"{name}.e", np.array([DIM])),
                                constant(f"{name}.a", np.array([1]))], f"{name}.fp")  # fmt: skip
        return node("Cast", [sliced], f"{name}.c", to=TensorProto.FLOAT)

    shape = constant("heads_shape", np.array([T, H, D], dtype=np.int64))
    flat = constant("flat_shape", np.array([T, DIM], dtype=np.int64))
    condition = node("MatMul", ["time", weight("time.w")], "condition")
    x = node("MatMul", ["latent", weight("embed.w")], "x_0")
    outputs = []
    for i in range(layers):
        modulated = node(
            "Add", [condition, constant(f"modulation_{i}", rng.normal(size=(1, DIM)).astype("f4"))], f"m{i}"
        )
        hidden = node("Mul", [x, modulated], f"h{i}")
        q, k, v = (
            node("Reshape", [node("MatMul", [hidden, weight(f"{n}{i}.w")], f"{n}{i}.flat"), shape], f"{n}{i}")
            for n in "qkv"
        )
        outputs.append(node("kv_cache_write_bf16", [k, v, f"cache_{i}", "write_slot"], f"cache_{i}_out", DOMAIN))
        out = node("sink_attention_bf16", [q, k, v, f"cache_{i}", "table"], f"attended{i}", DOMAIN)
        mixed = node("MatMul", [node("Reshape", [out, flat], f"a{i}"), weight(f"o{i}.w")], f"p{i}")
        scale = constant(f"scale_{i}", np.array(0.5 + 0.1 * i, dtype=np.float32))
        gated = node("Mul", [node("Mul", [mixed, scale], f"ps{i}"), modulated], f"g{i}")
        context = node("Split", [f"context_{i}"], f"ctx{i}", num_outputs=1, axis=0)
        x = node("Add", [node("Add", [x, gated], f"r{i}"), context], f"x_{i + 1}")
    node("MatMul", [x, weight("head.w")], "velocity")
    f32, i32 = TensorProto.FLOAT, TensorProto.INT32
    value = helper.make_tensor_value_info
    inputs = [value(n, f32, [T, DIM]) for n in ("latent", "time", *(f"context_{i}" for i in range(layers)))]
    inputs += [value(f"cache_{i}", f32, [4, 2, T, H, D]) for i in range(layers)]
    inputs += [value("table", i32, ["W"]), value("write_slot", i32, [1])]
    caches = [value(name, f32, [4, 2, T, H, D]) for name in outputs]
    graph = helper.make_graph(
        nodes, "g", inputs, [value("velocity", f32, [T, DIM]), *caches], constants, value_info=wide
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def fake_op(name: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Stand-ins that depend on every input."""
    if name == "nvfp4_dequantize":
        values, scales = (a.astype(np.float32) for a in inputs)
        return [np.repeat(values, 2, axis=1) * np.repeat(scales, 16, axis=1)[:, : 2 * values.shape[1]] / 4e4]
    if name == "kv_cache_write_bf16":
        k, v, cache, slot = inputs
        written = cache.copy()
        if slot[0] >= 0:
            written[slot[0]] = np.stack([k, v])
        return [written]
    q, k, v, cache, table = inputs
    keys = np.concatenate([k if s < 0 else cache[s, 0] for s in table])
    values = np.concatenate([v if s < 0 else cache[s, 1] for s in table])
    logits = np.einsum("qhd,khd->hqk", q, keys) / np.sqrt(D)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return [np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), values).astype(np.float32)]


def feeds_for(layers: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    feeds = {
        n: rng.normal(size=(T, DIM)).astype("f4") for n in ("latent", "time", *(f"context_{i}" for i in range(layers)))
    }
    feeds |= {f"cache_{i}": rng.normal(size=(4, 2, T, H, D)).astype("f4") for i in range(layers)}
    return feeds | {"table": np.array([0, 2, -1], np.int32), "write_slot": np.array([3], np.int32)}


def run_whole(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Node by node through onnxruntime, with `fake_op` at the custom ops: no cutting involved."""
    values: dict[str, np.ndarray] = {n: numpy_helper.to_array(t) for n, t in constants_of(model).items()} | feeds
    for node in model.graph.node:
        arrays = [values[name] for name in node.input]
        if node.domain == DOMAIN:
            results = fake_op(node.op_type, arrays)
        else:
            results = run_segment_model(single(node, arrays), arrays)
        values |= zip(node.output, results, strict=True)
    return {v.name: values[v.name] for v in model.graph.output}


def single(node: onnx.NodeProto, arrays: list[np.ndarray]) -> onnx.ModelProto:
    kinds = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in zip(node.input, arrays)
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    graph = helper.make_graph([node], "one", kinds, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def run_segment_model(model: onnx.ModelProto, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {v.name: a for v, a in zip(model.graph.input, arrays, strict=True)}))


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
    segmented_graph.save(graph, tmp_path / "dit.segments.json")
    assert segmented_graph.load(tmp_path / "dit.segments.json") == graph
    (tmp_path / "dit.segments.json").write_text("{}")
    with pytest.raises(IntegrityError, match="does not describe a segmented network"):
        segmented_graph.load(tmp_path / "dit.segments.json")


def test_nested_subgraphs_are_refused() -> None:
    model = model_of_layers(1)
    inner = helper.make_graph([], "inner", [], [helper.make_tensor_value_info("p0", TensorProto.FLOAT, [T, DIM])])
    model.graph.node.append(helper.make_node("If", ["flag"], ["z"], then_branch=inner, else_branch=inner))
    with pytest.raises(LongtakeError, match="nested subgraphs"):
        segments_from_onnx(model, "dit")
