"""One Linear, lowered and run by ONNX Runtime, equals the codec's fake-quant."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from longtake.errors import LongtakeError
from longtake.export.files import is_reference, tensor_raw
from longtake.export.functions import attach_functions
from longtake.export.lower import lower
from longtake.export.onnx_from_model import onnx_from_model
from longtake.export.ort_view import activation_function, ort_view
from longtake.export.weights import stored_tensors
from longtake.plugins.nvfp4.reference import fake_quantize, quantize
from longtake.training.models.network_spec import Binding, NetworkSpec

AMAX = {"linear": {"input": 3.0, "weight": 0.11}}
SPEC = NetworkSpec("one", (Binding("x", "fp32", (32, 64)),), (Binding("y", "fp32", (32, 96)),))


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dit = nn.Module()
        self.dit.linear = nn.Linear(64, 96)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.dit.linear(x.to(self.dit.linear.weight.dtype)).float(),)


@pytest.fixture(scope="module")
def one() -> tuple[nn.Linear, onnx.ModelProto]:
    torch.manual_seed(0)
    network = One()
    return network.dit.linear, onnx_from_model(network, SPEC)


def lowered(one: tuple[nn.Linear, onnx.ModelProto], precision: str) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(one[1])
    names = lower(model, precision, ["linear"], AMAX)
    assert names == ([] if precision == "bf16" else ["linear"])
    state = {f"linear.{name}": tensor for name, tensor in one[0].state_dict().items()}
    waiting = {t.name: t for t in model.graph.initializer if is_reference(t)}
    for name, value in stored_tensors(model, state, precision, names, AMAX):
        waiting[name].ClearField("data_location")
        waiting[name].raw_data = tensor_raw(value)
    attach_functions(model)
    onnx.checker.check_model(model)
    return model


def run(model: onnx.ModelProto, **feeds: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(ort_view(model).SerializeToString())
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in feeds.items()})[0])


def awkward_activation() -> Tensor:
    """Zeros, tiny values, exact ties of every E2M1 interval, and values beyond the calibrated amax."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    x[0] = 0
    x[1] *= 1e-4
    x[2] = torch.arange(64).remainder(25).sub(12) / 4
    x[3] *= 100
    return x


@pytest.mark.parametrize("precision", ["bf16", "w4a16", "nvfp4"])
def test_a_lowered_linear_computes_what_fake_quant_computes(one: tuple, precision: str) -> None:
    linear, x = one[0], awkward_activation()
    weight, activation = linear.weight.detach(), x
    if precision == "bf16":
        weight = weight.bfloat16().float()
    elif precision == "w4a16":
        weight = fake_quantize(weight)
    else:
        weight, activation = fake_quantize(weight, amax=0.11), fake_quantize(x, amax=3.0)
    wanted = nn.functional.linear(activation, weight, linear.bias.detach().bfloat16().float())
    assert torch.allclose(run(lowered(one, precision), x=x), wanted, rtol=1e-6, atol=1e-5)


def test_codes_on_disk_are_the_codecs(one: tuple) -> None:
    packed = quantize(one[0].weight.detach(), amax=0.11)
    for precision, amax in (("nvfp4", 0.11), ("w4a16", None)):
        packed = quantize(one[0].weight.detach(), amax=amax)
        tensors = {t.name: t for t in lowered(one, precision).graph.initializer}
        values, scales = (tensors[f"linear.weight.{part}"].raw_data for part in ("values", "scales"))
        assert values == packed.values.numpy().tobytes()
        assert scales == packed.scales.view(torch.uint8).numpy().tobytes()
        assert 8 * (len(values) + len(scales)) == 4.5 * one[0].weight.numel()
        assert "linear.weight" not in tensors


def test_view_quantizes_activations_bit_for_bit_as_the_codec() -> None:
    """A million bf16 activations and every tie, through the function body of TRT_FP4DynamicQuantize."""
    x = torch.randn(4096, 256, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    x[:32, :64] = awkward_activation()
    g = torch.tensor(2.7) / (6 * 448)
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("TRT_FP4DynamicQuantize", ["x", "g"], ["values", "scales"], domain="trt")],
            "quantize",
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [4096, 256]), ("g", []))],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("values", "scales")],
        ),
        functions=[activation_function(23)],
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)],
        ir_version=11,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString())
    values, scales = map(torch.from_numpy, session.run(None, {"x": x.numpy(), "g": g.numpy()}))
    got = (values.unflatten(-1, (-1, 16)) * (scales * g).unsqueeze(-1)).flatten(-2)
    wanted = fake_quantize(x, amax=2.7)
    assert torch.equal(got, wanted)


def test_linears_that_share_an_activation_and_its_amax_share_the_quantizer(package) -> None:  # type: ignore[no-untyped-def]
    """q, k and v read one normalised input: six quantizers a layer, not eight."""
    _, _, folder = package("nvfp4")
    nodes = [n.op_type for n in onnx.load(folder / "dit.onnx", load_external_data=False).graph.node]
    assert nodes.count("TRT_FP4DynamicQuantize") == 2 * 6


def test_a_linear_without_calibrated_amax_is_refused(one: tuple) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(one[1])
    with pytest.raises(LongtakeError, match=r"no calibrated amax for linear[\s\S]*fix: train with --precision nvfp4"):
        lower(model, "nvfp4", ["linear"], {})


def test_a_linear_that_is_no_gemm_is_refused(one: tuple) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(one[1])
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    next(a for a in gemm.attribute if a.name == "transB").i = 0
    with pytest.raises(LongtakeError, match="cannot lower linear"):
        lower(model, "w4a16", ["linear"], AMAX)
