"""Attention over slots with lengths: one launch, a thread block for 16 queries of one head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from longtake.plugins.frame_attention.reference import frame_attention
from longtake.plugins.kernels import TABLE_LENGTH, Call, Dims, Kernel, blocks_of
from longtake.plugins.spec import Op, OpSpec, TensorSpec

WARPS, QUERIES_PER_WARP = 8, 2
SIZES: tuple[dict[str, int], ...] = (
    {"T": 3, "P": 64, "S": 3, "L": 256, "H": 3, "D": 48},
    {"T": 1, "P": 40, "S": 3, "L": 48, "H": 2, "D": 112},
    {"T": 3, "P": 7, "S": 3, "L": 28, "H": 2, "D": 24},
    {"T": 1, "P": 1, "S": 1, "L": 2, "H": 1, "D": 8},
)


def _heads(name: str) -> TensorSpec:
    return TensorSpec(name, "compute", ("T", "P", "H", "D"))


SPEC = OpSpec(
    "frame_attention",
    inputs=(
        *map(_heads, "qkv"),
        TensorSpec("keys", "compute", ("S", "L", "H", "D")),
        TensorSpec("values", "compute", ("S", "L", "H", "D")),
        TensorSpec("lengths", "int32", ("S",)),
        TensorSpec("table", "int32", ("W",)),
    ),
    outputs=(_heads("out"),),
    multiple=4,
)


def _calls(dims: Dims) -> tuple[Call, ...]:
    tokens = dims["T"] * dims["P"]
    grid = (blocks_of(tokens, WARPS * QUERIES_PER_WARP), dims["H"])
    sizes = (TABLE_LENGTH, dims["S"], dims["L"], tokens, dims["H"])
    return (Call("frame_attention", grid, 32 * WARPS, (*SPEC.names, *sizes)),)


def _inputs(spec: OpSpec, dims: Dims, compute: torch.dtype, generator: torch.Generator) -> Mapping[str, Tensor]:
    """The first slot full, the others less so."""
    lengths = [dims["L"], *[max(1, dims["L"] * 3 // 4)] * (dims["S"] - 1)]
    return {"lengths": torch.tensor(lengths, dtype=torch.int32)}


OPS = (
    Op(
        SPEC,
        frame_attention,
        ways=(
            Kernel(
                Path(__file__).with_name("kernel.cu"),
                lambda dims: {"HEAD_DIM": dims["D"], "WARPS": WARPS, "QUERIES": QUERIES_PER_WARP},
                _calls,
            ),
        ),
        sizes=SIZES,
        inputs=_inputs,
        indices=((0, -1), (-1,)),
        tolerance={"bf16": 1e-2, "fp32": 1e-5},
    ),
)
