"""Upsampling, and the shortcut beside it: one launch each, gridDim.y frames."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.plugins.codes import CODES, LARGEST
from longtake.plugins.kernels import Call, Dims, Kernel, Macros, blocks_of
from longtake.plugins.spec import Op, OpSpec, TensorSpec
from longtake.plugins.upsample.reference import (
    coded_upsample,
    duplicate_up,
    duplicate_up_time,
    encode_frames,
    upsample_space,
    upsample_time,
)

THREADS, UNIT = 256, 8
SOURCE = Path(__file__).with_name("kernel.cu")
UP_SIZES: tuple[dict[str, int], ...] = (
    {"T": 2, "Y": 9, "X": 7, "C": 256},
    {"T": 1, "Y": 5, "X": 3, "C": 48},
    {"T": 3, "Y": 1, "X": 1, "C": 16},
)
DUPLICATE_SIZES: tuple[dict[str, int], ...] = (
    {"T": 2, "Y": 9, "X": 7, "C": 256, "N": 128},
    {"T": 1, "Y": 5, "X": 3, "C": 48, "N": 48},
    {"T": 3, "Y": 1, "X": 1, "C": 32, "N": 8},
)
FRAMES = TensorSpec("x", "compute", ("T", "Y", "X", "C"))
FACTOR = TensorSpec("factor", "fp32", ("1",))


def _call(function: str, channels: int, tensors: tuple[str, ...], dims: Dims) -> tuple[Call, ...]:
    positions = dims["Y"] * dims["X"]
    grid = blocks_of(positions * channels // UNIT, THREADS), dims["T"]
    return (Call(function, grid, THREADS, (*tensors, positions, dims["X"])),)


def _upsample_macros(time: int, codes: str, side: int, dims: Dims) -> Macros:
    coded: Macros = {"CODES": 1 + CODES.index(codes), "SIDE": side} if codes else {}
    return {"UPSAMPLE": 1, "CHANNELS": dims["C"] // time, "TIME": time, "THREADS": THREADS, **coded}


def _upsample_kernel(time: int, codes: str = "", side: int = 2) -> Kernel:
    tensors = ("x", *(("factor",) if codes else ()), "out")
    return Kernel(
        SOURCE, partial(_upsample_macros, time, codes, side), lambda dims: _call("upsample", dims["C"], tensors, dims)
    )


def _upsample(time: int, codes: str = "") -> Op:
    """Repeat each position twice in both directions. `time` 2: the two halves of the channels are two frames. `codes`: what
    comes out are codes of the numbers times `factor`."""
    shape = ("T", "2*Y", "2*X", "C") if time == 1 else ("2*T", "2*Y", "2*X", "C/2")
    end = f"_{codes}" if codes else ""
    name = ("upsample_space" if time == 1 else "upsample_time") + end
    inputs, out = (FRAMES, *((FACTOR,) if codes else ())), TensorSpec("out", "int8" if codes else "compute", shape)
    plain = upsample_space if time == 1 else upsample_time
    return Op(
        OpSpec(name, inputs, (out,)),
        partial(coded_upsample, time=time, codes=codes) if codes else plain,
        ways=(_upsample_kernel(time, codes),),
        sizes=UP_SIZES,
        inputs=partial(_beyond_range, codes) if codes else None,
        first_frame="upsample_space" + end,
        repeats=time,
        splits_by_frame=True,
        codes=codes,
    )


def _encode(codes: str) -> Op:
    """Frames as codes, every position once: how a stream's first step hands its histories to the later ones."""
    inputs, out = (FRAMES, FACTOR), TensorSpec("out", "int8", ("T", "Y", "X", "C"))
    return Op(
        OpSpec(f"encode_{codes}", inputs, (out,)),
        partial(encode_frames, codes=codes),
        ways=(_upsample_kernel(1, codes, side=1),),
        sizes=UP_SIZES,
        inputs=partial(_beyond_range, codes),
    )


def _beyond_range(
    codes: str, spec: OpSpec, dims: Dims, compute: torch.dtype, generator: torch.Generator
) -> Mapping[str, Tensor]:
    return {"factor": torch.tensor([LARGEST[codes] / 3])}


def _duplicate_macros(time: int, dims: Dims) -> Macros:
    ratio, rest = divmod(dims["C"], dims["N"])
    if rest or dims["N"] % UNIT or (4 * time) % ratio:
        what, got = "duplicate_up: the kernel does not take these channels", f"{dims['C']} to {dims['N']}"
        expected = f"a multiple of {UNIT}, from 1 to {4 * time} times as many, a power of 2"
        raise LongtakeError(what, got=got, expected=expected)
    return {"UPSAMPLE": 0, "CHANNELS": dims["N"], "RATIO": ratio, "TIME": time, "THREADS": THREADS}


def _duplicate(time: int) -> Op:
    """y + x, whose channels are repeated and unfolded into 2x2 positions and, `time` 2, two frames: a shortcut."""
    shape = ("T" if time == 1 else "2*T", "2*Y", "2*X", "N")
    y, out = (TensorSpec(name, "compute", shape) for name in ("y", "out"))
    name = "duplicate_up" if time == 1 else "duplicate_up_time"
    return Op(
        OpSpec(name, (FRAMES, y), (out,), may_share=((0, 1),)),
        duplicate_up if time == 1 else duplicate_up_time,
        ways=(
            Kernel(
                SOURCE,
                partial(_duplicate_macros, time),
                lambda dims: _call("duplicate_up", dims["N"], ("x", "y", "out"), dims),
            ),
        ),
        sizes=DUPLICATE_SIZES,
        first_frame=name if time == 1 else "",
    )


OPS = (
    _upsample(1),
    _upsample(2),
    _duplicate(1),
    _duplicate(2),
    *(_upsample(time, codes) for codes in CODES for time in (1, 2)),
    *map(_encode, CODES),
)
