"""Sink attention in FP8 on Hopper by our own kernels: one lays the window out in tiles, one attends with sums in fp32.

Weights spread over thousands of keys add up to what they should (hopper_fp8.cu says how), the window is one piece, and the
output is bf16 at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from longtake.errors import LongtakeError, UnavailableError
from longtake.plugins.cache_format import cache_format_of
from longtake.plugins.kernels import TABLE_LENGTH, Call, Dims, Kernel, blocks_of
from longtake.plugins.kv_cache_write.reference import RULE
from longtake.plugins.launch import Launcher
from longtake.plugins.nvfp4.reference import limit_macros
from longtake.plugins.sink_attention.window import (
    ALIGNMENT,
    THREADS,
    WindowedAttention,
    cache_names,
    elements,
    in_a_row,
)
from longtake.plugins.spec import Op

KEPT, VERSION = "kept", "version"  # addresses, 0 where another layer's window takes the same memory
HEAD_DIMS = (64, 128)
TILE = 128  # rows of a tile: queries of a thread block, and keys whose products one running sum spans
SUM_ROWS = 8  # more rows of the transposed values; one has ones, so that the product sums the probabilities up as well
STAGES = 4  # tiles of keys, and of values, under way to a thread block
MAX_PARTIALS = 256
KEPT_BYTES = 16  # what window_fp8.cu notes of tiles that stay
FACTORS_BYTES = 6 * 16  # enum Factor of factors.cuh, FACTOR_STRIDE floats apart
_GROUPS = 3  # of 128 threads: one copies, two attend
_BARRIERS = 8 * (1 + 4 * STAGES)


def buffers(dims: Dims) -> dict[str, int]:
    """Bytes of each buffer for a window of W entries (dims has W), in the order they lie in."""
    row, tiles = dims["H"] * TILE, blocks_of(dims["W"] * dims["L"], TILE)
    return {
        "window_k": tiles * row * dims["D"], "window_v": tiles * row * (dims["D"] + SUM_ROWS),
        "query8": blocks_of(dims["L"], TILE) * row * dims["D"],
        "partial": 4 * (2 * dims["W"] + 1) * partials(dims), "factors": FACTORS_BYTES, "kept_tiles": KEPT_BYTES,
    }  # fmt: skip


def addresses(dims: Dims, workspace: int) -> tuple[dict[str, int], int]:
    """The address of each buffer in a workspace, and of the first byte after them."""
    return in_a_row(buffers(dims), workspace)


def tile_kernel(fmt: str) -> Kernel:
    """What lays the window out, for cache format `fmt`. The dims of its calls need W."""
    return Kernel(
        source=Path(__file__).with_name("window_fp8.cu"),
        macros=lambda dims: {
            "THREADS": THREADS, "CACHE_NVFP4": int(fmt == "nvfp4"), "HEAD_DIM": dims["D"], "SUM_ROWS": SUM_ROWS,
            **limit_macros(RULE),
        },
        calls=lambda dims: _tile_calls(fmt, dims),
        workspace_bytes=lambda dims: addresses(dims, 0)[1],
        buffers=lambda dims, workspace: addresses(dims, workspace)[0],
    )  # fmt: skip


def _tile_calls(fmt: str, dims: Dims) -> tuple[Call, ...]:
    """What finds the scales of queries, keys and values, and what writes the tiles with them."""
    units, panes, blocks = elements(dims) // 16, 2 * dims["W"] + 1, partials(dims)
    read = ("q", "k", "v", *cache_names(fmt), "table")
    tiles = blocks_of(dims["W"] * dims["L"], TILE) * dims["H"]
    sizes = (dims["S"], TABLE_LENGTH, dims["L"], dims["H"])
    return (
        Call("window_amax", (blocks, panes), THREADS, (*read, "partial", dims["S"], units)),
        Call("window_factors", (1, 1), THREADS, ("partial", "factors", KEPT, VERSION, panes, blocks)),
        Call("window_tiles", (tiles, 3), THREADS, (*read, "factors", KEPT, "query8", "window_k", "window_v", *sizes)),
    )


def partials(dims: Dims) -> int:
    """Thread blocks that look for a pane's largest magnitude."""
    return min(MAX_PARTIALS, blocks_of(elements(dims) // 16, THREADS))


def attend_kernel() -> Kernel:
    """What attends over the tiles."""
    return Kernel(
        source=Path(__file__).with_name("hopper_fp8.cu"),
        macros=lambda dims: {"HEAD_DIM": dims["D"], "SUM_ROWS": SUM_ROWS, "STAGES": STAGES},
        calls=lambda dims: (
            Call(
                "attend_fp8", (blocks_of(dims["L"], TILE), dims["H"]), TILE * _GROUPS,
                ("query8", "window_k", "window_v", "factors", "out", TABLE_LENGTH, dims["L"], dims["H"]),
                shared_bytes=TILE * (dims["D"] + STAGES * (2 * dims["D"] + SUM_ROWS)) + _BARRIERS,
            ),
        ),
        buffers=lambda dims, workspace: addresses(dims, workspace)[0],
    )  # fmt: skip


class HopperSinkAttention(WindowedAttention):
    """See WindowedAttention. The workspace is aligned to ALIGNMENT; where it is a layer's own (`launch_kept`), its window stays
    from pass to pass.

    Raises LongtakeError if the heads are not of HEAD_DIMS.
    """

    method = "wgmma"

    def __init__(self, op: Op, dims: Dims, arch: str | None = None) -> None:
        if dims["D"] not in HEAD_DIMS:
            expected = f"heads of {' or '.join(map(str, HEAD_DIMS))}"
            raise LongtakeError("no FP8 kernel for this attention", got=f"heads of {dims['D']}", expected=expected)
        super().__init__(op, dims, arch, tile_kernel(cache_format_of(op.spec)))
        self.addresses = {KEPT: 0, VERSION: 0}
        self._attend = Launcher(op, self.dims, "bf16", arch, attend_kernel())

    def prepare(self) -> Launcher:
        """See Launcher.prepare."""
        super().prepare()
        self._attend.prepare()
        return self

    def launch(self, pointers: Sequence[int], stream: int, workspace: int = 0, table_len: int = 0) -> None:
        """See Launcher.launch."""
        if workspace % ALIGNMENT:
            expected = f"a multiple of {ALIGNMENT} bytes"
            raise LongtakeError("the workspace is not aligned", got=f"address {workspace:#x}", expected=expected)
        super().launch(pointers, stream, workspace, table_len)

    def launch_kept(self, version: int, pointers: Sequence[int], stream: int, workspace: int, table_len: int) -> None:
        """`launch` in a workspace of zeros at first that nothing else writes: tiles of slots are made only when what they are
        made of has changed.

        version: device address of an int32, never 0, that is another one whenever the table or a slot it lists has changed.
        """
        self.addresses = {KEPT: addresses(self.dims, workspace)[0]["kept_tiles"], VERSION: version}
        try:
            self.launch(pointers, stream, workspace, table_len)
        finally:
            self.addresses = {KEPT: 0, VERSION: 0}

    def attend(self, pointers: Sequence[int], stream: int, workspace: int, table_len: int) -> None:
        """See WindowedAttention.attend."""
        self._attend.enqueue(self._attend._calls, pointers, stream, workspace, table_len)

    def try_out(self) -> None:
        """Attend over fresh blocks with known answers, windows of every length: what fails must fail before the run.

        Ones give ones, also when they are scaled to E4M3's largest number and thousands of them add up. Queries that equal
        their keys, and are far from the others, give those keys' values. Raises UnavailableError.
        """
        shape = (self.dims["L"], self.dims["H"], self.dims["D"])
        generator = torch.Generator("cuda").manual_seed(0)
        k, v = (torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        ones, k, out = torch.ones_like(k), 4 * k, torch.empty_like(k)
        memory = torch.empty(self.workspace_bytes, dtype=torch.uint8, device="cuda")
        stream = torch.cuda.current_stream().cuda_stream
        for entries in range(1, self.dims["S"] + 1):
            table = torch.full((entries,), -1, dtype=torch.int32, device="cuda")
            for keys, values, tolerance in ((ones, ones, 0.01), (k, v, 0.1)):
                out.fill_(float("nan"))
                unread = [memory.data_ptr()] * len(cache_names(self.cache_format))  # the table lists no slot
                pointers = [t.data_ptr() for t in (keys, keys, values)] + unread + [table.data_ptr(), out.data_ptr()]
                self.launch(pointers, stream, memory.data_ptr(), entries)
                error = float((out.float() - values.float()).norm() / values.float().norm())
                if not error <= tolerance:  # a NaN is refused, too
                    what, got = f"FP8 attention over {entries} blocks is wrong", f"relative error {error:.3g}"
                    raise UnavailableError(what, got=got, expected=f"at most {tolerance}")
