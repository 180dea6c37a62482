"""Attention through libraries on a GPU: against the reference at small sizes, and at those of Wan2.2-TI2V-5B."""

from __future__ import annotations

import pytest
import torch

from longtake.commands.main import main
from longtake.errors import UnavailableError
from longtake.machine.capability import attention_methods
from longtake.plugins.bench.attention import Attention
from longtake.plugins.bench.harness import relative_error
from longtake.plugins.cache_format import CACHE_FORMATS
from longtake.plugins.device_memory import tensor_at
from longtake.plugins.launch import Launcher
from longtake.plugins.registry import op_named
from longtake.plugins.run import launcher_by, launcher_for
from longtake.plugins.sink_attention.hopper import HopperSinkAttention
from longtake.plugins.sink_attention.library import CudnnSinkAttention, TorchSinkAttention
from longtake.plugins.sink_attention.reference import attention_fp8, dequantize_kv
from longtake.plugins.sink_attention.window import WindowedAttention, addresses
from longtake.runtime.backends.trt.engine import device_bytes_used

gpu = pytest.mark.gpu
# E4M3 keeps 4 bits of q, k, v and of the probabilities; the reference rounds nothing.
TOLERANCE = {"bf16": 1.5e-2, "fp8": 0.12}
SMALL = {"S": 4, "L": 128, "H": 4, "D": 64}
ODD = {"S": 3, "L": 200, "H": 3, "D": 128}
LARGE = {"S": 4, "L": 7040, "H": 24, "D": 128}
WAYS = (("cudnn", "bf16"), ("wgmma", "fp8"), ("torch", "bf16"))


def run(launcher: Launcher, case: Attention, table: torch.Tensor) -> torch.Tensor:
    workspace = torch.full((max(launcher.workspace_bytes, 1),), 0x7F, dtype=torch.uint8, device="cuda")
    case.out.fill_(float("nan"))
    stream = torch.cuda.current_stream().cuda_stream
    launcher.launch(case.pointers(table), stream, workspace.data_ptr(), table.numel())
    return case.out


@gpu
@pytest.mark.parametrize("method, kind", WAYS)
@pytest.mark.parametrize("dims", [SMALL, ODD], ids=["small", "odd"])
@pytest.mark.parametrize("fmt", CACHE_FORMATS)
def test_every_table_equals_the_reference(fmt: str, dims: dict[str, int], method: str, kind: str) -> None:
    case = Attention(fmt, dims)
    launcher = launcher_by(case.op, method, case.dims)
    for entries in ((-1,), (2,), (0, -1), (2, 0), (1, -1, 2), (0, 1, 2)):
        table = torch.tensor(entries, dtype=torch.int32, device="cuda")
        assert relative_error(run(launcher, case, table), case.reference(table)) <= TOLERANCE[kind], entries


@gpu
@pytest.mark.parametrize("dims", [SMALL, ODD, LARGE], ids=["small", "odd", "large"])
def test_a_kept_window_is_a_new_one_bit_for_bit(dims: dict[str, int]) -> None:
    """Three passes of a chunk in a layer's own memory, beside each in new memory; and a replay of a CUDA graph of one."""
    case, version = Attention("nvfp4", dims), torch.ones(1, dtype=torch.int32, device="cuda")
    launcher = launcher_by(case.op, "wgmma", case.dims)
    assert isinstance(launcher, HopperSinkAttention)
    table = torch.tensor((0, 2, -1), dtype=torch.int32, device="cuda")
    kept, anew = (torch.zeros(launcher.workspace_bytes, dtype=torch.uint8, device="cuda") for _ in range(2))

    def launch(memory: torch.Tensor) -> torch.Tensor:
        case.out.fill_(float("nan"))
        stream = torch.cuda.current_stream().cuda_stream
        launcher.launch_kept(version.data_ptr(), case.pointers(table), stream, memory.data_ptr(), 3)
        return case.out.clone()

    for _ in range(3):
        assert torch.equal(launch(kept), launch(anew.zero_()))
        assert relative_error(case.out, case.reference(table)) <= TOLERANCE["fp8"]
        case.q.copy_(case.q.flip(0))
        case.k.copy_(case.k.flip(0))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(kept)
    case.k.copy_(case.k.flip(0))
    graph.replay()
    assert torch.equal(case.out, launch(anew.zero_()))


@gpu
@pytest.mark.parametrize("method, kind", WAYS)
def test_large_model(method: str, kind: str) -> None:
    case = Attention("nvfp4", LARGE)
    launcher = launcher_by(case.op, method, case.dims)
    for entries in range(1, 5):
        table = case.table(entries)
        error = relative_error(run(launcher, case, table), case.reference(table))
        print(f"{method} {kind}, {entries} blocks: relative error {error:.4f}")
        assert error <= TOLERANCE[kind], entries


@gpu
def test_fp8_over_the_whole_window_of_ones_and_of_shifted_values() -> None:
    """Weights spread over thousands of keys add up: the kernel's sums are fp32 after every 128 keys."""
    case = Attention("bf16", LARGE)
    launcher, bound = launcher_by(case.op, "wgmma", case.dims), 0.01
    for entries in range(1, 5):
        table = case.table(entries)
        for t in (case.q, case.k, case.v, *case.cache):
            t.fill_(1.0)
        ones = run(launcher, case, table).float()
        print(f"{entries} blocks of ones: {ones.min().item():.4f} to {ones.max().item():.4f}")
        assert ((ones - 1).abs() <= bound).all(), entries
        for t in (case.q, case.k, case.cache[0][:, 0]):
            t.normal_()
        for t in (case.v, case.cache[0][:, 1]):
            t.normal_(1.0, 0.1)
        got, wanted = run(launcher, case, table).float(), case.reference(table)
        bias, error = (got - wanted).mean().item(), relative_error(got, wanted)
        print(f"{entries} blocks of shifted values: bias {bias:+.4f}, relative error {error:.4f}")
        assert abs(bias) <= bound and error <= 0.02, entries


@gpu
@pytest.mark.parametrize("dims", [SMALL, ODD, LARGE], ids=["small", "odd", "large"])
@pytest.mark.parametrize("fmt", CACHE_FORMATS)
def test_window_is_the_codec_to_the_last_bit(fmt: str, dims: dict[str, int]) -> None:
    class NoAttention(WindowedAttention):
        def attend(self, *given: object) -> None: ...

    case, entries = Attention(fmt, dims), (1, -1, 0)
    table = torch.tensor(entries, dtype=torch.int32, device="cuda")
    launcher = NoAttention(case.op, dims).prepare()
    workspace = torch.full((launcher.workspace_bytes,), 0x7F, dtype=torch.uint8, device="cuda")
    launcher.launch(case.pointers(table), torch.cuda.current_stream().cuda_stream, workspace.data_ptr(), len(entries))
    places = addresses(dims | {"W": dims["S"]}, workspace.data_ptr())[0]
    shape = (dims["L"], dims["H"], dims["D"])
    for pane, (name, fresh) in enumerate((("window_k", case.k), ("window_v", case.v))):
        window = tensor_at(places[name], (len(entries), *shape))
        for got, slot in zip(window, entries):
            own = [part[[slot]] for part in case.cache]
            cached = (dequantize_kv(*own) if fmt == "nvfp4" else own[0])[0, pane].to(torch.bfloat16)
            assert torch.equal(got, fresh if slot < 0 else cached), (name, slot)


@gpu
@pytest.mark.parametrize("method, kind", [("cudnn", "bf16"), ("wgmma", "fp8")])
def test_a_captured_graph_follows_table_and_cache_and_allocates_nothing(method: str, kind: str) -> None:
    case = Attention("nvfp4", SMALL)
    launcher = launcher_by(case.op, method, case.dims)
    workspace = torch.empty(launcher.workspace_bytes, dtype=torch.uint8, device="cuda")
    table = case.table(3)

    def work() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        launcher.launch(case.pointers(table), stream, workspace.data_ptr(), 3)

    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    allocated, used = torch.cuda.memory_stats()["allocation.all.allocated"], device_bytes_used(workspace.device)
    for _ in range(20):
        graph.replay()
        work()
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
    assert device_bytes_used(workspace.device) == used
    for entries in ((3, -1, 1), (0, 2, 3)):
        table.copy_(torch.tensor(entries, dtype=torch.int32))
        case.q.mul_(0.9)
        case.out.fill_(float("nan"))
        graph.replay()
        assert relative_error(case.out, case.reference(table)) <= TOLERANCE[kind]


@gpu
def test_chosen_here_and_falls_back_with_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    major, minor = torch.cuda.get_device_capability()
    first = attention_methods(f"{major}.{minor}", "bf16", 64)[0][0]
    assert launcher_for(op_named("sink_attention_nvfp4"), SMALL).method == first

    def refuse(launcher: Launcher) -> Launcher:
        raise UnavailableError("not today")

    if (major, minor) == (9, 0):
        assert launcher_for(op_named("sink_attention_nvfp4"), SMALL, "fp8").method == "wgmma"
    monkeypatch.setattr(HopperSinkAttention, "try_out", refuse)
    monkeypatch.setattr(CudnnSinkAttention, "prepare", refuse)
    assert launcher_for(op_named("sink_attention_nvfp4"), SMALL, "fp8").method == "torch"
    monkeypatch.setattr(TorchSinkAttention, "prepare", refuse)
    launcher = launcher_for(op_named("sink_attention_nvfp4"), SMALL)
    assert launcher.method == "portable" and "cannot run through torch" in caplog.text
    case = Attention("nvfp4", SMALL)
    assert relative_error(run(launcher, case, case.table(4)), case.reference(case.table(4))) <= TOLERANCE["bf16"]


@gpu
def test_bench_prints_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "bench",
                "kernels",
                "attention",
                "--tokens",
                "256",
                "--slots",
                "2",
                "--heads",
                "4",
                "--repeats",
                "2",
                "--cache",
                "all",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert printed.count("cudnn") == 4 and printed.count("wgmma") == 4 and printed.count("portable") == 4


def test_bench_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", "kernels", "attention"]) == 3
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@gpu
@pytest.mark.parametrize("dims", [SMALL, ODD, LARGE], ids=["small", "odd", "large"])
def test_our_fp8_attention_is_its_reference(dims: dict[str, int]) -> None:
    """Much closer than to exact attention: what differs is the order of sums, and codes that lie on an edge."""
    case = Attention("nvfp4", dims)
    case.k.mul_(1.37), case.v.mul_(1.37)  # the largest: of a cached block's numbers many would lie on an edge
    table = case.table(3)
    got = run(launcher_by(case.op, "wgmma", case.dims), case, table).float()
    slots = dequantize_kv(*case.cache)
    k, v = (torch.cat([(slots[i, pane] if i >= 0 else fresh.float()) for i in table.tolist()])
            for pane, fresh in enumerate((case.k, case.v)))  # fmt: skip
    stored = [[float(case.cache[2][i, pane] if i >= 0 else fresh.abs().max()) for i in table.tolist()]
              for pane, fresh in enumerate((case.k, case.v))]  # fmt: skip
    largest = [float(case.q.abs().max()), *map(max, stored)]
    for head in range(0, dims["H"], 8):
        one = (x[:, head].float()[None, None] for x in (case.q, k, v))
        wanted = attention_fp8(*one, largest=largest)[0, 0]
        assert relative_error(got[:, head], wanted) <= 0.02
