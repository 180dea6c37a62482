"""The weight unpacking kernel: one launch, a thread a block of 16."""

from __future__ import annotations

from pathlib import Path

from longtake.plugins.kernels import Call, Dims, Kernels, blocks_of, limit_macros
from longtake.plugins.spec import nvfp4_dequantize

THREADS = 256


def _macros(dims: Dims) -> dict[str, str | int | float]:
    return {"THREADS": THREADS, **limit_macros("static_6")}


def _calls(dims: Dims) -> tuple[Call, ...]:
    units = dims["N"] * dims["K"] // 16
    return (Call("nvfp4_dequantize", (blocks_of(units, THREADS), 1), THREADS, ("values", "scales", "weight", units)),)


_SPEC = nvfp4_dequantize()
KERNELS = {_SPEC.name: Kernels(_SPEC, Path(__file__).with_name("kernel.cu"), _macros, _calls)}
