"""The quantization kernels: one launch, gridDim.x columns of thread blocks, gridDim.y groups of ROWS tokens."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from longtake.plugins.kernels import Call, Dims, Kernels, blocks_of
from longtake.plugins.spec import quantize_fp8

MAX_THREADS, WARP, UNIT = 128, 32, 16
ROWS = 8  # tokens of a thread: what a feature has of its own is loaded once for them, and several loads are under way


def _threads(dims: Dims) -> int:
    """Threads of a block, a unit of 16 features each: whole warps, no more than a row needs."""
    return min(MAX_THREADS, WARP * blocks_of(dims["C"] // UNIT, WARP))


def _macros(dims: Dims, gelu: bool) -> dict[str, str | int | float]:
    return {"CHANNELS": dims["C"], "THREADS": _threads(dims), "ROWS": ROWS, "GELU": int(gelu)}


def _calls(dims: Dims, gelu: bool) -> tuple[Call, ...]:
    spec = quantize_fp8(gelu)
    tensors = (t.name for t in (*spec.inputs, *spec.outputs))
    grid = blocks_of(dims["C"] // UNIT, _threads(dims)), blocks_of(dims["L"], ROWS)
    return (Call("quantize_fp8", grid, _threads(dims), (*tensors, dims["L"])),)


def _kernels(gelu: bool) -> Kernels:
    source = Path(__file__).with_name("kernel.cu")
    return Kernels(quantize_fp8(gelu), source, partial(_macros, gelu=gelu), partial(_calls, gelu=gelu))


KERNELS = {kernels.spec.name: kernels for kernels in map(_kernels, (False, True))}
