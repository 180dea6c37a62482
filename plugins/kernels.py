"""How an op's kernel is compiled and launched, as data: each op.py describes its own with these types.

`Dims` maps the letters of plugins/spec.py (S, L, H, D, W, N, K, T, F, Y, X, C, E) to sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Dims = Mapping[str, int]
Macros = dict[str, str | int | float]

COMPUTE_DTYPES = ("bf16", "fp32")
WORKSPACE, TABLE_LENGTH = "<workspace>", "<table length>"
WARP = 32


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
class Kernel:
    """A kernel of ours: the way of running an op that works on any GPU.

    source: the .cu file. macros: what to define for given dims (COMPUTE_BF16 is added by the launcher).
    calls: the launches, in order, for given dims. workspace_bytes: scratch that they need.
    buffers: addresses of named parts of the scratch, which then are arguments too, for given dims and workspace.
    """

    source: Path
    macros: Callable[[Dims], Macros]
    calls: Callable[[Dims], tuple[Call, ...]]
    workspace_bytes: Callable[[Dims], int] = lambda dims: 0
    buffers: Callable[[Dims, int], Mapping[str, int]] = lambda dims, workspace: {}
    method: str = "portable"


def blocks_of(items: int, threads: int) -> int:
    """Thread blocks needed for one thread an item."""
    return math.ceil(items / threads)


def row_layout(elements: int, unit: int = 16, most: int = 256) -> tuple[int, int]:
    """Units of `unit` elements that a thread holds, and threads of a block for a row: whole warps, as few as that allows."""
    row = elements // unit
    units = blocks_of(row, most)
    return units, WARP * blocks_of(blocks_of(row, units), WARP)
