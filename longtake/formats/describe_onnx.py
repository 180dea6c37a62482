"""What is in an ONNX file: ops, custom ops, weights by type, bits per quantized weight, bindings, external data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from longtake.formats.onnx_file import data_sizes, read_onnx, readable, tensor_bytes, tensor_elements
from longtake.plugins.registry import all_ops
from longtake.plugins.spec import DOMAIN


def describe_onnx(path: Path) -> dict[str, Any]:
    """Facts about the ONNX file at `path`, JSON-ready.

    Raises:
        IntegrityError: the file, or the external data it names, is missing or truncated.
    """
    model = read_onnx(path, "none")
    with readable(path):
        return _facts(model, path)


def _facts(model: onnx.ModelProto, path: Path) -> dict[str, Any]:
    graph = model.graph
    ops = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.node)
    bodies = {f"{body.domain}::{body.name}" for body in model.functions}
    return {
        "kind": "ONNX model",
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "inputs": [_binding(value) for value in graph.input],
        "outputs": [_binding(value) for value in graph.output],
        "ops": dict(ops.most_common()),
        "custom_ops": {
            name: {"nodes": count, "function_body": name in bodies} for name, count in ops.items() if "::" in name
        },
        "weights": weights_by_type(
            (_type_name(t.data_type), tensor_elements(t), tensor_bytes(t)) for t in graph.initializer
        ),
        "quantized_weights": quantized_weights(model),
        "external_data": data_sizes(model, path),
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
    }


def _type_name(kind: int) -> str:
    return TensorProto.DataType.Name(kind)


def _binding(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return {"name": value.name, "type": _type_name(tensor.elem_type), "shape": shape}


def weights_by_type(weights: Iterable[tuple[str, int, int]]) -> dict[str, dict[str, int]]:
    """{type: {tensors, elements, bytes}} of tensors' types, elements and bytes."""
    rows: dict[str, dict[str, int]] = {}
    for kind, elements, size in weights:
        row = rows.setdefault(kind, {"tensors": 0, "elements": 0, "bytes": 0})
        row["tensors"] += 1
        row["elements"] += elements
        row["bytes"] += size
    return rows


def quantized_weights(model: onnx.ModelProto) -> dict[str, Any]:
    """Count, elements and bits per element (values and block scales) of the 4-bit weights.

    Two forms are known: DequantizeLinear over an FP4 initializer, and `longtake::nvfp4_dequantize` over packed bytes.
    """
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    count = elements = stored = 0
    for node in model.graph.node:
        if parts := _packed_parts(node, held, producers):
            values, scales, size = parts
            count, elements = count + 1, elements + size
            stored += tensor_bytes(values) + tensor_bytes(scales)
    bits = round(8 * stored / elements, 3) if elements else None
    return {"count": count, "elements": elements, "bytes": stored, "bits_per_weight": bits}


def _packed_parts(
    node: onnx.NodeProto, held: dict[str, TensorProto], producers: dict[str, onnx.NodeProto]
) -> tuple[TensorProto, TensorProto, int] | None:
    """Values, block scales and elements of the 4-bit weight that a node unpacks."""
    op = all_ops().get(node.op_type) if node.domain == DOMAIN else None
    if node.op_type != "DequantizeLinear" and not (op and op.unpacks_weight):
        return None
    values, scales = held.get(node.input[0]), held.get(node.input[1])
    if op is None and values is not None and values.data_type != TensorProto.FLOAT4E2M1:
        return None
    if scales is None and node.input[1] in producers:  # themselves dequantized
        scales = held.get(producers[node.input[1]].input[0])
    return None if values is None or scales is None else (values, scales, (2 if op else 1) * tensor_elements(values))
