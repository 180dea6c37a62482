"""Attention over a window that a kernel lays out first: the launcher's frame, and the bf16 layout that libraries read.

Attention does not care for the order of its keys, so slots are laid out in the table's order. All layers share one
workspace: a layer's window is gone when the next one's is written.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from longtake.plugins import driver
from longtake.plugins.cache_format import cache_format_of, cache_tensors
from longtake.plugins.kernels import Call, Dims, Kernel, blocks_of
from longtake.plugins.kv_cache_write.reference import RULE
from longtake.plugins.launch import Launcher
from longtake.plugins.nvfp4.reference import limit_macros
from longtake.plugins.spec import Op

THREADS = 256
ITEMS = 4  # pieces of 16 bytes a thread of the bf16 kernel writes
ALIGNMENT = 256  # bytes, of every buffer in the workspace


class WindowedAttention(Launcher):
    """Lay out, attend. Subclasses attend. Tables have at most S entries; `kernel` lays out, and reads W from the dims."""

    def __init__(self, op: Op, dims: Dims, arch: str | None = None, kernel: Kernel | None = None) -> None:
        fixed = {letter: size for letter, size in dims.items() if letter != "W"}
        self.cache_format = cache_format_of(op.spec)
        super().__init__(op, {**fixed, "W": fixed["S"]}, "bf16", arch, kernel or window_kernel(self.cache_format))

    def launch(self, pointers: Sequence[int], stream: int, workspace: int = 0, table_len: int = 0) -> None:
        """See Launcher.launch."""
        self._check(pointers, workspace, table_len, longest=self.dims["S"])
        self.prepare()
        driver.ensure_context()
        self.lay_out(pointers, stream, workspace, table_len)
        self.attend(pointers, stream, workspace, table_len)

    def lay_out(self, pointers: Sequence[int], stream: int, workspace: int, table_len: int) -> None:
        """Enqueue what writes the window."""
        calls = self.kernel.calls({**self.dims, "W": table_len})
        self.enqueue(calls, pointers, stream, workspace, table_len)

    @abstractmethod
    def attend(self, pointers: Sequence[int], stream: int, workspace: int, table_len: int) -> None:
        """Enqueue attention over the window of `table_len` blocks that lies in the workspace."""


def elements(dims: Dims) -> int:
    """Numbers in one block's K (as many as in V, the queries or the output)."""
    return dims["L"] * dims["H"] * dims["D"]


def addresses(dims: Dims, workspace: int) -> tuple[dict[str, int], int]:
    """The address of each buffer of a bf16 window of W entries (dims has W), and of the first byte after them."""
    size = 2 * dims["W"] * elements(dims)
    return in_a_row({"window_k": size, "window_v": size}, workspace)


def in_a_row(sizes: Mapping[str, int], start: int) -> tuple[dict[str, int], int]:
    """The address of each buffer of so many bytes, aligned one after the other, and of the first byte after them."""
    addresses, end = {}, start
    for name, size in sizes.items():
        addresses[name] = end
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return addresses, end


def window_kernel(fmt: str) -> Kernel:
    """What lays the window out in bf16, for cache format `fmt`. The dims of its calls need W, the table's length."""
    return Kernel(
        source=Path(__file__).with_name("window_bf16.cu"),
        macros=lambda dims: {
            "THREADS": THREADS, "ITEMS": ITEMS, "CACHE_NVFP4": int(fmt == "nvfp4"), **limit_macros(RULE),
        },
        calls=lambda dims: (_call(fmt, dims),),
        workspace_bytes=lambda dims: addresses(dims, 0)[1],
        buffers=lambda dims, workspace: addresses(dims, workspace)[0],
    )  # fmt: skip


def _call(fmt: str, dims: Dims) -> Call:
    pieces = elements(dims) // 8
    arguments: tuple[str | int, ...] = ("k", "v", *cache_names(fmt), "table", "window_k", "window_v", dims["S"], pieces)
    return Call("window_bf16", (blocks_of(pieces, THREADS * ITEMS), 2 * dims["W"]), THREADS, arguments)


def cache_names(fmt: str) -> tuple[str, ...]:
    """The names of the cache's tensors."""
    return tuple(tensor.name for tensor in cache_tensors(fmt))
