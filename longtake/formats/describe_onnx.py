"""What is in an ONNX file: ops, custom ops, weights by type, bits per quantized weight, bindings, external data."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from longtake.dtypes import BY_ONNX
from longtake.errors import IntegrityError
from longtake.plugins.spec import DOMAIN


def onnx_from_file(path: Path) -> onnx.ModelProto:
    """Parse an ONNX file without its external data.

    Raises:
        IntegrityError: the bytes are not a whole ONNX model.
    """
    fix = "export it again (longtake export), or restore the file"
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise IntegrityError(
            f"{path} is not a whole ONNX file", got=str(error), expected="an ONNX model", fix=fix
        ) from None
    if not model.graph.output or not model.opset_import:
        raise IntegrityError(
            f"{path} is not a whole ONNX file", got="no graph outputs or no opset", expected="an ONNX model", fix=fix
        )
    return model


def describe_onnx(path: Path) -> dict[str, Any]:
    """Facts about the ONNX file at `path`, JSON-ready.

    Raises:
        IntegrityError: the file, or the external data it names, is missing or truncated.
    """
    model = onnx_from_file(path)
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
        "weights": weights_by_type(model),
        "quantized_weights": quantized_weights(model),
        "external_data": external_data(model, path),
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
    }


def _type_name(kind: int) -> str:
    return TensorProto.DataType.Name(kind)


def _binding(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return {"name": value.name, "type": _type_name(tensor.elem_type), "shape": shape}


def _elements(tensor: TensorProto) -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    return count


def tensor_bytes(tensor: TensorProto) -> int:
    """Bytes that `tensor` takes on disk (two 4-bit elements a byte)."""
    return BY_ONNX[tensor.data_type].bytes(_elements(tensor)) if tensor.data_type in BY_ONNX else 4 * _elements(tensor)


def weights_by_type(model: onnx.ModelProto) -> dict[str, dict[str, int]]:
    """{type: {tensors, elements, bytes}} over all initializers."""
    found: dict[str, dict[str, int]] = {}
    for tensor in model.graph.initializer:
        entry = found.setdefault(_type_name(tensor.data_type), {"tensors": 0, "elements": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["elements"] += _elements(tensor)
        entry["bytes"] += tensor_bytes(tensor)
    return found


def quantized_weights(model: onnx.ModelProto) -> dict[str, Any]:
    """Count, elements and bits per element (values and block scales) of the 4-bit weights.

    Two forms are known: DequantizeLinear over an FP4 initializer, and `longtake::nvfp4_dequantize` over packed bytes.
    """
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    count = elements = stored = 0
    for node in model.graph.node:
        pair = _fp4_pair(node, held, producers) or _packed_pair(node, held)
        if pair is None:
            continue
        values, scales, size = pair
        count, elements = count + 1, elements + size
        stored += tensor_bytes(values) + tensor_bytes(scales)
    bits = round(8 * stored / elements, 3) if elements else None
    return {"count": count, "elements": elements, "bytes": stored, "bits_per_weight": bits}


Pair = tuple[TensorProto, TensorProto, int]


def _fp4_pair(node: onnx.NodeProto, held: dict[str, TensorProto], producers: dict[str, onnx.NodeProto]) -> Pair | None:
    if node.op_type != "DequantizeLinear":
        return None
    values = held.get(node.input[0])
    if values is None or values.data_type != TensorProto.FLOAT4E2M1:
        return None
    scales = held.get(node.input[1])
    if scales is None and node.input[1] in producers:
        scales = held.get(producers[node.input[1]].input[0])
    return None if scales is None else (values, scales, _elements(values))


def _packed_pair(node: onnx.NodeProto, held: dict[str, TensorProto]) -> Pair | None:
    if (node.domain, node.op_type) != (DOMAIN, "nvfp4_dequantize"):
        return None
    values, scales = held.get(node.input[0]), held.get(node.input[1])
    return None if values is None or scales is None else (values, scales, 2 * _elements(values))


def external_data(model: onnx.ModelProto, path: Path) -> dict[str, int]:
    """{file name: bytes it holds}; raises IntegrityError when one is missing, too short, or outside the folder."""
    needed: dict[str, int] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entry = {pair.key: pair.value for pair in tensor.external_data}
        end = int(entry.get("offset", 0)) + int(entry.get("length", tensor_bytes(tensor)))
        needed[entry["location"]] = max(needed.get(entry["location"], 0), end)
    return {name: _external_size(path, name, end) for name, end in needed.items()}


def _external_size(path: Path, name: str, end: int) -> int:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise IntegrityError(f"{path} names weights outside its folder", got=name, expected="a file beside it")
    data = path.parent / name
    size = data.stat().st_size if data.is_file() else None
    if size is None or size < end:
        raise IntegrityError(
            f"the weights of {path.name} are missing or truncated",
            got=f"{data}: " + ("no such file" if size is None else f"{size} bytes"),
            expected=f"at least {end} bytes",
            fix="export it again (longtake export), or restore the file",
        )
    return size
