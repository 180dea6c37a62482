"""How an op's kernels are compiled and launched, as data: each plugin.py describes its own with these types.

`Dims` maps the letters of plugins/spec.py (S, L, H, D, W, N, K, T, F, Y, X, C, E) to sizes.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from longtake.errors import LongtakeError
from longtake.plugins.nvfp4.reference import RULE_LIMITS
from longtake.plugins.spec import BLOCK_OPS, KERNEL_OPS, STREAM_OPS, OpSpec, TensorSpec

Dims = Mapping[str, int]

COMPUTE_DTYPES = ("bf16", "fp32")
WORKSPACE, TABLE_LENGTH = "<workspace>", "<table length>"
MAX_HEAD_DIM = 128
MAX_HISTORY = 2  # frames
_FOLDERS = (
    "kv_cache_write", "sink_attention", "qk_norm_rope", "stream_extend", "upsample", "nvfp4_dequantize", "block_norm",
    "quantize_fp8",
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One kernel launch. An argument is a tensor's name, WORKSPACE, TABLE_LENGTH (an int32) or an int32 value.

    shared_bytes: dynamic shared memory of a thread block.
    """

    function: str
    grid: tuple[int, int]
    threads: int
    arguments: tuple[str | int, ...]
    shared_bytes: int = 0


@dataclass(frozen=True)
class Kernels:
    """The CUDA side of one op.

    macros: what to define for given dims (COMPUTE_BF16 is added by the launcher).
    calls: the launches, in order, for given dims. workspace_bytes: scratch that they need.
    buffers: addresses of named parts of the scratch, which then are arguments too, for given dims and workspace.
    """

    spec: OpSpec
    source: Path
    macros: Callable[[Dims], dict[str, str | int | float]]
    calls: Callable[[Dims], tuple[Call, ...]]
    workspace_bytes: Callable[[Dims], int] = lambda dims: 0
    buffers: Callable[[Dims, int], Mapping[str, int]] = lambda dims, workspace: {}


def limit_macros(rule: str) -> dict[str, str | int | float]:
    """The codec's limits as the macros that codec.cuh expects."""
    m2, m3 = RULE_LIMITS[rule]
    return {"LIMIT_E2M1": f"{m2}f", "LIMIT_E4M3": f"{m3}f"}


@cache
def kernels_of(op_name: str) -> Kernels:
    """The kernels of an op of KERNEL_OPS. Raises LongtakeError for an unknown name."""
    for folder in _FOLDERS:
        found = importlib.import_module(f"longtake.plugins.{folder}.plugin").KERNELS.get(op_name)
        if found is not None:
            return found
    raise LongtakeError("unknown op", got=op_name, expected=", ".join(KERNEL_OPS))


def size_of(expression: str, dims: Dims) -> int:
    """The value of a dimension of a TensorSpec: a number, a letter, a sum, a difference, a product, or one of these divided
    by a number."""
    if "+" in expression:
        return sum(size_of(term, dims) for term in expression.split("+"))
    if "-" in expression:
        first, _, rest = expression.partition("-")
        return size_of(first, dims) - size_of(rest, dims)
    product, _, divisor = expression.partition("/")
    return math.prod(int(f) if f.isdigit() else dims[f] for f in product.split("*")) // int(divisor or 1)


def shape_of(tensor: TensorSpec, dims: Dims) -> tuple[int, ...]:
    """The shape of a tensor for given dims."""
    return tuple(size_of(expression, dims) for expression in tensor.shape)


def dims_from_shapes(spec: OpSpec, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """The dims that give the op's inputs these shapes.

    Raises:
        LongtakeError: a rank is wrong, the shapes contradict each other, or a size does not suit the kernels.
    """
    if len(shapes) != len(spec.inputs):
        raise LongtakeError(f"{spec.name}: wrong number of inputs", got=len(shapes), expected=len(spec.inputs))
    dims: dict[str, int] = {}
    for tensor, shape in zip(spec.inputs, shapes):
        for expression, size in zip(tensor.shape, shape):
            letter, _, divisor = expression.partition("/")
            if letter.isalpha():
                dims.setdefault(letter, size * int(divisor or 1))
        if len(shape) != len(tensor.shape) or tuple(shape) != shape_of(tensor, dims):
            known = ", ".join(f"{name}={size}" for name, size in dims.items())
            raise LongtakeError(
                f"{spec.name}: {tensor.name} has the wrong shape",
                got=list(shape),
                expected=f"[{', '.join(tensor.shape)}] with {known}",
            )
    _check_dims(spec, dims)
    return dims


def _check_dims(spec: OpSpec, dims: Dims) -> None:
    for letter, size in dims.items():
        if size < 1:
            raise LongtakeError(f"{spec.name}: empty dimension", got=f"{letter}={size}", expected="at least 1")
    if spec.name in STREAM_OPS and dims["F"] > MAX_HISTORY:
        raise LongtakeError(f"{spec.name}: too long a history", got=dims["F"], expected=f"at most {MAX_HISTORY} frames")
    if spec.name in BLOCK_OPS and dims["L"] % dims.get("F", 1):
        raise LongtakeError(f"{spec.name}: the frames do not share the tokens alike", got=f"L={dims['L']}, F={dims['F']}",
                            expected="a multiple of F")  # fmt: skip
    inner = next(letter for letter in "DCK" if letter in dims)
    if dims[inner] % 16 or dims.get("D", 16) > MAX_HEAD_DIM:
        raise LongtakeError(
            f"{spec.name}: the kernels do not take {inner}={dims[inner]}",
            expected="a multiple of 16" + (f", at most {MAX_HEAD_DIM}" if inner == "D" else ""),
        )


def blocks_of(items: int, threads: int) -> int:
    """Thread blocks needed for one thread an item."""
    return math.ceil(items / threads)
