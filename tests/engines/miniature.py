"""A transformer in miniature with the project's custom ops, and what it must compute: for tests of cutting and running."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from longtake.formats.onnx_file import constants_of
from longtake.plugins.spec import DOMAIN

T, H, D = 4, 2, 16
DIM = H * D


def model_of_layers(layers: int, packed: bool = False, seed: int = 0) -> onnx.ModelProto:
    """A transformer in miniature: shared conditioning, q/k/v, the ops of a layer, projection with a scale."""
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
        norms = [constant(f"norm_{n}{i}", rng.normal(size=DIM).astype("f4")) for n in "qk"]
        turned = [f"{n}{i}.turned" for n in "qk"]
        nodes.append(helper.make_node("qk_norm_rope", [q, k, *norms, "cos", "sin"], turned, domain=DOMAIN))
        q, k = turned
        outputs.append(node("kv_cache_write_bf16", [k, v, f"cache_{i}", "write_slot"], f"cache_{i}_out", DOMAIN))
        out = node("sink_attention_bf16", [q, k, v, outputs[-1], "table"], f"attended{i}", DOMAIN)
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
    inputs += [value(name, f32, [T, D // 2]) for name in ("cos", "sin")]
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
    if name == "qk_norm_rope":
        *blocks, cos, sin = inputs
        table = np.concatenate([cos, sin], axis=1)[:, None]
        return [x * weight.reshape(H, D) + table for x, weight in zip(blocks[:2], blocks[2:])]
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
    feeds |= {n: rng.normal(size=(T, D // 2)).astype("f4") for n in ("cos", "sin")}
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
