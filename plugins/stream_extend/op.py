"""Put a causal convolution's history before its input: one launch, gridDim.y frames; with norm and SiLU or without, and in
8-bit codes or not."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.plugins.codes import CODES, LARGEST, encode
from longtake.plugins.kernels import WARP, Call, Dims, Kernel, Macros, blocks_of
from longtake.plugins.spec import Op, OpSpec, TensorSpec
from longtake.plugins.stream_extend.reference import (
    CHANNEL_NORM_EPS,
    coded_norm_silu_extend,
    coded_stream_extend,
    norm_silu_extend,
    stream_extend,
)

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


def op_name(norm: bool, codes: str = "") -> str:
    """What the op is called."""
    return ("norm_silu_extend" if norm else "stream_extend") + (f"_{codes}" if codes else "")


def _spec(norm: bool, codes: str = "") -> OpSpec:
    """Put a causal convolution's history before x, and the end of that over the history, in place. `norm`: x goes
    through an RMS norm over its channels (eps is `CHANNEL_NORM_EPS`) and SiLU first. `codes`: the history and what comes
    out are codes of the numbers times `factor`."""
    kind = "int8" if codes else "compute"
    x, cache, y = (
        TensorSpec(n, k, (t, "Y", "X", "C"))
        for n, t, k in (("x", "T", "compute"), ("cache", "F", kind), ("y", "T+F", kind))
    )
    gamma = (TensorSpec("gamma", "compute", ("C",)),) if norm else ()
    factor = (TensorSpec("factor", "fp32", ("1",)),) if codes else ()
    name, others = op_name(norm, codes), (*gamma, *factor)
    aliases = ((1, 1 + len(others)),)
    share = () if codes else ((0, 0),)  # in codes an element of y is smaller than one of x
    return OpSpec(name, (x, *others, cache), (y, cache), aliases, may_share=share, check=partial(_check, name))


def _check(name: str, dims: Dims) -> None:
    if dims["F"] > MAX_HISTORY:
        raise LongtakeError(f"{name}: too long a history", got=dims["F"], expected=f"at most {MAX_HISTORY} frames")


def _layout(dims: Dims) -> tuple[int, int, int]:
    """Threads that share a position, units of 8 channels that each holds, and positions that they do at once."""
    row = blocks_of(dims["C"], UNIT)
    lanes = min(WARP, 1 << (row - 1).bit_length())
    units = blocks_of(row, lanes)
    return lanes, units, max(1, LOADS // units)


def _macros(norm: bool, codes: str, dims: Dims) -> Macros:
    lanes, units, rows = _layout(dims)
    sizes: Macros = {"CHANNELS": dims["C"], "PAST": dims["F"], "LANES": lanes, "UNITS": units, "ROWS": rows}
    coded: Macros = {"CODES": 1 + CODES.index(codes)} if codes else {}
    return {**sizes, "THREADS": THREADS, "NORM": int(norm), "EPS": f"{CHANNEL_NORM_EPS!r}f", **coded}


def _calls(norm: bool, codes: str, dims: Dims) -> tuple[Call, ...]:
    lanes, _, rows = _layout(dims)
    positions = dims["Y"] * dims["X"]
    grid = blocks_of(positions, rows * (THREADS // lanes)), dims["T"]
    tensors = ("x", *(("gamma",) if norm else ()), *(("factor",) if codes else ()), "cache", "y")
    return (Call("stream_extend", grid, THREADS, (*tensors, dims["T"], positions)),)


def _kernel(norm: bool, codes: str = "") -> Kernel:
    source = Path(__file__).with_name("kernel.cu")
    return Kernel(source, partial(_macros, norm, codes), partial(_calls, norm, codes))


def coded_history(
    codes: str, spec: OpSpec, dims: Dims, compute: torch.dtype, generator: torch.Generator
) -> Mapping[str, Tensor]:
    """A history of codes that stand for numbers, and a factor with which some values go beyond the range."""
    shape = tuple(dims[letter] for letter in "FYXC")
    history = encode(LARGEST[codes] / 3 * torch.randn(shape, generator=generator), codes)
    return {"cache": history, "factor": torch.tensor([LARGEST[codes] / 3])}


def _coded(norm: bool, codes: str) -> Op:
    reference = coded_norm_silu_extend if norm else coded_stream_extend
    return Op(
        _spec(norm, codes),
        partial(reference, codes=codes),
        (_kernel(norm, codes),),
        SIZES,
        inputs=partial(coded_history, codes),
        tolerance=dict.fromkeys(("bf16", "fp32"), 4e-2 if norm else 0.0),  # of the bytes: a few codes are one off
        codes=codes,
    )


OPS = (
    Op(_spec(True), norm_silu_extend, (_kernel(True),), SIZES, tolerance={"bf16": 1e-3, "fp32": 1e-6}),
    Op(_spec(False), stream_extend, (_kernel(False),), SIZES),
    *(_coded(norm, codes) for codes in CODES for norm in (True, False)),
)
