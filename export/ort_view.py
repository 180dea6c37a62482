"""The view of an exported graph that ONNX Runtime's CPU kernels can run: the same nodes, other types.

FP4 initializers become FP8 (every E2M1 value is an E4M3 value), bf16 becomes fp32, DequantizeLinear and
TRT_FP4DynamicQuantize become plain arithmetic, and every function is inlined. Nothing is approximated beyond bf16's
roundings being left out. A cache write sits in an `If`, so that passes that write nothing don't quantize either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper, numpy_helper

from longtake.dtypes import DTYPES
from longtake.export.lower import ACTIVATION_DOMAIN, ACTIVATION_OP
from longtake.plugins.nvfp4.formats import E2M1_MAX, E4M3_MAX
from longtake.plugins.nvfp4.reference import BLOCK
from longtake.plugins.registry import op_named
from longtake.plugins.spec import DOMAIN

ONES, COLUMN = "view.ones", "view.column"
FLOAT, BF16, FP4, FP8 = TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN


def ort_view(model: onnx.ModelProto) -> onnx.ModelProto:
    """A new model with the same input and output names; bf16 bindings become fp32. Needs its weights loaded."""
    view = onnx.ModelProto()
    view.CopyFrom(model)
    graph = view.graph
    del graph.value_info[:]
    _replace(graph.initializer, (_fp8_from_fp4(t) if t.data_type == FP4 else t for t in graph.initializer))
    _replace(graph.node, (new for node in graph.node for new in _viewed(node)))
    if any(node.domain == ACTIVATION_DOMAIN for node in graph.node):
        opset = next(entry.version for entry in view.opset_import if entry.domain in ("", "ai.onnx"))
        view.functions.append(activation_function(opset))
    if any(ONES in node.input for node in graph.node):
        graph.initializer.append(numpy_helper.from_array(np.ones((1, BLOCK), np.float32), ONES))
        graph.initializer.append(numpy_helper.from_array(np.array([-1, 1], np.int64), COLUMN))
    view = onnx.inliner.inline_local_functions(view)
    _widen(view.graph)
    _replace(view.opset_import, [entry for entry in view.opset_import if entry.domain in ("", "ai.onnx")])
    return view


def _replace(field: Any, items: Iterable[Any]) -> None:
    """Set a repeated protobuf field."""
    kept = list(items)
    del field[:]
    field.extend(kept)


def _viewed(node: NodeProto) -> Iterator[NodeProto]:
    """The nodes that stand for `node` in the view."""
    if node.op_type == "DequantizeLinear":
        yield from _dequantize(node)
    elif node.domain == DOMAIN and "write_slot" in op_named(node.op_type).spec.names:
        yield from _guarded_write(node)
    else:
        yield node


def _dequantize(node: NodeProto) -> Iterator[NodeProto]:
    """fp32(x) * scale, the scale repeated over blocks of 16; constants are folded when a session is created."""
    x, scale, out = node.input[0], node.input[1], node.output[0]
    yield helper.make_node("Cast", [x], [f"{out}.x"], to=FLOAT)
    x = f"{out}.x"
    if any(a.name == "block_size" for a in node.attribute):
        yield from _repeated(scale, x, f"{out}.wide")
        scale = f"{out}.wide"
    yield helper.make_node("Mul", [x, scale], [out])


def _repeated(scale: str, like: str, out: str) -> Iterator[NodeProto]:
    """Each block scale 16 times, in the shape of `like`. A product with ones is several times faster than broadcasting."""
    yield helper.make_node("Reshape", [scale, COLUMN], [f"{out}.column"])
    yield helper.make_node("MatMul", [f"{out}.column", ONES], [f"{out}.rows"])
    yield helper.make_node("Shape", [like], [f"{out}.shape"])
    yield helper.make_node("Reshape", [f"{out}.rows", f"{out}.shape"], [out])


def _guarded_write(node: NodeProto) -> Iterator[NodeProto]:
    """If(write_slot >= 0): the write, else the cache unchanged."""
    spec = op_named(node.op_type).spec
    slot = node.input[[t.name for t in spec.inputs].index("write_slot")]
    write = NodeProto()
    write.CopyFrom(node)
    write.output[:] = [f"{name}.written" for name in node.output]
    keep = [helper.make_node("Identity", [node.input[i]], [f"{node.output[o]}.kept"]) for o, i in spec.aliases]
    branches = {}
    for branch, nodes in (("then", [write]), ("else", keep)):
        names = [name for node in nodes for name in node.output]
        outputs = [_typed(name, tensor.dtype) for name, tensor in zip(names, spec.outputs)]
        branches[f"{branch}_branch"] = helper.make_graph(nodes, branch, [], outputs)
    zero, condition = f"{node.output[0]}.zero", f"{node.output[0]}.writes"
    yield helper.make_node("Constant", [], [zero], value=numpy_helper.from_array(np.zeros(1, np.int32)))
    yield helper.make_node("GreaterOrEqual", [slot, zero], [condition])
    yield helper.make_node("If", [condition], list(node.output), **branches)


def _typed(name: str, dtype: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, FLOAT if dtype == "compute" else DTYPES[dtype].onnx, None)


def activation_function(opset: int) -> onnx.FunctionProto:
    """TRT_FP4DynamicQuantize(x fp32 [..., K], g fp32) -> (E2M1 values, E4M3 block scales), both carried as fp32.

    The codec's rule static_6 in the order modelopt, but for the scale of a block of zeros, which multiplies zeros.
    Rounding to E2M1 without comparisons: for |z| <= 6 the grid's step is half of the largest power of two that is
    <= max(|z|, 1). That power is |q - (1 - 2^-24) q| with q = (2^23 + 1) z (Rump 2009, "ultimately fast accurate
    summation", algorithm 3.5), and adding and subtracting 1.5 * 2^23 steps rounds to a multiple, ties to even.
    """
    nodes: list[NodeProto] = []

    def op(kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        out = out or f"t{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [out], **attributes))
        return out

    def constant(value: object, dtype: type = np.float32) -> str:
        return op("Constant", value=numpy_helper.from_array(np.array(value, dtype)))

    peak = op("ReduceMax", op("Reshape", op("Abs", "x"), constant([-1, BLOCK], np.int64)), constant([1], np.int64))
    raw = op("Clip", op("Div", peak, op("Mul", "g", constant(E2M1_MAX))), constant(2.0**-9), constant(E4M3_MAX))
    column = op("Cast", op("Cast", raw, to=FP8), to=FLOAT)
    step = op("MatMul", op("Mul", column, "g"), constant(np.ones((1, BLOCK))))
    z = op("Div", "x", op("Reshape", step, op("Shape", "x")))
    z = op("Clip", z, constant(-6.0), constant(6.0))
    q = op("Mul", z, constant(2.0**23 + 1))
    power = op("Clip", op("Abs", op("Sub", q, op("Mul", q, constant(1 - 2.0**-24)))), constant(1.0), constant(4.0))
    magic = op("Mul", power, constant(1.5 * 2.0**22))
    op("Sub", op("Add", z, magic), magic, out="values")
    leading = op("Slice", op("Shape", "x"), constant([0], np.int64), constant([-1], np.int64))
    op("Reshape", column, op("Concat", leading, constant([-1], np.int64), axis=0), out="scales")
    attributes = ["axis", "block_size", "scale_type"]
    imports = [helper.make_opsetid("", opset)]
    return helper.make_function(
        ACTIVATION_DOMAIN, ACTIVATION_OP, ["x", "g"], ["values", "scales"], nodes, imports, attributes
    )


def _fp8_from_fp4(tensor: TensorProto) -> TensorProto:
    """The same values as FLOAT8E4M3FN; raw FP4 data holds two codes a byte, the low nibble first."""
    codes = np.frombuffer(tensor.raw_data, np.uint8)
    codes = np.stack((codes & 15, codes >> 4), -1).reshape(-1)
    table = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(ml_dtypes.float8_e4m3fn)
    return helper.make_tensor(tensor.name, FP8, tensor.dims, table[codes].tobytes(), raw=True)


def _widen(graph: GraphProto) -> None:
    """bf16 to fp32 in initializers, bindings, constants, casts and subgraphs, in place."""
    del graph.value_info[:]
    _replace(graph.initializer, (_fp32(t) for t in graph.initializer))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == BF16:
            value.type.tensor_type.elem_type = FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            _widen_attribute(attribute)


def _widen_attribute(attribute: AttributeProto) -> None:
    if attribute.type == AttributeProto.GRAPH:
        _widen(attribute.g)
    elif attribute.type == AttributeProto.TENSOR:
        attribute.t.CopyFrom(_fp32(attribute.t))
    elif attribute.name in ("to", "dtype") and attribute.i == BF16:
        attribute.i = FLOAT


def _fp32(tensor: TensorProto) -> TensorProto:
    if tensor.data_type != BF16:
        return tensor
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
