"""The gated depthwise convolution: one launch, gridDim.y frames, a thread a feature of a place."""

from __future__ import annotations

from pathlib import Path

from longtake.errors import LongtakeError
from longtake.plugins.gated_ffn.reference import gated_ffn
from longtake.plugins.kernels import Call, Dims, Kernel, blocks_of
from longtake.plugins.spec import Op, OpSpec, TensorSpec

THREADS = 128


def _check(dims: Dims) -> None:
    if dims["C"] % 2:
        raise LongtakeError("gated_ffn: no two halves", got=f"C={dims['C']}", expected="an even number")


SPEC = OpSpec(
    "gated_ffn",
    inputs=(
        TensorSpec("x", "compute", ("T", "Y", "X", "C")),
        TensorSpec("weight", "compute", ("C", "9")),
        TensorSpec("bias", "compute", ("C",)),
    ),
    outputs=(TensorSpec("out", "compute", ("T", "Y", "X", "C/2")),),
    check=_check,
    multiple=1,
)


def _calls(dims: Dims) -> tuple[Call, ...]:
    grid = dims["Y"] * dims["X"] * blocks_of(dims["C"] // 2, THREADS), dims["T"]
    return (Call("gated_ffn", grid, THREADS, (*SPEC.names, dims["Y"], dims["X"])),)


OPS = (
    Op(
        SPEC,
        gated_ffn,
        ways=(
            Kernel(
                Path(__file__).with_name("kernel.cu"),
                lambda dims: {"THREADS": THREADS, "CHANNELS": dims["C"], "BLOCKS": blocks_of(dims["C"] // 2, THREADS)},
                _calls,
            ),
        ),
        sizes=({"T": 3, "Y": 8, "X": 8, "C": 864}, {"T": 2, "Y": 3, "X": 4, "C": 22}, {"T": 1, "Y": 1, "X": 2, "C": 6}),
        tolerance={"bf16": 2e-3, "fp32": 1e-5},
    ),
)
