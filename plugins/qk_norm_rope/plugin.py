"""The q/k normalisation kernel: one launch, a thread block for a token's queries and one for its keys."""

from __future__ import annotations

from pathlib import Path

from longtake.plugins.kernels import Call, Dims, Kernels, blocks_of
from longtake.plugins.spec import QK_NORM_EPS, qk_norm_rope

MAX_THREADS, WARP = 256, 32


def _units_and_threads(dims: Dims) -> tuple[int, int]:
    """Units of 16 elements that a thread holds, and threads of a block: whole warps, as few as that allows."""
    row = dims["H"] * dims["D"] // 16
    units = blocks_of(row, MAX_THREADS)
    return units, WARP * blocks_of(blocks_of(row, units), WARP)


def _macros(dims: Dims) -> dict[str, str | int | float]:
    units, threads = _units_and_threads(dims)
    sizes = {"HEADS": dims["H"], "HEAD_DIM": dims["D"], "UNITS": units, "THREADS": threads}
    return {**sizes, "EPS": f"{QK_NORM_EPS!r}f"}


def _calls(dims: Dims) -> tuple[Call, ...]:
    tensors = [t.name for t in (*_SPEC.inputs, *_SPEC.outputs)]
    return (Call("qk_norm_rope", (dims["L"], 2), _units_and_threads(dims)[1], tuple(tensors)),)


_SPEC = qk_norm_rope()
KERNELS = {_SPEC.name: Kernels(_SPEC, Path(__file__).with_name("kernel.cu"), _macros, _calls)}
