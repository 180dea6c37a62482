"""The kernels on a GPU against the references on the CPU (where number / tensor rounds once)."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from longtake.plugins.cache_format import CACHE_FORMATS, SIZES, SLOTS
from longtake.plugins.cases import op_inputs
from longtake.plugins.kernels import COMPUTE_DTYPES
from longtake.plugins.nvfp4_dequantize.op import OPS as DEQUANTIZE
from longtake.plugins.registry import op_named
from longtake.plugins.run import run_kernel

pytestmark = pytest.mark.gpu
WRITE_SLOTS = (-1, 0, 1, 2, 3)
TABLES = tuple(t for length in range(1, SLOTS + 1) for t in permutations((0, 1, 2, 3, -1), length))
TOLERANCE = {"bf16": 1e-2, "fp32": 1e-5}
sizes = pytest.mark.parametrize("dims", SIZES, ids=lambda d: "L{L}H{H}D{D}".format(**d))
dtypes = pytest.mark.parametrize("dtype", COMPUTE_DTYPES)
formats = pytest.mark.parametrize("fmt", CACHE_FORMATS)


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.cpu().double() - wanted.double()).norm() / wanted.double().norm())


@formats
@dtypes
@sizes
def test_write_equals_the_reference_byte_for_byte(fmt: str, dtype: str, dims: dict[str, int]) -> None:
    op = f"kv_cache_write_{fmt}"
    for slot in (*WRITE_SLOTS, SLOTS):
        inputs = op_inputs(op, dims, dtype, (slot,), seed=slot + 2)
        wanted = as_tuple(op_named(op).reference(*inputs))
        on_gpu = [t.cuda() for t in inputs]
        got = as_tuple(run_kernel(op, *on_gpu))
        for name, g, w, source in zip(("values", "scales", "amax"), got, wanted, on_gpu[2:]):
            assert g is source, "the cache is written in place"
            assert torch.equal(g.cpu(), w), f"slot {slot}: {name}"


def test_write_of_zeros_and_extremes() -> None:
    for scale in (0.0, 1e-30, 1e-12, 1e4):
        k, v, *rest = op_inputs("kv_cache_write_nvfp4", SIZES[0], "fp32", (1,))
        inputs = (k * scale, v * scale, *rest)
        wanted = op_named("kv_cache_write_nvfp4").reference(*inputs)
        for g, w in zip(run_kernel("kv_cache_write_nvfp4", *(t.cuda() for t in inputs)), wanted):
            assert torch.equal(g.cpu(), w), scale


@formats
@dtypes
@sizes
def test_attention_equals_the_reference_for_every_table(fmt: str, dtype: str, dims: dict[str, int]) -> None:
    op = f"sink_attention_{fmt}"
    inputs = op_inputs(op, dims, dtype)
    on_gpu = [t.cuda() for t in inputs]
    for table in TABLES:
        indices = torch.tensor(table, dtype=torch.int32)
        out = torch.full_like(on_gpu[0], float("nan"))
        run_kernel(op, *on_gpu[:-1], indices.cuda(), out=out)
        error = relative_error(out, op_named(op).reference(*inputs[:-1], indices))
        assert error <= TOLERANCE[dtype], f"table {table}"


@dtypes
@pytest.mark.parametrize("dims", (*SIZES, {"L": 65, "H": 24, "D": 128}), ids=lambda d: "L{L}H{H}D{D}".format(**d))
def test_norm_and_rope_equal_the_reference(dtype: str, dims: dict[str, int]) -> None:
    inputs = op_inputs("qk_norm_rope", dims, dtype)
    wanted = op_named("qk_norm_rope").reference(*inputs)
    for got, w in zip(run_kernel("qk_norm_rope", *(t.cuda() for t in inputs)), wanted):
        assert relative_error(got, w) <= {"bf16": 1e-3, "fp32": 1e-6}[dtype]
        if dtype == "bf16":
            assert (got.cpu() != w).double().mean() < 1e-2, "only roundings on the edge may differ"


@dtypes
@pytest.mark.parametrize("dims", DEQUANTIZE[0].sizes, ids=lambda d: "N{N}K{K}".format(**d))
def test_dequantize_is_exact(dtype: str, dims: dict[str, int]) -> None:
    inputs = op_inputs("nvfp4_dequantize", dims)
    wanted = op_named("nvfp4_dequantize").reference(*inputs)
    got = run_kernel("nvfp4_dequantize", *(t.cuda() for t in inputs), dtype=dtype)
    assert torch.equal(got.cpu(), wanted.to(got.dtype))


@formats
def test_a_captured_graph_follows_what_lies_in_the_device_buffers(fmt: str) -> None:
    write, read = f"kv_cache_write_{fmt}", f"sink_attention_{fmt}"
    k, v, *cache, slot = (t.cuda() for t in op_inputs(write, SIZES[0], "bf16", (0,)))
    q, *_, table = (t.cuda() for t in op_inputs(read, SIZES[0], "bf16", (0, 1, -1), seed=9))
    start = [t.clone() for t in cache]
    out = torch.empty_like(q)

    def step() -> None:
        run_kernel(write, k, v, *cache, slot)
        run_kernel(read, q, k, v, *cache, table, out=out)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for write_slot, entries in ((3, (3, 0, -1)), (-1, (2, 1, 0)), (0, (-1, 3, 0))):
        for tensor, value in zip(cache, start):
            tensor.copy_(value)
        slot.fill_(write_slot)
        table.copy_(torch.tensor(entries, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        host = [t.cpu() for t in (k, v, *start, slot)]
        wanted = as_tuple(op_named(write).reference(*host))
        assert all(torch.equal(c.cpu(), w) for c, w in zip(cache, wanted))
        error = relative_error(out, op_named(read).reference(q.cpu(), *host[:2], *wanted, table.cpu()))
        assert error <= TOLERANCE["bf16"]
