"""Sink attention's kernel: one launch, a thread block for 16 queries of one head."""

from __future__ import annotations

from pathlib import Path

from longtake.plugins.kernels import TABLE_LENGTH, Call, Dims, Kernels, blocks_of, limit_macros
from longtake.plugins.kv_cache_write.reference import RULE
from longtake.plugins.spec import CACHE_FORMATS, cache_tensors, sink_attention

WARPS, QUERIES_PER_WARP = 8, 2


def _kernels(fmt: str) -> Kernels:
    tensors = ("q", "k", "v", *(t.name for t in cache_tensors(fmt)), "table", "out")

    def calls(dims: Dims) -> tuple[Call, ...]:
        grid = (blocks_of(dims["L"], WARPS * QUERIES_PER_WARP), dims["H"])
        sizes = (TABLE_LENGTH, dims["S"], dims["L"], dims["H"])
        return (Call("sink_attention", grid, 32 * WARPS, (*tensors, *sizes)),)

    return Kernels(
        spec=sink_attention(fmt),
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


KERNELS = {kernels.spec.name: kernels for kernels in map(_kernels, CACHE_FORMATS)}
