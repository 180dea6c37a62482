"""The convolution ops through their libraries: the graph's sizes on the CPU, and on a GPU every result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from longtake.commands.main import main
from longtake.errors import LongtakeError, UnavailableError
from longtake.machine.capability import conv_methods
from longtake.plugins.bench.conv import CASES
from longtake.plugins.bench.harness import relative_error
from longtake.plugins.cases import op_inputs
from longtake.plugins.conv import plans
from longtake.plugins.conv.cudnn_conv import channels_last_strides, geometry
from longtake.plugins.conv.library import views
from longtake.plugins.conv.op import OPS
from longtake.plugins.conv.op import SIZES as CONV_SIZES
from longtake.plugins.conv.reference import library_weight
from longtake.plugins.registry import op_named
from longtake.plugins.run import launcher_by, launcher_for
from longtake.plugins.shapes import dims_from_shapes

TOLERANCE = 4e-3  # bf16's rounding is 0.002; with a residual torch's way rounds three times
ops = pytest.mark.parametrize("op", [op.name for op in OPS])
sizes = pytest.mark.parametrize("dims", CONV_SIZES, ids=lambda d: "x".join(map(str, d.values())))


@ops
@sizes
def test_a_library_sees_the_references_convolution(op: str, dims: dict[str, int]) -> None:
    """The views and strides that libraries are handed, computed by torch on the CPU."""
    given = op_inputs(op, dims, "fp32")
    tensors = {tensor.name: value for tensor, value in zip(op_named(op).spec.inputs, given)}
    wanted = op_named(op).reference(*given)
    tensors |= {"weight": library_weight(tensors["weight"]), "out": torch.empty_like(wanted)}
    shape = geometry(op_named(op), dims)
    x, weight, out = views(shape, tensors)
    for view, sizes_ in ((x, shape.x), (weight, shape.weight), (out, shape.out)):
        assert tuple(view.shape) == sizes_
        strides = channels_last_strides(sizes_)
        assert all(view.stride(i) == strides[i] for i in range(view.dim()) if sizes_[i] > 1)
    convolution = functional.conv3d if len(shape.padding) == 3 else functional.conv2d
    out.copy_(convolution(x, weight, tensors["bias"], padding=shape.padding))
    got = tensors["out"] + tensors.get("residual", 0)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_the_cases_are_the_decoders_work() -> None:
    flops = sum(c[-1] * geometry(op_named(c[0]), dict(zip("TYXCN", c[1:6]))).flops for c in CASES)
    assert 8 * flops == pytest.approx(529e12, rel=0.01)


def test_what_cannot_run_is_refused_by_name() -> None:
    assert conv_methods("9.0") == ["cudnn", "torch"] and conv_methods("7.5") == []
    with pytest.raises(UnavailableError, match=r"no library runs conv_3x3x3 here[\s\S]*7.5[\s\S]*vae_ops: engine"):
        launcher_for(op_named("conv_3x3x3"), CONV_SIZES[0], compute_capability="7.5")
    with pytest.raises(
        LongtakeError, match=r"linear_bf16 does not run through this\n  got: cudnn\n  expected: cublaslt"
    ):
        launcher_by(op_named("linear_bf16"), "cudnn", {})
    with pytest.raises(LongtakeError, match="weight has the wrong shape"):
        dims_from_shapes(op_named("conv_3x1x1").spec, [(3, 4, 4, 16), (8, 16, 3, 3, 3), (8,)])


def test_a_choice_is_remembered_and_a_damaged_file_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGTAKE_HOME", str(tmp_path))
    assert plans.remembered("a") == ""
    plans.remember("a", "eng1")
    plans.remember("b", "eng2")
    assert (plans.remembered("a"), plans.remembered("b")) == ("eng1", "eng2")
    (tmp_path / plans.FILE).write_text("{")
    assert plans.remembered("a") == ""


def test_bench_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", "kernels", "conv"]) == 3
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.gpu
@ops
@sizes
@pytest.mark.parametrize("method", ("cudnn", "torch", "chosen"))
def test_every_method_equals_the_reference(op: str, dims: dict[str, int], method: str) -> None:
    given = [tensor.cuda() for tensor in op_inputs(op, dims)]
    wanted = op_named(op).reference(*given)
    out = torch.full_like(wanted, float("nan"))
    launcher = launcher_for(op_named(op), dims) if method == "chosen" else launcher_by(op_named(op), method, dims)
    workspace = torch.empty(launcher.workspace_bytes + 1, dtype=torch.uint8, device="cuda")
    given[1] = library_weight(given[1])
    pointers = [tensor.data_ptr() for tensor in (*given, out)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launcher.launch(pointers, torch.cuda.current_stream().cuda_stream, workspace.data_ptr())
    given[0].mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    wanted = op_named(op).reference(given[0], given[1].permute(0, 4, 1, 2, 3), *given[2:])
    assert relative_error(out, wanted) < TOLERANCE
