"""RMSNorm and RoPE of queries and keys: one launch, a thread block for a token's queries and one for its keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from longtake.plugins.cache_format import SIZES, block
from longtake.plugins.kernels import Call, Dims, Kernel, Macros, row_layout
from longtake.plugins.pointwise import QK_NORM_EPS
from longtake.plugins.qk_norm_rope.reference import qk_norm_rope
from longtake.plugins.spec import Op, OpSpec, TensorSpec

SPEC = OpSpec(
    "qk_norm_rope",
    inputs=(
        block("q"),
        block("k"),
        *(TensorSpec(f"{x}_weight", "compute", ("H*D",)) for x in "qk"),
        *(TensorSpec(f"rope_{f}", "fp32", ("L", "D/2")) for f in ("cos", "sin")),
    ),
    outputs=(block("q_out"), block("k_out")),
)


def _macros(dims: Dims) -> Macros:
    units, threads = row_layout(dims["H"] * dims["D"])
    sizes = {"HEADS": dims["H"], "HEAD_DIM": dims["D"], "UNITS": units, "THREADS": threads}
    return {**sizes, "EPS": f"{QK_NORM_EPS!r}f"}


def _calls(dims: Dims) -> tuple[Call, ...]:
    return (Call("qk_norm_rope", (dims["L"], 2), row_layout(dims["H"] * dims["D"])[1], SPEC.names),)


def _inputs(spec: OpSpec, dims: Dims, compute: torch.dtype, generator: torch.Generator) -> Mapping[str, Tensor]:
    """Angles that slow down along a head."""
    angles = torch.outer(torch.arange(dims["L"]), torch.logspace(0, -4, dims["D"] // 2))
    return {"rope_cos": angles.cos(), "rope_sin": angles.sin()}


OPS = (
    Op(
        SPEC,
        qk_norm_rope,
        ways=(Kernel(Path(__file__).with_name("kernel.cu"), _macros, _calls),),
        sizes=SIZES,
        inputs=_inputs,
        tolerance={"bf16": 1e-3, "fp32": 1e-6},
    ),
)
