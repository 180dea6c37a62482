"""The block norms' kernels: one launch each, gridDim.y frames; RMSNorm of cross-attention's queries beside them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from longtake.plugins.kernels import Call, Dims, Kernels, blocks_of
from longtake.plugins.spec import BLOCK_NORM_EPS, BLOCK_NORMS, QK_NORM_EPS, block_norm, rms_norm

MAX_THREADS, WARP, UNIT = 256, 32, 16
ROWS = 8  # tokens that a thread block does one after another
NONE = -1


def _units_and_threads(dims: Dims) -> tuple[int, int]:
    """Units of 16 elements that a thread holds, and threads of a block: whole warps, as few as that allows."""
    row = dims["C"] // UNIT
    units = blocks_of(row, MAX_THREADS)
    return units, WARP * blocks_of(blocks_of(row, units), WARP)


def _sizes(dims: Dims) -> dict[str, str | int | float]:
    units, threads = _units_and_threads(dims)
    return {"CHANNELS": dims["C"], "UNITS": units, "THREADS": threads}


def _macros(dims: Dims, name: str, fp8: bool) -> dict[str, str | int | float]:
    form = BLOCK_NORMS[name]
    flags = {"RESIDUAL": form.residual, "FOLLOWING": form.following, "AFFINE": form.scale is None, "FP8": fp8}
    rows = {"GATE": form.gate, "SCALE": form.scale, "SHIFT": form.shift}
    known = {key: int(flag) for key, flag in flags.items()}
    known |= {key: NONE if row is None else row for key, row in rows.items()}
    return {**_sizes(dims), **known, "ROWS": ROWS, "EPS": f"{BLOCK_NORM_EPS!r}f"}


def _calls(dims: Dims, name: str, fp8: bool) -> tuple[Call, ...]:
    spec, tokens = block_norm(name, fp8), dims["L"] // dims["F"]
    tensors = (t.name for t in (*spec.inputs, *spec.outputs))
    grid = blocks_of(tokens, ROWS), dims["F"]
    return (Call("block_norm", grid, _units_and_threads(dims)[1], (*tensors, tokens)),)


def _kernels(name: str, fp8: bool) -> Kernels:
    given: dict[str, Any] = {"name": name, "fp8": fp8}
    source = Path(__file__).with_name("kernel.cu")
    return Kernels(block_norm(name, fp8), source, partial(_macros, **given), partial(_calls, **given))


def _rms_calls(dims: Dims) -> tuple[Call, ...]:
    return (Call("rms_norm", (dims["L"], 1), _units_and_threads(dims)[1], ("x", "weight", "n")),)


_RMS = Kernels(
    rms_norm(),
    Path(__file__).with_name("rms_norm.cu"),
    lambda dims: {**_sizes(dims), "EPS": f"{QK_NORM_EPS!r}f"},
    _rms_calls,
)
KERNELS = {
    kernels.spec.name: kernels
    for kernels in (*(_kernels(name, fp8) for name in BLOCK_NORMS for fp8 in (False, True)), _RMS)
}
