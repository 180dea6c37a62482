"""Bindings of video tensors in the layout that convolutions compute in, so that no plan transposes them.

Between segments a stream lies channels last, [T, Y, X, C], and a convolution is written on [1, C, T, Y, X]: the exported
graph transposes on the way in and out. TensorRT takes that literally: each such plan holds a second copy of what it reads
and writes, and moves it. A binding [1, C, T, Y, X] in format DHWC8 is the same bytes (C is a multiple of 8), and the
transposes are gone: of the decoder's convolution 512 -> 256 at 352x640, 1.86 GB of scratch become 0.02 GB.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from longtake.formats.segmented_graph import SegmentedGraph
from longtake.plugins.registry import op_named

INWARD, OUTWARD = [3, 0, 1, 2], [1, 2, 3, 0]  # [T, Y, X, C] to [C, T, Y, X], and back
PACKED = 8  # channels; FORMAT pads to a multiple of it
FORMAT = "DHWC8"


def inner_videos(graph: SegmentedGraph, segment: str) -> set[str]:
    """Bindings of a segment that hold [1, C, T, Y, X] and that only segments see: their layout is ours to choose."""
    if not any(op_named(step.name).extends_stream for step in graph.steps if step.kind == "op"):
        return set()
    seen = {*graph.inputs, *graph.outputs, *graph.weights}
    seen |= {n for s in graph.steps if s.kind != "segment" for n in (*s.inputs, *s.outputs)}
    plan = graph.segment(segment)
    uses = [(*s.inputs, *s.outputs) for s in graph.steps if s.kind == "segment" and s.name == segment]
    bindings = (*plan.inputs, *plan.outputs)
    return {
        binding
        for i, binding in enumerate(bindings)
        if _fits(plan.types[binding].dtype, plan.types[binding].shape) and not any(use[i] in seen for use in uses)
    }


def _fits(dtype: str, shape: tuple[int | str, ...]) -> bool:
    return dtype == "bf16" and len(shape) == 5 and shape[0] == 1 and int(shape[1]) % PACKED == 0


def with_channels_last(model: onnx.ModelProto, inner: Collection[str] = ()) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The segment with its transposes at bindings batched out, and the names of all bindings that now need FORMAT.

    Args:
        inner: bindings that are [1, C, T, Y, X] already (see `inner_videos`).
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    rewriting = _Rewriting(copy)
    inputs = [value.name for value in copy.graph.input if rewriting.open_input(value)]
    outputs = [value.name for value in copy.graph.output if rewriting.open_output(value)]
    return copy, (*inputs, *outputs, *sorted(inner))


class _Rewriting:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.constants = {t.name: t for t in model.graph.initializer}
        self.outputs = {value.name for value in model.graph.output}

    def open_input(self, value: ValueInfoProto) -> bool:
        """Feed [1, C, T, Y, X] where every reader of [T, Y, X, C] makes just that of it. False: it is left alone."""
        if not _is_stream(value):
            return False
        ways = [self._way_in(node) for node in self._readers(value.name)]
        if not ways or any(way is None for way in ways):
            return False
        for transpose, unsqueeze in (way for way in ways if way is not None):
            place, video = list(self.graph.node).index(unsqueeze), unsqueeze.output[0]
            self.graph.node.remove(unsqueeze)
            if video in self.outputs:
                kept = helper.make_node("Identity", [value.name], [video], name=unsqueeze.name)
                self.graph.node.insert(place, kept)
            for node in self._readers(video) if video not in self.outputs else ():
                node.input[:] = [value.name if name == video else name for name in node.input]
            if not self._readers(transpose.output[0]):
                self.graph.node.remove(transpose)
        _reshape(value)
        return True

    def open_output(self, value: ValueInfoProto) -> bool:
        """Give out the [1, C, T, Y, X] that [T, Y, X, C] was made of. False: it was made otherwise."""
        transpose = self._maker(value.name)
        if not _is_stream(value) or not _turns(transpose, OUTWARD) or self._readers(value.name):
            return False
        assert transpose is not None
        batched = self._maker(transpose.input[0])
        if batched is None or not self._drops_batch(batched):
            return False
        place = list(self.graph.node).index(transpose)
        self.graph.node.remove(transpose)
        self.graph.node.insert(
            place, helper.make_node("Identity", [batched.input[0]], [value.name], name=transpose.name)
        )
        if not self._readers(batched.output[0]) and batched.output[0] not in self.outputs:
            self.graph.node.remove(batched)
        _reshape(value)
        return True

    def _way_in(self, node: NodeProto) -> tuple[NodeProto, NodeProto] | None:
        """Transpose and Unsqueeze behind a stream, if `node` is that Transpose."""
        after = self._readers(node.output[0])
        if not _turns(node, INWARD) or len(after) != 1 or after[0].op_type != "Unsqueeze":
            return None
        return (node, after[0]) if self._value(after[0].input[1]) == 0 else None

    def _drops_batch(self, node: NodeProto) -> bool:
        """Whether a node takes the batch of one off the front."""
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        takes = node.op_type in ("Gather", "Squeeze") and len(node.input) == 2
        return takes and axis == 0 and self._value(node.input[1]) == 0

    def _value(self, name: str) -> int | None:
        tensor = self.constants.get(name)
        if tensor is None or tensor.data_type != TensorProto.INT64:
            return None
        array = numpy_helper.to_array(tensor)
        return int(array.reshape(-1)[0]) if array.size == 1 else None

    def _readers(self, name: str) -> list[NodeProto]:
        return [node for node in self.graph.node if name in node.input]

    def _maker(self, name: str) -> NodeProto | None:
        return next((node for node in self.graph.node if name in node.output), None)


def _turns(node: NodeProto | None, perm: list[int]) -> bool:
    if node is None or node.op_type != "Transpose":
        return False
    return next((list(a.ints) for a in node.attribute if a.name == "perm"), None) == perm


def _shape(value: ValueInfoProto) -> list[int]:
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _is_stream(value: ValueInfoProto) -> bool:
    shape = _shape(value)
    return value.type.tensor_type.elem_type == TensorProto.BFLOAT16 and len(shape) == 4 and shape[3] % PACKED == 0


def _reshape(value: ValueInfoProto) -> None:
    t, y, x, c = _shape(value)
    value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.BFLOAT16, [1, c, t, y, x]))


def set_format(trt: Any, network: Any, names: Collection[str]) -> None:
    """Have a parsed network's bindings `names` in FORMAT, and nothing else."""
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    for tensor in tensors:
        if tensor.name in names:
            tensor.allowed_formats = 1 << int(getattr(trt.TensorFormat, FORMAT))
