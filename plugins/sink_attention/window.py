"""The kernels that lay the table's keys and values out for a library's attention, and where they put them.

Attention does not care for the order of its keys, so slots are laid out in the table's order. All layers share one
workspace: a layer's window is gone when the next one's is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from longtake.plugins.kernels import Call, Dims, Kernels, blocks_of, limit_macros
from longtake.plugins.kv_cache_write.reference import RULE
from longtake.plugins.spec import cache_tensors, sink_attention

THREADS = 256
ITEMS = 4  # pieces of 16 bytes a thread of the bf16 kernel writes
MAX_PARTIALS = 256
ALIGNMENT = 256  # bytes, of every buffer in the workspace

FACTORS = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")  # enum Factor of window_fp8.cu
FACTOR_BYTES = 16  # FACTOR_STRIDE floats
FACTOR_SLOTS = 16
PART_KEYS = 2**14  # Hopper's FP8 accumulation stops growing after so many equal terms
STATS_TO_LOG2 = 1.4426950408889634  # log2(e): cuDNN's statistics are natural logarithms (start-up trial checks it)
_TILE = 128  # keys: a block too long for a part is cut at multiples of it


def elements(dims: Dims) -> int:
    """Numbers in one block's K (as many as in V, the queries or the output)."""
    return dims["L"] * dims["H"] * dims["D"]


def parts(tokens: int, entries: int) -> tuple[tuple[int, int], ...]:
    """(first key, keys) of each part that FP8 attention runs over: whole blocks of `tokens` where one fits in a part."""
    if tokens <= PART_KEYS:
        length, end = PART_KEYS // tokens * tokens, entries * tokens
        return tuple((first, min(length, end - first)) for first in range(0, end, length))
    pieces = -(-tokens // PART_KEYS)
    length = -(-tokens // (pieces * _TILE)) * _TILE
    return tuple(
        (block * tokens + first, min(length, tokens - first))
        for block in range(entries)
        for first in range(0, tokens, length)
    )


def buffers(dims: Dims, attention: str) -> dict[str, int]:
    """Bytes of each buffer for a window of W entries (dims has W), in the order they lie in."""
    block, window = elements(dims), dims["W"] * elements(dims)
    if attention == "bf16":
        return {"window_k": 2 * window, "window_v": 2 * window}
    split = len(parts(dims["L"], dims["W"]))
    partial = 4 * (2 * dims["W"] + 1) * partials(dims)
    return {
        "window_k": window, "window_v": window, "query8": block, "out8": split * block,
        "stats": 4 * split * dims["L"] * dims["H"],
        "partial": partial, "factors": FACTOR_BYTES * FACTOR_SLOTS, "amax_s": 4, "amax_o": 4,
    }  # fmt: skip


def addresses(dims: Dims, attention: str, workspace: int) -> tuple[dict[str, int], int]:
    """The address of each buffer in a workspace, and of the first byte after them."""
    return in_a_row(buffers(dims, attention), workspace)


def in_a_row(sizes: Mapping[str, int], start: int) -> tuple[dict[str, int], int]:
    """The address of each buffer of so many bytes, aligned one after the other, and of the first byte after them."""
    found, end = {}, start
    for name, size in sizes.items():
        found[name] = end
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return found, end


def window_kernels(fmt: str, attention: str) -> Kernels:
    """The kernels for cache format `fmt` and attention "bf16" or "fp8". Their dims need W, the table's length."""
    return Kernels(
        spec=sink_attention(fmt),
        source=Path(__file__).with_name(f"window_{attention}.cu"),
        macros=lambda dims: {
            "THREADS": THREADS,
            "ITEMS": ITEMS,
            "TILED": 0,
            "CACHE_NVFP4": int(fmt == "nvfp4"),
            "STATS_TO_LOG2": f"{STATS_TO_LOG2}f",
            **limit_macros(RULE),
        },
        calls=lambda dims: _calls_bf16(fmt, dims) if attention == "bf16" else _calls_fp8(fmt, dims),
    )


def _calls_bf16(fmt: str, dims: Dims) -> tuple[Call, ...]:
    pieces = elements(dims) // 8
    arguments: tuple[str | int, ...] = ("k", "v", *cache_names(fmt), "table", "window_k", "window_v", dims["S"], pieces)
    return (Call("window_bf16", (blocks_of(pieces, THREADS * ITEMS), 2 * dims["W"]), THREADS, arguments),)


def _calls_fp8(fmt: str, dims: Dims) -> tuple[Call, ...]:
    """Everything before the library's attention, then widen_out, which comes after it."""
    units, panes = elements(dims) // 16, 2 * dims["W"] + 1
    read: tuple[str, ...] = ("q", "k", "v", *cache_names(fmt), "table")
    blocks = blocks_of(units, THREADS)
    sizes = (units, len(parts(dims["L"], dims["W"])), dims["L"], dims["H"])
    written = ("factors", "query8", "window_k", "window_v")
    return (
        *amax_calls(fmt, dims),
        Call("window_fp8", (blocks, panes), THREADS, (*read, *written, dims["S"], units)),
        Call("widen_out", (blocks, 1), THREADS, ("out8", "stats", "factors", "out", *sizes)),
    )


def amax_calls(fmt: str, dims: Dims) -> tuple[Call, ...]:
    """What finds the scales of queries, keys and values."""
    units, panes, blocks = elements(dims) // 16, 2 * dims["W"] + 1, partials(dims)
    read = ("q", "k", "v", *cache_names(fmt), "table")
    return (
        Call("window_amax", (blocks, panes), THREADS, (*read, "partial", dims["S"], units)),
        Call("window_factors", (1, 1), THREADS, ("partial", "factors", panes, blocks)),
    )


def partials(dims: Dims) -> int:
    """Thread blocks that look for a pane's largest magnitude."""
    return min(MAX_PARTIALS, blocks_of(elements(dims) // 16, THREADS))


def cache_names(fmt: str) -> tuple[str, ...]:
    """The names of the cache's tensors."""
    return tuple(tensor.name for tensor in cache_tensors(fmt))
