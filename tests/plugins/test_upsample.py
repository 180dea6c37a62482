"""Upsampling and its shortcut: the kernels' text on the CPU, and on a GPU, against the references; these against the VAE."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longtake.errors import LongtakeError
from longtake.plugins.cases import DUPLICATE_SIZES, UP_SIZES, op_inputs
from longtake.plugins.kernels import kernels_of
from longtake.plugins.launch import compile_kernels, run_kernel
from longtake.plugins.ops import REFERENCES
from longtake.plugins.spec import DUPLICATE_OPS, UP_OPS
from longtake.training.models.wan.vae_layers import channels_first, channels_last, duplicate_up

CASES = [(op, d) for op in UP_OPS for d in UP_SIZES] + [(op, d) for op in DUPLICATE_OPS for d in DUPLICATE_SIZES]
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
    assert torch.equal(got, REFERENCES[op](*given))


@pytest.mark.gpu
@cases
@dtypes
def test_the_kernel_equals_the_reference(op: str, dims: dict[str, int], dtype: str) -> None:
    given = op_inputs(op, dims, dtype)
    assert torch.equal(run_kernel(op, *(t.cuda() for t in given)).cpu(), REFERENCES[op](*given))


@pytest.mark.parametrize("op", (*UP_OPS, *DUPLICATE_OPS))
@pytest.mark.parametrize("arch", ("sm_80", "sm_90a", "sm_120a"))
def test_the_kernel_compiles(op: str, arch: str) -> None:
    assert compile_kernels(kernels_of(op), {"T": 4, "Y": 176, "X": 320, "C": 1024, "N": 512}, "bf16", arch)


@pytest.mark.parametrize("op, time", DUPLICATE_OPS.items())
@pytest.mark.parametrize("dims", DUPLICATE_SIZES, ids=lambda d: f"{d['C']}to{d['N']}")
def test_the_reference_is_the_vaes_shortcut(op: str, time: int, dims: dict[str, int]) -> None:
    x, y = op_inputs(op, dims, "fp32")
    wanted = channels_last(duplicate_up(channels_first(x), dims["N"], time, False)) + y
    assert torch.equal(REFERENCES[op](x, y), wanted)


def test_channels_that_do_not_suit_the_kernel_are_named() -> None:
    dims = {"T": 1, "Y": 2, "X": 2, "C": 16, "N": 48}
    with pytest.raises(LongtakeError, match=r"does not take these channels[\s\S]*16 to 48"):
        kernels_of("duplicate_up").macros(dims)
