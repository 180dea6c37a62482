"""Sink attention: the portable kernel (one launch, a thread block for 16 queries of one head), and libraries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longtake.machine.capability import attention_methods
from longtake.plugins.cache_format import CACHE_FORMATS, SIZES, block, cache_tensors
from longtake.plugins.kernels import TABLE_LENGTH, Call, Dims, Kernel, blocks_of
from longtake.plugins.kv_cache_write.op import filled_cache
from longtake.plugins.kv_cache_write.reference import RULE
from longtake.plugins.nvfp4.reference import limit_macros
from longtake.plugins.sink_attention.reference import sink_attention_bf16, sink_attention_nvfp4
from longtake.plugins.spec import Library, Op, OpSpec, TensorSpec

WARPS, QUERIES_PER_WARP = 8, 2
REFERENCES: dict[str, Callable[..., Any]] = {"nvfp4": sink_attention_nvfp4, "bf16": sink_attention_bf16}


def _spec(fmt: str) -> OpSpec:
    """Attention of one block's queries over the slots in `table` ([W] int32, 1 <= W; -1 is the fresh k, v)."""
    return OpSpec(
        f"sink_attention_{fmt}",
        inputs=(block("q"), block("k"), block("v"), *cache_tensors(fmt), TensorSpec("table", "int32", ("W",))),
        outputs=(block("out"),),
    )


def _kernel(fmt: str) -> Kernel:
    def calls(dims: Dims) -> tuple[Call, ...]:
        grid = (blocks_of(dims["L"], WARPS * QUERIES_PER_WARP), dims["H"])
        sizes = (TABLE_LENGTH, dims["S"], dims["L"], dims["H"])
        return (Call("sink_attention", grid, 32 * WARPS, (*_spec(fmt).names, *sizes)),)

    return Kernel(
        source=Path(__file__).with_name("kernel.cu"),
        macros=lambda dims: {
            "HEAD_DIM": dims["D"],
            "CACHE_NVFP4": int(fmt == "nvfp4"),
            "WARPS": WARPS,
            "QUERIES": QUERIES_PER_WARP,
            **limit_macros(RULE),
        },
        calls=calls,
    )


def _launchers() -> Mapping[str, Callable[..., Any]]:
    from longtake.plugins.sink_attention.library import LAUNCHERS

    return LAUNCHERS


def _methods(compute_capability: str, dims: Dims, attention: str) -> Sequence[str]:
    return [method for method, _ in attention_methods(compute_capability, attention, dims["D"])]


OPS = tuple(
    Op(
        _spec(fmt),
        REFERENCES[fmt],
        ways=(*(Library(method, _launchers) for method in ("wgmma", "cudnn", "torch")), _kernel(fmt)),
        sizes=SIZES,
        inputs=filled_cache,
        methods=_methods,
        indices=((3, 0, 1, -1), (-1,)),
        tolerance={"bf16": 1e-2, "fp32": 1e-5},
    )
    for fmt in CACHE_FORMATS
)
