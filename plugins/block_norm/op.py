"""The block norms: one launch each, gridDim.y frames; RMSNorm of cross-attention's queries beside them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from longtake.errors import LongtakeError
from longtake.plugins.block_norm.reference import BLOCK_NORM_EPS, BLOCK_NORMS, block_norm, rms_norm
from longtake.plugins.kernels import Call, Dims, Kernel, Macros, blocks_of, row_layout
from longtake.plugins.pointwise import QK_NORM_EPS
from longtake.plugins.quantize_fp8.op import FACTOR, SIZES, TOLERANCE, factor_beyond_range
from longtake.plugins.spec import Op, OpSpec, TensorSpec

ROWS = 8  # tokens that a thread block does one after another
NONE = -1


def _features(name: str) -> TensorSpec:
    return TensorSpec(name, "compute", ("C",))


def _tokens(name: str) -> TensorSpec:
    return TensorSpec(name, "compute", ("L", "C"))


def _spec(name: str, fp8: bool) -> OpSpec:
    """x' = x + gate * y and n = LN(x') * (1 + scale) + shift in fp32 (eps is `BLOCK_NORM_EPS`), modulated by the sum of a
    block's table and that of the frame's time, e. fp8: y is a product without its scale and bias, and n comes out as
    codes of n * factor."""
    form, one = BLOCK_NORMS[name], ("1", "6", "C")
    inputs = [_tokens("x")]
    inputs += [_tokens("y")] if form.residual else []
    inputs += [TensorSpec("y_scale", "fp32", ("C",)), _features("y_bias")] if form.residual and fp8 else []
    inputs += [TensorSpec("e", "compute", ("F", "6", "C")), TensorSpec("modulation", "compute", one)]
    inputs += [TensorSpec("next_modulation", "compute", one)] if form.following else []
    inputs += [_features("weight"), _features("bias")] if form.scale is None else []
    inputs += [FACTOR] if fp8 else []
    outputs = [_tokens("x_out")] if form.residual else []
    outputs += [TensorSpec("n", "fp8" if fp8 else "compute", ("L", "C"))]
    full = f"{name}_fp8" if fp8 else name
    return OpSpec(full, tuple(inputs), tuple(outputs), check=partial(_check, full))


def _check(name: str, dims: Dims) -> None:
    if dims["L"] % dims["F"]:
        raise LongtakeError(
            f"{name}: the frames do not share the tokens alike",
            got=f"L={dims['L']}, F={dims['F']}",
            expected="a multiple of F",
        )


def _sizes(dims: Dims) -> Macros:
    units, threads = row_layout(dims["C"])
    return {"CHANNELS": dims["C"], "UNITS": units, "THREADS": threads}


def _macros(name: str, fp8: bool, dims: Dims) -> Macros:
    form = BLOCK_NORMS[name]
    flags = {"RESIDUAL": form.residual, "FOLLOWING": form.following, "AFFINE": form.scale is None, "FP8": fp8}
    rows = {"GATE": form.gate, "SCALE": form.scale, "SHIFT": form.shift}
    known = {key: int(flag) for key, flag in flags.items()}
    known |= {key: NONE if row is None else row for key, row in rows.items()}
    return {**_sizes(dims), **known, "ROWS": ROWS, "EPS": f"{BLOCK_NORM_EPS!r}f"}


def _calls(spec: OpSpec, dims: Dims) -> tuple[Call, ...]:
    tokens = dims["L"] // dims["F"]
    grid = blocks_of(tokens, ROWS), dims["F"]
    return (Call("block_norm", grid, row_layout(dims["C"])[1], (*spec.names, tokens)),)


def _op(name: str, fp8: bool) -> Op:
    spec = _spec(name, fp8)
    names = [tensor.name for tensor in spec.inputs]

    def reference(*tensors: Tensor) -> Any:
        return block_norm(name, fp8, dict(zip(names, tensors, strict=True)))

    return Op(
        spec,
        reference,
        ways=(Kernel(Path(__file__).with_name("kernel.cu"), partial(_macros, name, fp8), partial(_calls, spec)),),
        sizes=SIZES,
        inputs=factor_beyond_range if fp8 else None,
        tolerance=TOLERANCE if fp8 else {"bf16": 1e-3, "fp32": 1e-6},
        quantized="" if fp8 else f"{name}_fp8",
    )


RMS_NORM = OpSpec("rms_norm", inputs=(_tokens("x"), _features("weight")), outputs=(_tokens("n"),))
"""RMSNorm over a token's whole vector (eps is `QK_NORM_EPS`), of cross-attention's queries."""


_RMS = Kernel(
    Path(__file__).with_name("rms_norm.cu"),
    macros=lambda dims: {**_sizes(dims), "EPS": f"{QK_NORM_EPS!r}f"},
    calls=lambda dims: (Call("rms_norm", (dims["L"], 1), row_layout(dims["C"])[1], RMS_NORM.names),),
)
OPS = (
    *(_op(name, fp8) for name in BLOCK_NORMS for fp8 in (False, True)),
    Op(RMS_NORM, rms_norm, (_RMS,), SIZES, tolerance={"bf16": 1e-3, "fp32": 1e-6}),
)
