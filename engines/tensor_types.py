"""The dtype and shape of every tensor of an ONNX graph, and how they stand in one."""

from __future__ import annotations

import math
from collections.abc import Iterable

import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from longtake.dtypes import BY_ONNX, DTYPES
from longtake.errors import LongtakeError
from longtake.formats.segmented_graph import TensorType
from longtake.plugins import exchange
from longtake.plugins.registry import all_ops, op_named
from longtake.plugins.shapes import infer_dtype, infer_shape
from longtake.plugins.spec import DOMAIN


def _type_from(info: ValueInfoProto) -> TensorType | None:
    tensor = info.type.tensor_type
    if tensor.elem_type not in BY_ONNX or not tensor.HasField("shape"):
        return None
    dims = tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or "?") for d in tensor.shape.dim)
    return TensorType(BY_ONNX[tensor.elem_type].name, dims)


def tensor_types(model: onnx.ModelProto, constants: dict[str, TensorProto]) -> dict[str, TensorType]:
    """Types from the file's value_info; what is missing there comes from shape inference, op by op."""
    types = {name: TensorType(BY_ONNX[t.data_type].name, tuple(t.dims)) for name, t in constants.items()}
    graph = model.graph
    infos = (*graph.value_info, *graph.input, *graph.output)
    types |= {info.name: kind for info in infos if (kind := _type_from(info))}
    outputs = {o for node in graph.node for o in node.output if o}
    while outputs - types.keys():
        before = len(types)
        _infer_custom_ops(graph.node, types)
        _infer_standard_ops(model, types)
        if len(types) == before:
            break
    return types


def _infer_custom_ops(nodes: Iterable[NodeProto], types: dict[str, TensorType]) -> None:
    """An op's output has the type of the input that it is written over, or else what its spec says, if that is known."""
    for node in nodes:
        if node.domain == exchange.DOMAIN:
            _infer_exchange(node, types)
        if node.domain != DOMAIN or node.op_type not in all_ops() or node.input[0] not in types:
            continue
        spec = op_named(node.op_type).spec
        aliases = dict(spec.aliases)
        inputs = [types.get(name) for name in node.input]
        for i, output in enumerate(node.output):
            source = inputs[aliases[i]] if i in aliases else None
            if source is None and i not in aliases:
                shape = infer_shape(spec, i, [kind.shape if kind else None for kind in inputs])
                if None not in shape:
                    source = TensorType(
                        infer_dtype(spec, i, [kind.dtype if kind else "bf16" for kind in inputs]), shape
                    )
            if source is not None:
                types.setdefault(output, source)


def _infer_exchange(node: NodeProto, types: dict[str, TensorType]) -> None:
    numbers = {attribute.name: attribute.i for attribute in node.attribute}
    for name, output in zip(node.input, node.output, strict=True):
        if (kind := types.get(name)) and output not in types:
            shape = exchange.exchanged_shape(node.op_type, [int(size) for size in kind.shape], **numbers)
            types[output] = TensorType(kind.dtype, shape)


def _infer_standard_ops(model: onnx.ModelProto, types: dict[str, TensorType]) -> None:
    known = {info.name for info in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.value_info.extend(
        helper.make_tensor_value_info(name, DTYPES[kind.dtype].onnx, kind.shape)
        for name, kind in types.items()
        if name not in known
    )
    for info in onnx.shape_inference.infer_shapes(copy, data_prop=True).graph.value_info:
        kind = _type_from(info)
        if kind and info.name not in types:
            types[info.name] = kind


def bytes_of(kind: TensorType) -> int:
    """Bytes of a tensor; an unknown size counts as 1."""
    return DTYPES[kind.dtype].bytes(math.prod(size for size in kind.shape if isinstance(size, int)))


def value_info(name: str, kind: TensorType) -> ValueInfoProto:
    """A segment's input or output. Raises LongtakeError for a dynamic shape."""
    if any(not isinstance(size, int) for size in kind.shape):
        raise LongtakeError("a segment input or output has a dynamic shape", got=f"{name} {kind.shape}")
    return helper.make_tensor_value_info(name, DTYPES[kind.dtype].onnx, kind.shape)
