"""Time and check every way to compute sink attention at the sizes of Wan2.2-TI2V-5B, or other ones.

About a minute on an H100; smaller: --tokens 256 --slots 2 --heads 4.

Each row: milliseconds of the whole op and of its parts (window: our kernels that unpack, with the bandwidth they reach;
attend: the library, or our own kernel for Hopper (wgmma)), ratio of cuDNN's bf16 attention over keys and values that are
unpacked already to the whole op (more is faster), TFLOP/s of the whole op, relative L2 error against attention in fp32 over
the dequantized window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.options import Command, OneOf, check, option
from longtake.plugins.bench.harness import Row, TableOptions, exit_code, milliseconds, note_of, relative_error
from longtake.plugins.cache_format import CACHE_FORMATS, cache_tensors
from longtake.plugins.registry import op_named
from longtake.plugins.run import launcher_by, run_kernel
from longtake.plugins.shapes import shape_of, torch_dtype
from longtake.plugins.sink_attention.window import WindowedAttention

WAYS = (("cudnn", "bf16"), ("wgmma", "fp8"), ("torch", "bf16"), ("portable", "bf16"))
COLUMNS = "cache keys method kind ms tflops window_ms window_gb_s attend_ms ratio error note".split()


@dataclass(frozen=True)
class AttentionOptions:
    """What"""

    tokens: int = option(7040, metavar="N")
    """tokens of a chunk"""
    slots: int = option(4, metavar="N")
    """chunks in the window"""
    heads: int = option(24, metavar="N")
    """heads"""
    dim: int = option(128, metavar="N")
    """features of a head"""
    repeats: int = option(10, metavar="N")
    """runs that the median is of"""
    cache: Annotated[str, OneOf((*CACHE_FORMATS, "all"))] = option("nvfp4")
    """format of the cache, or all"""
    portable: bool = option(True)
    """leave out the slow one"""

    def __post_init__(self) -> None:
        check(self)

    @property
    def dims(self) -> dict[str, int]:
        return {"S": self.slots, "L": self.tokens, "H": self.heads, "D": self.dim}


class Attention:
    """One layer's tensors on the GPU: fresh q, k, v and a cache whose slots are all written."""

    def __init__(self, fmt: str, dims: dict[str, int]) -> None:
        self.fmt, self.dims, self.op = fmt, dims, op_named(f"sink_attention_{fmt}")
        generator = torch.Generator("cuda").manual_seed(0)
        shape = (dims["L"], dims["H"], dims["D"])

        def block() -> Tensor:
            return torch.randn(shape, device="cuda", generator=generator, dtype=torch.bfloat16)

        specs = cache_tensors(fmt)
        self.cache = [torch.zeros(shape_of(s, dims), dtype=torch_dtype(s), device="cuda") for s in specs]
        for slot in range(dims["S"]):
            where = torch.tensor([slot], dtype=torch.int32, device="cuda")
            run_kernel(f"kv_cache_write_{fmt}", block(), block(), *self.cache, where)
        self.q, self.k, self.v = block(), block(), block()
        self.out = torch.empty_like(self.q)

    def table(self, entries: int) -> Tensor:
        """The last entry is the fresh block; the slots before it are in no order."""
        return torch.tensor([*reversed(range(entries - 1)), -1], dtype=torch.int32, device="cuda")

    def pointers(self, table: Tensor) -> list[int]:
        return [t.data_ptr() for t in (self.q, self.k, self.v, *self.cache, table, self.out)]

    @torch.no_grad()
    def reference(self, table: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(D)) v in fp32, a head at a time."""
        heads = []
        for head in range(self.dims["H"]):
            q, k, v = (t[:, head : head + 1].float() for t in (self.q, self.k, self.v))
            cache = (t[:, :, :, head : head + 1] if t.dim() > 2 else t for t in self.cache)
            heads.append(self.op.reference(q, k, v, *cache, table))
        return torch.cat(heads, 1)


def measure(case: Attention, method: str, kind: str, entries: int, wanted: Tensor, repeats: int) -> Row:
    """One row of the table."""
    dims, table = case.dims, case.table(entries)
    launcher = launcher_by(case.op, method, dims)
    workspace = torch.empty(max(launcher.workspace_bytes, 1), dtype=torch.uint8, device="cuda")
    pointers = case.pointers(table)
    case.out.fill_(float("nan"))

    def stream() -> int:
        return torch.cuda.current_stream().cuda_stream

    def whole() -> None:
        launcher.launch(pointers, stream(), workspace.data_ptr(), entries)

    ms = milliseconds(whole, 1 if method == "portable" else repeats)
    flop = 4 * dims["L"] ** 2 * entries * dims["H"] * dims["D"]
    row = {"ms": ms, "tflops": flop / ms / 1e9, "error": relative_error(case.out, wanted)}
    at = workspace.data_ptr()
    if isinstance(launcher, WindowedAttention):
        attend_ms = milliseconds(lambda: launcher.attend(pointers, stream(), at, entries), repeats)
        window_ms = milliseconds(lambda: launcher.lay_out(pointers, stream(), at, entries), repeats)
        row |= {"attend_ms": attend_ms, "window_ms": window_ms}
        row["window_gb_s"] = window_bytes(case, kind, entries) / window_ms / 1e6
    return row


def window_bytes(case: Attention, kind: str, entries: int) -> float:
    """Bytes that laying out the window must read and write at least; for fp8 also the passes over q, k, v."""
    pane = case.dims["L"] * case.dims["H"] * case.dims["D"]
    cached = 2 * (entries - 1) * pane * (4.5 / 8 if case.fmt == "nvfp4" else 2)
    if kind == "bf16":
        return cached + 2 * pane * 2 + 2 * entries * pane * 2
    return cached * (1 if case.fmt == "nvfp4" else 2) + 3 * pane * 2 * 2 + (2 * entries + 1) * pane


def rows(options: AttentionOptions) -> Iterator[Row]:
    """Every measurement; a way that cannot run gives a row with the reason."""
    dims, ways = options.dims, [way for way in WAYS if options.portable or way[0] != "portable"]
    for fmt in CACHE_FORMATS if options.cache == "all" else (options.cache,):
        case = Attention(fmt, dims)
        for entries in range(1, dims["S"] + 1):
            wanted = case.reference(case.table(entries))
            unpacked_ms = 0.0  # cuDNN's bf16 attention alone, over keys and values that lie unpacked already
            for method, kind in ways:
                row: Row = {"cache": fmt, "keys": entries * dims["L"], "method": method, "kind": kind}
                try:
                    row |= measure(case, method, kind, entries, wanted, options.repeats)
                    if (method, kind) == ("cudnn", "bf16"):
                        unpacked_ms = row["attend_ms"]
                    if unpacked_ms:
                        row["ratio"] = unpacked_ms / row["ms"]
                except (LongtakeError, RuntimeError) as error:
                    row["note"] = note_of(error)
                yield row


def run(options: AttentionOptions, table: TableOptions) -> int:
    """Print the table."""
    return exit_code(table.show(COLUMNS, rows(options), dims=options.dims))


COMMAND = Command(run, (AttentionOptions, TableOptions), __doc__)
