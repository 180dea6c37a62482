"""Weight unpacking: one launch, a thread a block of 16."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from longtake.plugins.kernels import Call, Dims, Kernel, Macros, blocks_of
from longtake.plugins.nvfp4.reference import limit_macros
from longtake.plugins.nvfp4_dequantize.reference import nvfp4_dequantize, nvfp4_dequantize_scaled
from longtake.plugins.spec import Op, OpSpec, TensorSpec

THREADS = 256


def _spec(scaled: bool) -> OpSpec:
    """E2M1 value x E4M3 block scale, exact in bf16, for whoever applies the tensor's scale to the product's output; `scaled`:
    times that scale as well, and rounded."""
    packed = TensorSpec("values", "int8", ("N", "K/2")), TensorSpec("scales", "int8", ("N", "K/16"))
    inputs = (*packed, TensorSpec("scale", "fp32", ())) if scaled else packed
    name = "nvfp4_dequantize_scaled" if scaled else "nvfp4_dequantize"
    return OpSpec(name, inputs=inputs, outputs=(TensorSpec("weight", "compute", ("N", "K")),))


def _macros(scaled: bool, dims: Dims) -> Macros:
    return {"THREADS": THREADS, "SCALED": int(scaled), **limit_macros("static_6")}


def _calls(scaled: bool, dims: Dims) -> tuple[Call, ...]:
    units = dims["N"] * dims["K"] // 16
    return (Call("nvfp4_dequantize", (blocks_of(units, THREADS), 1), THREADS, (*_spec(scaled).names, units)),)


def _inputs(spec: OpSpec, dims: Dims, compute: torch.dtype, generator: torch.Generator) -> Mapping[str, Tensor]:
    """Any codes, and scales that are numbers."""
    rows, columns = dims["N"], dims["K"]
    values = torch.randint(-128, 128, (rows, columns // 2), generator=generator).to(torch.int8)
    scales = torch.randint(0, 127, (rows, columns // 16), generator=generator).to(torch.int8)
    return {"values": values, "scales": scales}


def _op(scaled: bool) -> Op:
    return Op(
        _spec(scaled),
        nvfp4_dequantize_scaled if scaled else nvfp4_dequantize,
        ways=(Kernel(Path(__file__).with_name("kernel.cu"), partial(_macros, scaled), partial(_calls, scaled)),),
        sizes=({"N": 256, "K": 1024}, {"N": 5, "K": 48}, {"N": 1, "K": 16}),
        inputs=_inputs,
    )


OPS = (_op(scaled=False), _op(scaled=True))
