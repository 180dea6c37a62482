"""Linears that a library computes, in bf16 or of E4M3 codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from longtake.machine.capability import linear_method
from longtake.plugins.kernels import Dims
from longtake.plugins.linear.reference import linear_bf16, linear_fp8, linear_gelu_bf16, linear_rows_fp8
from longtake.plugins.spec import Library, Op, OpSpec, TensorSpec

SIZES: tuple[dict[str, int], ...] = ({"T": 64, "N": 48, "K": 96}, {"T": 200, "N": 512, "K": 256})
OUT = TensorSpec("out", "compute", ("T", "N"))
BIAS = TensorSpec("bias", "compute", ("N",))


def _bf16(name: str) -> OpSpec:
    """x W^T + b, then GELU (tanh) if it is of the name, in fp32, rounded once."""
    x, weight = TensorSpec("x", "compute", ("T", "K")), TensorSpec("weight", "compute", ("N", "K"))
    return OpSpec(name, inputs=(x, weight, BIAS), outputs=(OUT,))


def _fp8(name: str, *ends: TensorSpec) -> OpSpec:
    """x W^T of codes as they stand, rounded to bf16: scales and bias are of the op that follows. With `ends`: a scale a
    row of W, which is the activation's as well, and the bias, both in fp32 before the one rounding."""
    x, weight = TensorSpec("x", "fp8", ("T", "K")), TensorSpec("weight", "fp8", ("N", "K"))
    return OpSpec(name, inputs=(x, weight, *ends), outputs=(OUT,))


def _launchers() -> Mapping[str, Callable[..., Any]]:
    from longtake.plugins.linear.library import CublasLtLinear

    return {"cublaslt": CublasLtLinear}


def _methods(kind: str, compute_capability: str, dims: Dims, attention: str) -> Sequence[str]:
    method = linear_method(compute_capability, kind)
    return [method] if method else []


def _op(spec: OpSpec, reference: Callable[..., Any], kind: str) -> Op:
    return Op(
        spec,
        reference,
        ways=(Library("cublaslt", _launchers),),
        sizes=SIZES,
        methods=partial(_methods, kind),
        otherwise="set linears: engine in the recipe",
    )


LINEAR_BF16 = _op(_bf16("linear_bf16"), linear_bf16, "bf16")
OPS = (
    LINEAR_BF16,
    _op(_bf16("linear_gelu_bf16"), linear_gelu_bf16, "bf16"),
    _op(_fp8("linear_fp8"), linear_fp8, "fp8"),
    _op(_fp8("linear_rows_fp8", TensorSpec("scale", "fp32", ("N",)), BIAS), linear_rows_fp8, "fp8"),
)
