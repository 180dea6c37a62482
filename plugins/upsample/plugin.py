"""The kernels of upsampling and of the shortcut beside it: one launch each, gridDim.y frames."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from longtake.errors import LongtakeError
from longtake.plugins.kernels import Call, Dims, Kernels, blocks_of
from longtake.plugins.spec import DUPLICATE_OPS, UP_OPS, duplicate_up, upsample

THREADS, UNIT = 256, 8
SOURCE = Path(__file__).with_name("kernel.cu")


def _upsample_macros(dims: Dims, time: int) -> dict[str, str | int | float]:
    return {"UPSAMPLE": 1, "CHANNELS": dims["C"] // time, "TIME": time, "THREADS": THREADS}


def _upsample_calls(dims: Dims) -> tuple[Call, ...]:
    positions = dims["Y"] * dims["X"]
    grid = blocks_of(positions * dims["C"] // UNIT, THREADS), dims["T"]
    return (Call("upsample", grid, THREADS, ("x", "out", positions, dims["X"])),)


def _duplicate_macros(dims: Dims, time: int) -> dict[str, str | int | float]:
    ratio, rest = divmod(dims["C"], dims["N"])
    if rest or dims["N"] % UNIT or (4 * time) % ratio:
        raise LongtakeError(
            "duplicate_up: the kernel does not take these channels", got=f"{dims['C']} to {dims['N']}",
            expected=f"a multiple of {UNIT}, from 1 to {4 * time} times as many, a power of 2",
        )  # fmt: skip
    return {"UPSAMPLE": 0, "CHANNELS": dims["N"], "RATIO": ratio, "TIME": time, "THREADS": THREADS}


def _duplicate_calls(dims: Dims) -> tuple[Call, ...]:
    positions = dims["Y"] * dims["X"]
    grid = blocks_of(positions * dims["N"] // UNIT, THREADS), dims["T"]
    return (Call("duplicate_up", grid, THREADS, ("x", "y", "out", positions, dims["X"])),)


KERNELS = {
    **{n: Kernels(upsample(n), SOURCE, partial(_upsample_macros, time=t), _upsample_calls) for n, t in UP_OPS.items()},
    **{
        n: Kernels(duplicate_up(n), SOURCE, partial(_duplicate_macros, time=t), _duplicate_calls)
        for n, t in DUPLICATE_OPS.items()
    },
}
