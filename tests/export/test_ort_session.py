"""Sessions over views: a large one keeps its constants, and computes the same; one that is not there is explained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from longtake.accuracy import ort_session
from longtake.errors import IntegrityError, LongtakeError


@pytest.fixture
def view(tmp_path: Path) -> Path:
    """x [2, 16] times a weight of E4M3 values and a scale, as views store packed weights."""
    weight = helper.make_tensor("w", TensorProto.FLOAT8E4M3FN, [16, 4], bytes(range(64)), raw=True)
    scale = numpy_helper.from_array(np.float32(0.5), "s")
    nodes = [
        helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wide", "s"], ["scaled"]),
        helper.make_node("MatMul", ["x", "scaled"], ["y"]),
    ]
    ends = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, k]) for n, k in (("x", 16), ("y", 4)))
    graph = helper.make_graph(nodes, "view", [next(ends)], [next(ends)], [weight, scale])
    path = tmp_path / "dit.ort.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_weights_dequantized_in_each_pass_give_the_same_bits(view: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = {"x": np.random.default_rng(0).standard_normal((2, 16), dtype=np.float32)}
    folded = ort_session.session_from_view(view, 1).run(None, x)[0]
    monkeypatch.setattr(ort_session, "LARGE", 0)
    for session in (
        ort_session.session_from_view(view, 1, few_passes=True),
        ort_session.session_from_model(onnx.load(view), 1),
    ):
        assert np.array_equal(session.run(None, x)[0], folded)


def test_a_network_without_a_view_is_too_large_for_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(LongtakeError, match=r"cannot run dit: no .*dit\.ort\.onnx[\s\S]*too large[\s\S]*fix: .*-check"):
        ort_session.session_from_view(tmp_path / "dit.ort.onnx")


def test_a_damaged_view_is_refused(view: Path) -> None:
    view.write_bytes(view.read_bytes()[:-9])
    with pytest.raises(IntegrityError, match=r"(?s)cannot open .*dit\.ort\.onnx.*fix: .*--force"):
        ort_session.session_from_view(view)
