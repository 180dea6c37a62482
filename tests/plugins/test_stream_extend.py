"""The stream extension: its kernel's text on the CPU, and on a GPU, against the reference; the reference against the VAE."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from longtake.plugins.cases import op_inputs
from longtake.plugins.registry import op_named
from longtake.plugins.run import run_kernel
from longtake.plugins.stream_extend.op import OPS, SIZES
from longtake.training.models.wan.vae_layers import RMSNorm, Stream, channels_first, channels_last

sizes = pytest.mark.parametrize("dims", SIZES, ids=lambda d: "T{T}Y{Y}X{X}C{C}F{F}".format(**d))
ops = pytest.mark.parametrize("op", [op.name for op in OPS])
dtypes = pytest.mark.parametrize("dtype", ("bf16", "fp32"))


def check(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], op: str) -> None:
    for g, w in zip(got, wanted, strict=True):
        exact, step = op == "stream_extend", 2**-7 if w.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(g.cpu(), w, rtol=0 if exact else step, atol=0 if exact else 1e-5)
        if w.dtype == torch.bfloat16:
            assert (g.cpu() != w).double().mean() < 1e-2, "only roundings on the edge may differ"


@ops
@dtypes
@sizes
@pytest.mark.parametrize("reverse", (False, True))
def test_the_kernels_text_equals_the_reference(
    host_device: Any, op: str, dtype: str, dims: dict[str, int], reverse: bool
) -> None:
    host_device.reverse = reverse
    inputs = op_inputs(op, dims, dtype)
    wanted = op_named(op).reference(*inputs)
    got = host_device.run(op, *inputs)
    assert got[1] is inputs[-1], "the cache is written in place"
    check(got, wanted, op)


def test_zeros_stay_zeros(host_device: Any) -> None:
    x, gamma, cache = op_inputs("norm_silu_extend", SIZES[2], "bf16")
    y, _ = host_device.run("norm_silu_extend", x * 0, gamma, cache)
    assert (y[2:] == 0).all()


@pytest.mark.gpu
@ops
@dtypes
@sizes
def test_the_kernel_equals_the_reference(op: str, dtype: str, dims: dict[str, int]) -> None:
    inputs = op_inputs(op, dims, dtype)
    wanted = op_named(op).reference(*inputs)
    on_gpu = [t.cuda() for t in inputs]
    got = run_kernel(op, *on_gpu)
    assert got[1] is on_gpu[-1]
    check(got, wanted, op)


@sizes
def test_the_reference_is_what_the_vae_computes(dims: dict[str, int]) -> None:
    x, gamma, cache = op_inputs("norm_silu_extend", dims, "fp32")
    norm = RMSNorm(dims["C"])
    norm.gamma.data.copy_(gamma)
    stream = Stream([channels_first(cache)])
    with torch.no_grad():
        wanted = stream.extend(functional.silu(norm(channels_first(x))), dims["F"])
    y, new = op_named("norm_silu_extend").reference(x, gamma, cache)
    torch.testing.assert_close(y, channels_last(wanted), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(new, channels_last(stream.new[0]), rtol=1e-5, atol=1e-6)
