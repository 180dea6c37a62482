"""Put a causal convolution's history before its input: one launch, gridDim.y frames; with norm and SiLU or without."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from longtake.errors import LongtakeError
from longtake.plugins.kernels import WARP, Call, Dims, Kernel, Macros, blocks_of
from longtake.plugins.spec import Op, OpSpec, TensorSpec
from longtake.plugins.stream_extend.reference import CHANNEL_NORM_EPS, norm_silu_extend, stream_extend

THREADS, UNIT = 256, 8
LOADS = 2  # units that a thread holds at least, to have several loads under way
MAX_HISTORY = 2  # frames
SIZES: tuple[dict[str, int], ...] = (
    {"T": 4, "Y": 9, "X": 7, "C": 256, "F": 2},
    {"T": 1, "Y": 5, "X": 7, "C": 1024, "F": 2},
    {"T": 2, "Y": 3, "X": 11, "C": 48, "F": 2},
    {"T": 3, "Y": 1, "X": 1, "C": 16, "F": 1},
    {"T": 1, "Y": 4, "X": 40, "C": 512, "F": 1},
)


def _spec(norm: bool) -> OpSpec:
    """Put a causal convolution's history before x, and the end of that over the history, in place. `norm`: x goes
    through an RMS norm over its channels (eps is `CHANNEL_NORM_EPS`) and SiLU first."""
    x, cache, y = (TensorSpec(n, "compute", (t, "Y", "X", "C")) for n, t in (("x", "T"), ("cache", "F"), ("y", "T+F")))
    gamma = (TensorSpec("gamma", "compute", ("C",)),) if norm else ()
    name = "norm_silu_extend" if norm else "stream_extend"
    aliases = ((1, 1 + len(gamma)),)
    return OpSpec(name, (x, *gamma, cache), (y, cache), aliases, may_share=((0, 0),), check=partial(_check, name))


def _check(name: str, dims: Dims) -> None:
    if dims["F"] > MAX_HISTORY:
        raise LongtakeError(f"{name}: too long a history", got=dims["F"], expected=f"at most {MAX_HISTORY} frames")


def _layout(dims: Dims) -> tuple[int, int, int]:
    """Threads that share a position, units of 8 channels that each holds, and positions that they do at once."""
    row = blocks_of(dims["C"], UNIT)
    lanes = min(WARP, 1 << (row - 1).bit_length())
    units = blocks_of(row, lanes)
    return lanes, units, max(1, LOADS // units)


def _macros(norm: bool, dims: Dims) -> Macros:
    lanes, units, rows = _layout(dims)
    sizes = {"CHANNELS": dims["C"], "PAST": dims["F"], "LANES": lanes, "UNITS": units, "ROWS": rows}
    return {**sizes, "THREADS": THREADS, "NORM": int(norm), "EPS": f"{CHANNEL_NORM_EPS!r}f"}


def _calls(norm: bool, dims: Dims) -> tuple[Call, ...]:
    lanes, _, rows = _layout(dims)
    positions = dims["Y"] * dims["X"]
    grid = blocks_of(positions, rows * (THREADS // lanes)), dims["T"]
    tensors = ("x", "gamma", "cache", "y") if norm else ("x", "cache", "y")
    return (Call("stream_extend", grid, THREADS, (*tensors, dims["T"], positions)),)


def _kernel(norm: bool) -> Kernel:
    return Kernel(Path(__file__).with_name("kernel.cu"), partial(_macros, norm), partial(_calls, norm))


OPS = (
    Op(_spec(True), norm_silu_extend, (_kernel(True),), SIZES, tolerance={"bf16": 1e-3, "fp32": 1e-6}),
    Op(_spec(False), stream_extend, (_kernel(False),), SIZES),
)
