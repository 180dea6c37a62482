"""Quantization to E4M3: one launch, gridDim.x columns of thread blocks, gridDim.y groups of ROWS tokens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from longtake.plugins.kernels import WARP, Call, Dims, Kernel, Macros, blocks_of
from longtake.plugins.quantize_fp8.reference import gelu_quantize_fp8, quantize_fp8
from longtake.plugins.spec import Op, OpSpec, TensorSpec

MAX_THREADS, UNIT = 128, 16
ROWS = 8  # tokens of a thread: what a feature has of its own is loaded once for them, and several loads are under way
FACTOR = TensorSpec("factor", "fp32", ("1",))  # 448 / amax: what brings a tensor into E4M3's range
SIZES: tuple[dict[str, int], ...] = (
    {"L": 128, "C": 256, "F": 4},
    {"L": 22, "C": 3072, "F": 2},
    {"L": 7, "C": 48, "F": 1},
    {"L": 27, "C": 4112, "F": 3},
    {"L": 9, "C": 16, "F": 9},
)
TOLERANCE = {"bf16": 4e-3, "fp32": 4e-3}  # relative error of E4M3 codes where a few roundings go the other way


def _spec(gelu: bool) -> OpSpec:
    """E4M3 codes of x * factor; `gelu`: of GELU(x * scale + bias), where x is a product without its scale and bias."""
    ends = (TensorSpec("scale", "fp32", ("C",)), TensorSpec("bias", "compute", ("C",))) if gelu else ()
    inputs = (TensorSpec("x", "compute", ("L", "C")), *ends, FACTOR)
    codes = TensorSpec("codes", "fp8", ("L", "C"))
    return OpSpec("gelu_quantize_fp8" if gelu else "quantize_fp8", inputs, (codes,))


def _threads(dims: Dims) -> int:
    """Threads of a block, a unit of 16 features each: whole warps, no more than a row needs."""
    return min(MAX_THREADS, WARP * blocks_of(dims["C"] // UNIT, WARP))


def _macros(gelu: bool, dims: Dims) -> Macros:
    return {"CHANNELS": dims["C"], "THREADS": _threads(dims), "ROWS": ROWS, "GELU": int(gelu)}


def _calls(gelu: bool, dims: Dims) -> tuple[Call, ...]:
    grid = blocks_of(dims["C"] // UNIT, _threads(dims)), blocks_of(dims["L"], ROWS)
    return (Call("quantize_fp8", grid, _threads(dims), (*_spec(gelu).names, dims["L"])),)


def factor_beyond_range(
    spec: OpSpec, dims: Dims, compute: torch.dtype, generator: torch.Generator
) -> Mapping[str, Tensor]:
    """Of values from -4 to 4, some go beyond E4M3's range."""
    return {"factor": torch.tensor([150.0])}


def _op(gelu: bool) -> Op:
    kernel = Kernel(Path(__file__).with_name("kernel.cu"), partial(_macros, gelu), partial(_calls, gelu))
    reference = gelu_quantize_fp8 if gelu else quantize_fp8
    return Op(_spec(gelu), reference, (kernel,), SIZES, factor_beyond_range, tolerance=TOLERANCE)


OPS = (_op(gelu=False), _op(gelu=True))
