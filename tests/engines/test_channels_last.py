"""Streams in the layout of convolutions: the rewritten segment is the same function of the same bytes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from longtake.engines.channels_last import with_channels_last


def segment(kind: int) -> onnx.ModelProto:
    """[T, Y, X, C] -> a convolution's layout -> doubled, with the unsqueezed input as an output of its own -> back."""
    zero = numpy_helper.from_array(np.array(0, np.int64), "zero")
    nodes = [
        helper.make_node("Transpose", ["x0"], ["t0"], perm=[3, 0, 1, 2]),
        helper.make_node("Unsqueeze", ["t0", "axis"], ["y0"]),
        helper.make_node("Add", ["y0", "y0"], ["t1"]),
        helper.make_node("Gather", ["t1", "zero"], ["t2"], axis=0),
        helper.make_node("Transpose", ["t2"], ["y1"], perm=[1, 2, 3, 0]),
    ]
    x = helper.make_tensor_value_info("x0", kind, [2, 3, 4, 8])
    y0 = helper.make_tensor_value_info("y0", kind, [1, 8, 2, 3, 4])
    y1 = helper.make_tensor_value_info("y1", kind, [2, 3, 4, 8])
    axis = numpy_helper.from_array(np.array([0], np.int64), "axis")
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y0, y1], [zero, axis]))


def test_the_transposes_go_and_the_numbers_stay() -> None:
    changed, names = with_channels_last(segment(TensorProto.BFLOAT16), {"y0"})
    assert set(names) == {"x0", "y0", "y1"}
    assert "Transpose" not in {node.op_type for node in changed.graph.node}
    onnx.checker.check_model(changed)
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 8)).astype(np.float32)
    wanted = ReferenceEvaluator(segment(TensorProto.FLOAT)).run(None, {"x0": x})
    for value in (*changed.graph.input, *changed.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    got = ReferenceEvaluator(changed).run(None, {"x0": x.transpose(3, 0, 1, 2)[None]})
    np.testing.assert_array_equal(got[0], wanted[0])
    np.testing.assert_array_equal(got[1][0].transpose(1, 2, 3, 0), wanted[1])


@pytest.mark.parametrize("kind", [TensorProto.FLOAT])
def test_other_types_are_left_alone(kind: int) -> None:
    changed, names = with_channels_last(segment(kind))
    assert names == () and changed == segment(kind)
