"""What lies between a block's linears: the kernels' text on the CPU and on a GPU against the references; these against
the DiT's own arithmetic and ModelOpt's rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from longtake.plugins import pointwise, registry
from longtake.plugins.cases import op_inputs
from longtake.plugins.quantize_fp8.op import SIZES as BLOCK_SIZES
from longtake.plugins.registry import op_named
from longtake.plugins.run import run_kernel

BLOCK_OPS = [op.name for folder in (registry.block_norm, registry.quantize_fp8) for op in folder.OPS]
ops = pytest.mark.parametrize("op", BLOCK_OPS)
dtypes = pytest.mark.parametrize("dtype", ("bf16", "fp32"))
FP8 = torch.float8_e4m3fn
STEP = {torch.bfloat16: 2**-7, torch.float32: 1e-5, FP8: 2**-3}


def check(got: Any, wanted: Any, least: float = 1e-5) -> None:
    """Equal but where another order of a sum, or another tanh, rounds a number the other way: a step off, or two for the
    few (one in 100,000) that are rounded twice on their way."""
    for g, w in zip(*(out if isinstance(out, tuple) else (out,) for out in (got, wanted)), strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
        here = g.cpu().float()
        floor = 0.02 if w.dtype == FP8 else least
        torch.testing.assert_close(here, w.float(), rtol=2 * STEP[w.dtype], atol=floor)
        far = (here - w.float()).abs() > floor + STEP[w.dtype] * w.float().abs()
        assert far.double().mean() <= 1e-5
        if w.dtype != torch.float32:
            assert (here != w.float()).double().mean() < 5e-3


@ops
@pytest.mark.parametrize("dtype, dims, reverse", (("bf16", BLOCK_SIZES[3], False), ("fp32", BLOCK_SIZES[2], True)))
def test_the_kernels_text_equals_the_reference(
    host_device: Any, op: str, dtype: str, dims: dict[str, int], reverse: bool
) -> None:
    host_device.reverse = reverse
    inputs = op_inputs(op, dims, dtype)
    check(tuple(host_device.run(op, *inputs)), op_named(op).reference(*inputs))


@pytest.mark.parametrize("op", ["gated_norm_modulate", "gated_norm_affine_fp8"])
def test_a_row_of_one_value_and_a_large_mean(host_device: Any, op: str) -> None:
    x, y, *rest = op_inputs(op, BLOCK_SIZES[0], "bf16")
    for base in (x * 0, x * 0 + 3.0, x + 100.0):
        check(tuple(host_device.run(op, base, y, *rest)), op_named(op).reference(base, y, *rest), least=1e-4)


@pytest.mark.gpu
@ops
@dtypes
@pytest.mark.parametrize(
    "dims", [*BLOCK_SIZES, {"L": 7040, "C": 3072, "F": 8}], ids=lambda d: "L{L}C{C}F{F}".format(**d)
)
def test_the_kernel_equals_the_reference(op: str, dtype: str, dims: dict[str, int]) -> None:
    inputs = op_inputs(op, dims, dtype)
    check(run_kernel(op, *(t.cuda() for t in inputs)), op_named(op).reference(*inputs))


def table(e: Tensor, modulation: Tensor) -> tuple[Tensor, ...]:
    return (modulation.float() + e.float()).unbind(-2)


@dtypes
def test_the_references_are_what_the_dit_computes(dtype: str) -> None:
    """Line by line what training/models/wan/dit.py's Block does between its linears."""
    dims = BLOCK_SIZES[1]
    x, y, e, modulation, following = op_inputs("gated_norm_modulate", dims, dtype)
    m, after = table(e, modulation), table(e, following)
    assert torch.equal(op_named("norm_modulate").reference(x, e, modulation), pointwise.modulate(x, 1e-6, m[1], m[0]))
    wide, n = op_named("gated_norm_modulate").reference(x, y, e, modulation, following)
    assert torch.equal(wide, pointwise.gated_add(x, y, m[5]))
    assert torch.equal(n, pointwise.modulate(wide, 1e-6, after[1], after[0]))
    wide, n = op_named("residual_norm_modulate").reference(x, y, e, modulation)
    assert torch.equal(wide, x + y)
    assert torch.equal(n, pointwise.modulate(wide, 1e-6, m[4], m[3]))
    weight, bias = op_inputs("gated_norm_affine", dims, dtype)[4:]
    wide, n = op_named("gated_norm_affine").reference(x, y, e, modulation, weight, bias)
    assert torch.equal(wide, pointwise.gated_add(x, y, m[2]))
    assert torch.equal(n, pointwise.layer_norm(wide, 1e-6, weight, bias).to(x.dtype))


def test_codes_are_those_of_modelopt() -> None:
    """As export/lower_fp8 and ModelOpt find them; a product with scale and bias is the linear's output."""
    amax = 3.0
    x, scale, bias, _ = op_inputs("gelu_quantize_fp8", BLOCK_SIZES[0], "fp32")
    factor = torch.tensor([448.0 / amax])
    wanted = (x * factor).clamp(-448, 448).to(FP8)
    assert torch.equal(op_named("quantize_fp8").reference(x, factor).float(), wanted.float())
    wanted = functional.gelu(x * scale + bias, approximate="tanh")
    got = op_named("gelu_quantize_fp8").reference(x, scale, bias, factor)
    assert torch.equal(got.float(), (wanted * factor).clamp(-448, 448).to(FP8).float())


@pytest.mark.parametrize(
    "op", [name for name in BLOCK_OPS if name.endswith("_fp8") and "y" in {t.name for t in op_named(name).spec.inputs}]
)
def test_scale_and_bias_of_the_product_are_applied_first(op: str) -> None:
    given = dict(zip((t.name for t in op_named(op).spec.inputs), op_inputs(op, BLOCK_SIZES[0], "fp32")))
    wide, codes = op_named(op).reference(*given.values())
    plain = {k: v for k, v in given.items() if k not in ("y_scale", "y_bias", "factor")}
    plain["y"] = given["y"] * given["y_scale"] + given["y_bias"]
    wanted, n = op_named(op.removesuffix("_fp8")).reference(*plain.values())
    assert torch.equal(wide, wanted)
    assert torch.equal(codes.float(), op_named("quantize_fp8").reference(n, given["factor"]).float())
