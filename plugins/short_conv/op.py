"""The short convolution of keys: one launch, gridDim.y frames, a thread an element."""

from __future__ import annotations

from pathlib import Path

from longtake.plugins.kernels import Call, Dims, Kernel, blocks_of
from longtake.plugins.short_conv.reference import short_conv
from longtake.plugins.spec import Op, OpSpec, TensorSpec

THREADS = 256
SPEC = OpSpec(
    "short_conv",
    inputs=(
        TensorSpec("k", "compute", ("T", "P", "C")),
        TensorSpec("tail", "compute", ("3", "P", "C")),
        TensorSpec("weight", "compute", ("C", "4")),
    ),
    outputs=(TensorSpec("out", "compute", ("T", "P", "C")),),
    multiple=1,
)


def _calls(dims: Dims) -> tuple[Call, ...]:
    frame = dims["P"] * dims["C"]
    return (Call("short_conv", (blocks_of(frame, THREADS), dims["T"]), THREADS, (*SPEC.names, dims["T"], frame)),)


OPS = (
    Op(
        SPEC,
        short_conv,
        ways=(
            Kernel(
                Path(__file__).with_name("kernel.cu"),
                lambda dims: {"THREADS": THREADS, "CHANNELS": dims["C"]},
                _calls,
            ),
        ),
        sizes=({"T": 3, "P": 64, "C": 144}, {"T": 4, "P": 5, "C": 34}, {"T": 1, "P": 3, "C": 7}),
        tolerance={"bf16": 1e-3, "fp32": 1e-6},
    ),
)
