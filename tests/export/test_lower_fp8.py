"""A Linear in 8-bit floats: what ONNX Runtime computes, and that TensorRT multiplies in FP8."""

from __future__ import annotations

import logging

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from longtake.dtypes import BY_ONNX
from longtake.engines.compile import PlanJob, engine_from_onnx
from longtake.errors import LongtakeError
from longtake.export.lower import lower, packed_weight
from longtake.export.ort_view import ort_view
from longtake.machine.flavour import flavour_for
from longtake.plugins.fp8 import quantized_rows

AMAX = {f"blocks.{i}.ffn.0": {"input": 3.0 + i} for i in range(3)}
TOKENS, SIZE = 32, 64
FLOAT, BF16 = TensorProto.FLOAT, TensorProto.BFLOAT16


def weight(layer: int) -> Tensor:
    rows = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(layer)) / 8
    rows[1] *= 500  # an outlier row, and a row of zeros
    rows[2] = 0
    return rows


def bias() -> Tensor:
    return torch.linspace(-1, 1, SIZE).bfloat16()


def chain(layers: int = 3) -> onnx.ModelProto:
    """x -> Linear -> x + y -> ... with bf16 activations; the weights are there by name and shape only."""
    nodes = [helper.make_node("Cast", ["x"], ["h0"], to=BF16)]
    tensors = []
    for i in range(layers):
        names = [f"blocks.{i}.ffn.0.weight", f"blocks.{i}.ffn.0.bias"]
        tensors.append(TensorProto(name=names[0], data_type=BF16, dims=[SIZE, SIZE]))
        tensors.append(
            helper.make_tensor(names[1], BF16, [SIZE], bias().view(torch.uint16).numpy().tobytes(), raw=True)
        )
        nodes.append(helper.make_node("Gemm", [f"h{i}", *names], [f"y{i}"], transB=1))
        nodes.append(helper.make_node("Add", [f"y{i}", f"h{i}"], [f"h{i + 1}"]))
    nodes.append(helper.make_node("Cast", [f"h{layers}"], ["y"], to=FLOAT))
    ends = [helper.make_tensor_value_info(name, FLOAT, [TOKENS, SIZE]) for name in "xy"]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def lowered(layers: int = 3) -> onnx.ModelProto:
    """The chain in 8 bits, with the packed weights filled in."""
    model = chain(layers)
    names = [f"blocks.{i}.ffn.0" for i in range(layers)]
    assert lower(model, "fp8", names, AMAX) == names
    packed: dict[str, Tensor] = {}
    for i, name in enumerate(names):
        packed |= packed_weight("fp8", name, weight(i), AMAX)
    for tensor in model.graph.initializer:
        if tensor.name in packed:
            assert packed[tensor.name].nbytes == (tensor.dims[0] * SIZE if len(tensor.dims) == 2 else 4 * SIZE)
            tensor.raw_data, tensor.data_location = packed[tensor.name].numpy().tobytes(), TensorProto.DEFAULT
    onnx.checker.check_model(model)
    return model


def test_onnx_runtime_computes_what_fake_quant_computes() -> None:
    x = torch.randn(TOKENS, SIZE, generator=torch.Generator().manual_seed(9))
    x[0], x[1], x[2] = 0, 1e-5, 100  # nothing, subnormals, and beyond the calibrated amax
    codes, scales = quantized_rows(weight(0))
    activation = (x * (448 / 3.0)).clamp(-448, 448).to(torch.float8_e4m3fn).float() * (3.0 / 448)
    wanted = x + torch.nn.functional.linear(activation, codes.float() * scales[:, None], bias().float())
    session = onnxruntime.InferenceSession(ort_view(lowered(1)).SerializeToString())
    got = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_weights_are_referred_to_and_not_held() -> None:
    model = chain()
    lower(model, "fp8", ["blocks.1.ffn.0"], None)
    found = {t.name: t for t in model.graph.initializer}
    assert "blocks.1.ffn.0.weight" not in found and "blocks.0.ffn.0.weight" in found
    for part, kind, shape in (("values", TensorProto.FLOAT8E4M3FN, [SIZE, SIZE]), ("scale", FLOAT, [SIZE])):
        tensor = found[f"blocks.1.ffn.0.weight.{part}"]
        assert (tensor.data_type, list(tensor.dims), tensor.raw_data) == (kind, shape, b"")


def test_a_linear_without_calibrated_activation_is_refused() -> None:
    with pytest.raises(LongtakeError, match="no calibrated amax for blocks.0.ffn.0"):
        lower(chain(), "fp8", ["blocks.0.ffn.0"], {"blocks.0.ffn.0": {"weight": 1.0}})


def as_segment(model: onnx.ModelProto, kept: set[str]) -> PlanJob:
    """A plan of `model` that takes all constants but `kept` as inputs, as the middle segments of a network do."""
    graph = model.graph
    inputs = [t for t in graph.initializer if t.name not in kept]
    constants = [t for t in graph.initializer if t.name in kept]
    assert len(constants) == len(kept)
    graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in inputs)
    del graph.initializer[:]
    graph.initializer.extend(constants)
    rows = [
        [
            [v.name, BY_ONNX[v.type.tensor_type.elem_type].name, [d.dim_value for d in v.type.tensor_type.shape.dim]]
            for v in end
        ]
        for end in (graph.input, graph.output)
    ]
    spec = {"inputs": rows[0], "outputs": rows[1], "aliases": [], "profile": []}
    return PlanJob("chain", model, "", spec)


def gemms_of(job: PlanJob, target: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What TensorRT's log says of the inputs of each plain matrix product in the plan built for `target`."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "longtake.tensorrt"):
        engine_from_onnx(job, target, flavour_for(None), show_progress=False)
    lines = [line for record in caplog.records for line in record.getMessage().splitlines()]
    layers = [line for line in lines if line.startswith("Name:") and ", LayerType: " in line]
    assert layers, "the builder no longer lists the layers of a plan in its log"
    products = [line for line in layers if ", LayerType: gemm" in line]
    return [line.partition("Inputs:")[2].partition("Constants:")[0] for line in products]


@pytest.mark.parametrize("target", ["8.9", "12.0"])
def test_tensorrt_multiplies_in_fp8_with_weights_and_true_scales_as_inputs(
    target: str, caplog: pytest.LogCaptureFixture
) -> None:
    products = gemms_of(as_segment(lowered(), {"fp8.one"}), target, caplog)
    assert len(products) == 3
    assert all(line.count("Datatype: FP8") == 2 and "BFloat16" not in line for line in products), products


def test_tensorrt_would_not_with_the_scale_of_q_and_dq_as_an_input(caplog: pytest.LogCaptureFixture) -> None:
    """Why the scales of Q and DQ are 1: should this fail one day, the true scales can go there."""
    products = gemms_of(as_segment(lowered(), set()), "8.9", caplog)
    assert products == []  # it casts to bf16, in the kernel that multiplies or before it
