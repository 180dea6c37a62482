"""Upsampling, the shortcut beside it, and codes of frames: one launch each, gridDim.y frames."""

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


def _upsample_macros(time: int, codes: str, dims: Dims) -> Macros:
    coded: Macros = {"CODES": 1 + CODES.index(codes), "SIDE": 1} if codes else {}
    return {"UPSAMPLE": 1, "CHANNELS": dims["C"] // time, "TIME": time, "THREADS": THREADS, **coded}


def _upsample_kernel(time: int, codes: str = "") -> Kernel:
    tensors = ("x", *(("factor",) if codes else ()), "out")
    return Kernel(
        SOURCE, partial(_upsample_macros, time, codes), lambda dims: _call("upsample", dims["C"], tensors, dims)
    )


def _upsample(time: int) -> Op:
    """Repeat each position twice in both directions. `time` 2: the two halves of the channels are two frames."""
    shape = ("T", "2*Y", "2*X", "C") if time == 1 else ("2*T", "2*Y", "2*X", "C/2")
    return Op(
        OpSpec("upsample_space" if time == 1 else "upsample_time", (FRAMES,), (TensorSpec("out", "compute", shape),)),
        upsample_space if time == 1 else upsample_time,
        ways=(_upsample_kernel(time),),
        sizes=UP_SIZES,
        first_frame="upsample_space",
        repeats=time,
        splits_by_frame=True,
        in_codes="encode" if time == 1 else "encode_time",
    )


def _encode(time: int, codes: str) -> Op:
    """Frames as codes of the numbers times `factor`, every position once: in front of a folded convolution (conv8), and how a
    stream's first step hands its histories to the later ones. `time`: as above."""
    shape = ("T", "Y", "X", "C") if time == 1 else ("2*T", "Y", "X", "C/2")
    name = "encode" if time == 1 else "encode_time"
    return Op(
        OpSpec(f"{name}_{codes}", (FRAMES, FACTOR), (TensorSpec("out", "int8", shape),)),
        partial(encode_frames, time=time, codes=codes),
        ways=(_upsample_kernel(time, codes),),
        sizes=UP_SIZES,
        inputs=partial(_beyond_range, codes),
        first_frame=f"encode_{codes}",
        codes=codes,
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
    *(_encode(time, codes) for codes in CODES for time in (1, 2)),
)
