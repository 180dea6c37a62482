"""Upsampling and its shortcut: the kernels' text on the CPU, and on a GPU, against the references; these against the VAE."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longtake.errors import LongtakeError
from longtake.plugins.cases import op_inputs
from longtake.plugins.launch import compile_kernel
from longtake.plugins.registry import kernel_of, op_named
from longtake.plugins.run import run_kernel
from longtake.plugins.upsample.op import DUPLICATE_SIZES, OPS
from longtake.training.models.wan.vae_layers import channels_first, channels_last, duplicate_up

CASES = [(op.name, dims) for op in OPS for dims in op.sizes]
cases = pytest.mark.parametrize("op, dims", CASES, ids=lambda x: x if isinstance(x, str) else "x".join(map(str, x.values())))  # fmt: skip
dtypes = pytest.mark.parametrize("dtype", ("bf16", "fp32"))


@cases
@dtypes
@pytest.mark.parametrize("reverse", (False, True))
def test_the_kernels_text_equals_the_reference(
    host_device: Any, op: str, dims: dict[str, int], dtype: str, reverse: bool
) -> None:
    host_device.reverse = reverse
    given = op_inputs(op, dims, dtype)
    (got,) = host_device.run(op, *given)
    assert torch.equal(got, op_named(op).reference(*given))


@pytest.mark.gpu
@cases
@dtypes
def test_the_kernel_equals_the_reference(op: str, dims: dict[str, int], dtype: str) -> None:
    given = op_inputs(op, dims, dtype)
    assert torch.equal(run_kernel(op, *(t.cuda() for t in given)).cpu(), op_named(op).reference(*given))


@pytest.mark.parametrize("op", [op.name for op in OPS])
@pytest.mark.parametrize("arch", ("sm_80", "sm_90a", "sm_120a"))
def test_the_kernel_compiles(op: str, arch: str) -> None:
    assert compile_kernel(kernel_of(op), {"T": 4, "Y": 176, "X": 320, "C": 1024, "N": 512}, "bf16", arch)


@pytest.mark.parametrize("op, time", (("duplicate_up", 1), ("duplicate_up_time", 2)))
@pytest.mark.parametrize("dims", DUPLICATE_SIZES, ids=lambda d: f"{d['C']}to{d['N']}")
def test_the_reference_is_the_vaes_shortcut(op: str, time: int, dims: dict[str, int]) -> None:
    x, y = op_inputs(op, dims, "fp32")
    wanted = channels_last(duplicate_up(channels_first(x), dims["N"], time, False)) + y
    assert torch.equal(op_named(op).reference(x, y), wanted)


def test_channels_that_do_not_suit_the_kernel_are_named() -> None:
    dims = {"T": 1, "Y": 2, "X": 2, "C": 16, "N": 48}
    with pytest.raises(LongtakeError, match=r"does not take these channels[\s\S]*16 to 48"):
        kernel_of("duplicate_up").macros(dims)
