"""The cache write's kernels: two launches that quantize (partial amax, then pack), one that copies."""

from __future__ import annotations

from pathlib import Path

from longtake.plugins.kernels import WORKSPACE, Call, Dims, Kernels, blocks_of, limit_macros
from longtake.plugins.kv_cache_write.reference import RULE
from longtake.plugins.spec import CACHE_FORMATS, kv_cache_write

THREADS = 256
MAX_PARTIALS = THREADS  # the second launch reduces them with one thread each


def _units(dims: Dims) -> int:
    return dims["L"] * dims["H"] * dims["D"] // 16


def _partials(dims: Dims) -> int:
    return min(MAX_PARTIALS, blocks_of(_units(dims), THREADS))


def _calls_nvfp4(dims: Dims) -> tuple[Call, ...]:
    slots, units, partials = dims["S"], _units(dims), _partials(dims)
    read = ("k", "v", "write_slot", WORKSPACE)
    return (
        Call("kv_cache_amax", (partials, 2), THREADS, (*read, slots, units)),
        Call(
            "kv_cache_pack",
            (blocks_of(units, THREADS), 2),
            THREADS,
            (*read, "values", "scales", "amax", slots, units, partials),
        ),
    )


def _calls_bf16(dims: Dims) -> tuple[Call, ...]:
    units = _units(dims)
    arguments = ("k", "v", "write_slot", "cache", dims["S"], units)
    return (Call("kv_cache_copy", (blocks_of(units, THREADS), 2), THREADS, arguments),)


def _kernels(fmt: str) -> Kernels:
    packed = fmt == "nvfp4"
    return Kernels(
        spec=kv_cache_write(fmt),
        source=Path(__file__).with_name("kernel.cu"),
        macros=lambda dims: {"THREADS": THREADS, "CACHE_NVFP4": int(packed), **limit_macros(RULE)},
        calls=_calls_nvfp4 if packed else _calls_bf16,
        workspace_bytes=lambda dims: 2 * 4 * _partials(dims) if packed else 0,
    )


KERNELS = {kernels.spec.name: kernels for kernels in map(_kernels, CACHE_FORMATS)}
