"""The cache write: its kernel is two launches that quantize (partial amax, then pack), or one that copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.plugins.cache_format import CACHE_FORMATS, SIZES, block, cache_format_of, cache_tensors
from longtake.plugins.kernels import WORKSPACE, Call, Dims, Kernel, blocks_of
from longtake.plugins.kv_cache_write.reference import RULE, kv_cache_write_bf16, kv_cache_write_nvfp4, quantize_kv
from longtake.plugins.nvfp4.reference import limit_macros
from longtake.plugins.spec import Op, OpSpec, TensorSpec

THREADS = 256
MAX_PARTIALS = THREADS  # the second launch reduces them with one thread each
REFERENCES: dict[str, Callable[..., Any]] = {"nvfp4": kv_cache_write_nvfp4, "bf16": kv_cache_write_bf16}


def _spec(fmt: str) -> OpSpec:
    """Quantize one block's K and V into slot `write_slot` ([1] int32; -1 writes nothing), in place."""
    cache = cache_tensors(fmt)
    return OpSpec(
        f"kv_cache_write_{fmt}",
        inputs=(block("k"), block("v"), *cache, TensorSpec("write_slot", "int32", ("1",))),
        outputs=cache,
        aliases=tuple((i, 2 + i) for i in range(len(cache))),
    )


def _units(dims: Dims) -> int:
    return dims["L"] * dims["H"] * dims["D"] // 16


def _partials(dims: Dims) -> int:
    return min(MAX_PARTIALS, blocks_of(_units(dims), THREADS))


def _calls_nvfp4(dims: Dims) -> tuple[Call, ...]:
    slots, units, partials = dims["S"], _units(dims), _partials(dims)
    read = ("k", "v", "write_slot", WORKSPACE)
    packed = (*read, "values", "scales", "amax", slots, units, partials)
    return (
        Call("kv_cache_amax", (partials, 2), THREADS, (*read, slots, units)),
        Call("kv_cache_pack", (2 * blocks_of(units, THREADS), 1), THREADS, packed),
    )


def _calls_bf16(dims: Dims) -> tuple[Call, ...]:
    units = _units(dims)
    arguments = ("k", "v", "write_slot", "cache", dims["S"], units)
    return (Call("kv_cache_copy", (blocks_of(units, THREADS), 2), THREADS, arguments),)


def _kernel(packed: bool) -> Kernel:
    return Kernel(
        source=Path(__file__).with_name("kernel.cu"),
        macros=lambda dims: {"THREADS": THREADS, "CACHE_NVFP4": int(packed), **limit_macros(RULE)},
        calls=_calls_nvfp4 if packed else _calls_bf16,
        workspace_bytes=lambda dims: 2 * 4 * _partials(dims) if packed else 0,
    )


def filled_cache(spec: OpSpec, dims: Dims, compute: torch.dtype, generator: torch.Generator) -> Mapping[str, Tensor]:
    """Every slot written with data of its own magnitude."""
    shape = (dims["S"], 2, dims["L"], dims["H"], dims["D"])
    blocks = torch.randn(shape, generator=generator) * torch.linspace(0.5, 1.5, dims["S"]).view(-1, 1, 1, 1, 1)
    if cache_format_of(spec) == "bf16":
        return {"cache": blocks.to(compute)}
    slots = [quantize_kv(block) for block in blocks]
    return {name: torch.stack(parts) for name, parts in zip(("values", "scales", "amax"), zip(*slots))}


OPS = tuple(
    Op(
        _spec(fmt),
        REFERENCES[fmt],
        (_kernel(fmt == "nvfp4"),),
        SIZES,
        filled_cache,
        indices=((2,), (-1,)),
        over_heads=fmt == "nvfp4",
    )
    for fmt in CACHE_FORMATS
)
