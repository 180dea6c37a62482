"""The stream extension's kernel: one launch, gridDim.y frames; with norm and SiLU or without."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from longtake.plugins.kernels import Call, Dims, Kernels, blocks_of
from longtake.plugins.spec import CHANNEL_NORM_EPS, stream_extend

THREADS, WARP, UNIT = 256, 32, 8
LOADS = 2  # units that a thread holds at least, to have several loads under way


def _layout(dims: Dims) -> tuple[int, int, int]:
    """Threads that share a position, units of 8 channels that each holds, and positions that they do at once."""
    row = blocks_of(dims["C"], UNIT)
    lanes = min(WARP, 1 << (row - 1).bit_length())
    units = blocks_of(row, lanes)
    return lanes, units, max(1, LOADS // units)


def _macros(dims: Dims, norm: bool) -> dict[str, str | int | float]:
    lanes, units, rows = _layout(dims)
    sizes = {"CHANNELS": dims["C"], "PAST": dims["F"], "LANES": lanes, "UNITS": units, "ROWS": rows}
    return {**sizes, "THREADS": THREADS, "NORM": int(norm), "EPS": f"{CHANNEL_NORM_EPS!r}f"}


def _calls(dims: Dims, norm: bool) -> tuple[Call, ...]:
    lanes, _, rows = _layout(dims)
    positions = dims["Y"] * dims["X"]
    grid = blocks_of(positions, rows * (THREADS // lanes)), dims["T"]
    tensors = ("x", "gamma", "cache", "y") if norm else ("x", "cache", "y")
    return (Call("stream_extend", grid, THREADS, (*tensors, dims["T"], positions)),)


def _kernels(norm: bool) -> Kernels:
    source = Path(__file__).with_name("kernel.cu")
    return Kernels(stream_extend(norm), source, partial(_macros, norm=norm), partial(_calls, norm=norm))


KERNELS = {kernels.spec.name: kernels for kernels in map(_kernels, (True, False))}
