"""Inputs to try the ops with: plausible caches, odd sizes, every table. For tests, the sanitizer run and timings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor

from longtake.plugins.kernels import COMPUTE_DTYPES, Dims, shape_of
from longtake.plugins.kv_cache_write.reference import quantize_kv
from longtake.plugins.spec import BLOCK_OPS, CONV_OPS, DUPLICATE_OPS, LIBRARY_OPS, LINEAR_OPS, OPS, STREAM_OPS, UP_OPS

SLOTS = 4
TINY = {"S": SLOTS, "L": 128, "H": 4, "D": 64}
SIZES: tuple[dict[str, int], ...] = (
    TINY,
    {"S": SLOTS, "L": 7, "H": 3, "D": 128},
    {"S": SLOTS, "L": 33, "H": 3, "D": 48},
    {"S": SLOTS, "L": 128, "H": 3, "D": 128},
    {"S": SLOTS, "L": 1, "H": 1, "D": 16},
)
STREAM_SIZES: tuple[dict[str, int], ...] = (
    {"T": 4, "Y": 9, "X": 7, "C": 256, "F": 2},
    {"T": 1, "Y": 5, "X": 7, "C": 1024, "F": 2},
    {"T": 2, "Y": 3, "X": 11, "C": 48, "F": 2},
    {"T": 3, "Y": 1, "X": 1, "C": 16, "F": 1},
    {"T": 1, "Y": 4, "X": 40, "C": 512, "F": 1},
)
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
CONV_SIZES: tuple[dict[str, int], ...] = (
    {"T": 6, "Y": 12, "X": 20, "C": 64, "N": 32},
    {"T": 3, "Y": 7, "X": 5, "C": 48, "N": 128},
    {"T": 4, "Y": 1, "X": 9, "C": 16, "N": 16},
)
WEIGHT_SIZES: tuple[dict[str, int], ...] = ({"N": 256, "K": 1024}, {"N": 5, "K": 48}, {"N": 1, "K": 16})
LINEAR_SIZES: tuple[dict[str, int], ...] = ({"T": 64, "N": 48, "K": 96}, {"T": 200, "N": 512, "K": 256})
BLOCK_SIZES: tuple[dict[str, int], ...] = (
    {"L": 128, "C": 256, "F": 4},
    {"L": 22, "C": 3072, "F": 2},
    {"L": 7, "C": 48, "F": 1},
    {"L": 27, "C": 4112, "F": 3},
    {"L": 9, "C": 16, "F": 9},
)
CROSS_SIZES: tuple[dict[str, int], ...] = ({"L": 128, "E": 32, "H": 4, "D": 64}, {"L": 33, "E": 17, "H": 3, "D": 48})
WRITE_SLOTS = (-1, 0, 1, 2, 3)
TABLES = tuple(t for length in range(1, SLOTS + 1) for t in permutations((0, 1, 2, 3, -1), length))


def sizes_for(op_name: str) -> tuple[dict[str, int], ...]:
    """The sizes to try an op with, the plain one first."""
    groups = (
        (STREAM_OPS, STREAM_SIZES), (UP_OPS, UP_SIZES), (DUPLICATE_OPS, DUPLICATE_SIZES), (CONV_OPS, CONV_SIZES),
        (LINEAR_OPS, LINEAR_SIZES), (BLOCK_OPS, BLOCK_SIZES),
    )  # fmt: skip
    known = {name: sizes for names, sizes in groups for name in names}
    return {"nvfp4_dequantize": WEIGHT_SIZES, "cross_attention": CROSS_SIZES, **known}.get(op_name, SIZES)


def op_inputs(
    op_name: str, dims: Dims, dtype: str = "bf16", indices: Sequence[int] = (-1,), seed: int = 0
) -> tuple[Tensor, ...]:
    """CPU inputs of an op in spec order. `indices` is the write_slot [1] or the table [W]."""
    generator = torch.Generator().manual_seed(seed)
    spec = OPS[op_name]
    compute = torch.bfloat16 if dtype == COMPUTE_DTYPES[0] else torch.float32
    cache = _filled_cache(op_name, dims, compute, generator)
    made = []
    for tensor in spec.inputs:
        if tensor.name in ("table", "write_slot"):
            made.append(torch.tensor(indices, dtype=torch.int32))
        elif tensor.name in cache:
            made.append(cache[tensor.name])
        elif tensor.name.startswith("rope_"):
            wave = torch.cos if tensor.name == "rope_cos" else torch.sin
            made.append(wave(torch.outer(torch.arange(dims["L"]), torch.logspace(0, -4, dims["D"] // 2))))
        elif tensor.name == "factor":
            made.append(torch.tensor([150.0]))  # of values from -4 to 4, some go beyond E4M3's range
        else:
            values = torch.randn(shape_of(tensor, dims), generator=generator)
            values = values.abs() + 0.1 if tensor.name.endswith("scale") else values
            kinds = {"fp8": torch.float8_e4m3fn, "fp32": torch.float32}
            made.append(values.to(kinds.get(tensor.dtype, compute)))
    return tuple(made)


def _filled_cache(op_name: str, dims: Dims, compute: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """Every slot written with data of its own magnitude, where the op has slots; or a weight's random bytes."""
    without = (*LIBRARY_OPS, *STREAM_OPS, *UP_OPS, *DUPLICATE_OPS, *CONV_OPS, *BLOCK_OPS)
    if op_name == "qk_norm_rope" or op_name in without:
        return {}
    if op_name == "nvfp4_dequantize":
        rows, columns = dims["N"], dims["K"]
        values = torch.randint(-128, 128, (rows, columns // 2), generator=generator).to(torch.int8)
        scales = torch.randint(0, 127, (rows, columns // 16), generator=generator).to(torch.int8)
        return {"values": values, "scales": scales}
    shape = (dims["S"], 2, dims["L"], dims["H"], dims["D"])
    blocks = torch.randn(shape, generator=generator) * torch.linspace(0.5, 1.5, dims["S"]).view(-1, 1, 1, 1, 1)
    if op_name.endswith("bf16"):
        return {"cache": blocks.to(compute)}
    slots = [quantize_kv(block) for block in blocks]
    return {name: torch.stack(parts) for name, parts in zip(("values", "scales", "amax"), zip(*slots))}
