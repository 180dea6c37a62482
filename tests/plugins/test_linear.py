"""The linear ops through their library: against the reference on a GPU, and what is refused without one."""

from __future__ import annotations

import pytest
import torch

from longtake.commands.main import main
from longtake.errors import LongtakeError, UnavailableError
from longtake.machine.capability import linear_method
from longtake.plugins.bench.harness import inputs_on_gpu, relative_error
from longtake.plugins.bench.linear import as_in_a_network
from longtake.plugins.cases import op_inputs
from longtake.plugins.linear.library import CublasLtLinear
from longtake.plugins.linear.op import OPS
from longtake.plugins.linear.op import SIZES as LINEAR_SIZES
from longtake.plugins.registry import op_named
from longtake.plugins.run import launcher_by, launcher_for
from longtake.runtime.backends.trt.engine import device_bytes_used

gpu = pytest.mark.gpu
LARGE = {"T": 7040, "N": 3072, "K": 14336}
TOLERANCE = 6e-3  # bf16's rounding is 0.002; Hopper's fast accumulation of E4M3 products adds up to 0.004


@pytest.mark.parametrize("op", [op.name for op in OPS])
def test_the_call_computes_the_reference(op: str) -> None:
    """The arguments that torch is given, on the CPU; its GELU there is the exact one, a little off tanh's."""
    given = op_inputs(op, LINEAR_SIZES[1])
    out = torch.full((200, 512), float("nan"), dtype=torch.bfloat16)
    launcher = CublasLtLinear(op_named(op), LINEAR_SIZES[1])
    launcher.multiply(*given, out, one=launcher.ones("cpu"))
    assert relative_error(out, op_named(op).reference(*given)) < TOLERANCE


def test_what_cannot_run_is_refused_by_name() -> None:
    assert (linear_method("9.0", "fp8"), linear_method("8.6", "fp8"), linear_method("8.6", "bf16")) == (
        "cublaslt", None, "cublaslt",
    )  # fmt: skip
    with pytest.raises(UnavailableError, match=r"no library runs linear_fp8 here[\s\S]*8.6[\s\S]*linears: engine"):
        launcher_for(op_named("linear_fp8"), LINEAR_SIZES[0], compute_capability="8.6")
    with pytest.raises(UnavailableError, match=r"does not multiply these sizes in FP8[\s\S]*N=24, K=32"):
        CublasLtLinear(op_named("linear_fp8"), {"T": 8, "N": 24, "K": 32})
    with pytest.raises(LongtakeError, match=r"qk_norm_rope does not run through this\n  got: cublaslt"):
        launcher_by(op_named("qk_norm_rope"), "cublaslt", {})


def test_bench_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", "kernels", "linear"]) == 3
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@gpu
@pytest.mark.parametrize("dims", [*LINEAR_SIZES, LARGE], ids=["small", "odd", "large"])
@pytest.mark.parametrize("op", [op.name for op in OPS])
def test_every_size_equals_the_reference(op: str, dims: dict[str, int]) -> None:
    given = inputs_on_gpu(op_named(op), dims, as_in_a_network)
    out = torch.full((dims["T"], dims["N"]), float("nan"), dtype=torch.bfloat16, device="cuda")
    pointers = [t.data_ptr() for t in (*given, out)]
    launcher_for(op_named(op), dims).launch(pointers, torch.cuda.current_stream().cuda_stream)
    assert relative_error(out, op_named(op).reference(*given)) < TOLERANCE


@gpu
@pytest.mark.parametrize("op", [op.name for op in OPS])
def test_a_captured_graph_follows_its_input_on_its_stream_and_allocates_nothing(op: str) -> None:
    dims = LINEAR_SIZES[1]
    given = inputs_on_gpu(op_named(op), dims, as_in_a_network)
    out = torch.empty((dims["T"], dims["N"]), dtype=torch.bfloat16, device="cuda")
    launcher, pointers = launcher_for(op_named(op), dims), [t.data_ptr() for t in (*given, out)]

    def work() -> None:
        launcher.launch(pointers, torch.cuda.current_stream().cuda_stream)

    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    allocated, used = torch.cuda.memory_stats()["allocation.all.allocated"], device_bytes_used(out.device)
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
    assert device_bytes_used(out.device) == used
    given[0].copy_(given[0].float().flip(0).to(given[0].dtype))
    out.fill_(float("nan"))
    graph.replay()
    assert relative_error(out, op_named(op).reference(*given)) < TOLERANCE


@gpu
def test_bench_prints_every_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["bench", "kernels", "linear", "--tokens", "256", "--dim", "128", "--ffn", "512", "--repeats", "2"]) == 0
    )
    printed = capsys.readouterr().out
    assert printed.count("promoted") == 6 and printed.count("linear_bf16") == 3
