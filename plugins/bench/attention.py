"""Time and check every way to compute sink attention at the sizes of Wan2.2-TI2V-5B, or other ones.

longtake bench kernels attention            a table; about a minute on an H100
longtake bench kernels attention --json F   the rows as JSON too
longtake bench kernels attention --tokens 256 --slots 2 --heads 4    smaller

Each row: milliseconds of the whole op and of its parts (window: our kernels that unpack, with the bandwidth they reach;
attend: the library, or our own kernel for Hopper (wgmma)), ratio of cuDNN's bf16 attention over keys and values that are
unpacked already to the whole op (more is faster), TFLOP/s of the whole op, relative L2 error against attention in fp32 over
the dequantized window.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.plugins.bench.harness import exit_code, milliseconds, no_gpu, print_rows, relative_error
from longtake.plugins.kernels import shape_of
from longtake.plugins.launch import TORCH_DTYPES, Launcher, run_kernel
from longtake.plugins.sink_attention.hopper import HopperSinkAttention
from longtake.plugins.sink_attention.library import LAUNCHERS
from longtake.plugins.sink_attention.reference import dequantize_kv
from longtake.plugins.sink_attention.window import WindowedAttention
from longtake.plugins.spec import CACHE_FORMATS, cache_tensors

WAYS = (("cudnn", "bf16"), ("wgmma", "fp8"), ("torch", "bf16"), ("portable", "bf16"))
COLUMNS = ("cache", "keys", "method", "kind", "ms", "tflops", "window_ms", "window_gb_s", "attend_ms",
           "ratio", "error", "note")  # fmt: skip


class Attention:
    """One layer's tensors on the GPU: fresh q, k, v and a cache whose slots are all written."""

    def __init__(self, fmt: str, dims: dict[str, int]) -> None:
        self.fmt, self.dims, self.op = fmt, dims, f"sink_attention_{fmt}"
        generator = torch.Generator("cuda").manual_seed(0)
        shape = (dims["L"], dims["H"], dims["D"])

        def block() -> Tensor:
            return torch.randn(shape, device="cuda", generator=generator, dtype=torch.bfloat16)

        specs = cache_tensors(fmt)
        types = [TORCH_DTYPES["bf16" if spec.dtype == "compute" else spec.dtype] for spec in specs]
        self.cache = [torch.zeros(shape_of(s, dims), dtype=t, device="cuda") for s, t in zip(specs, types)]
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
        out = torch.empty(self.q.shape, device="cuda")
        for head in range(self.dims["H"]):
            parts = [self._head(slot, head) for slot in table.tolist()]
            keys, values = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
            scores = (self.q[:, head].float() * self.dims["D"] ** -0.5) @ keys.T
            out[:, head] = torch.softmax(scores, dim=-1) @ values
        return out

    def _head(self, slot: int, head: int) -> Tensor:
        """One slot's K and V of one head in fp32 [2, L, D]."""
        if slot < 0:
            return torch.stack((self.k[:, head], self.v[:, head])).float()
        if self.fmt == "bf16":
            return self.cache[0][slot, :, :, head].float()
        values, scales, amax = self.cache
        pick = slice(head, head + 1)
        return dequantize_kv(values[slot : slot + 1, :, :, pick], scales[slot : slot + 1, :, :, pick],
                             amax[slot : slot + 1])[0, :, :, 0]  # fmt: skip


def launcher_for(method: str, kind: str, case: Attention) -> Launcher:
    """A prepared launcher. Raises LongtakeError where it cannot run."""
    if method == "portable":
        return Launcher(case.op, case.dims).prepare()
    made: Launcher = LAUNCHERS[method](case.op, case.dims).prepare()
    if isinstance(made, HopperSinkAttention):
        made.try_out()
    return made


def measure(case: Attention, method: str, kind: str, entries: int, wanted: Tensor, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    dims, table = case.dims, case.table(entries)
    launcher = launcher_for(method, kind, case)
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
        row |= {"attend_ms": attend_ms, "window_ms": window_ms,
                "window_gb_s": window_bytes(case, kind, entries) / window_ms / 1e6}  # fmt: skip
    return row


def window_bytes(case: Attention, kind: str, entries: int) -> float:
    """Bytes that laying out the window must read and write at least; for fp8 also the passes over q, k, v."""
    pane = case.dims["L"] * case.dims["H"] * case.dims["D"]
    cached = 2 * (entries - 1) * pane * (4.5 / 8 if case.fmt == "nvfp4" else 2)
    if kind == "bf16":
        return cached + 2 * pane * 2 + 2 * entries * pane * 2
    return cached * (1 if case.fmt == "nvfp4" else 2) + 3 * pane * 2 * 2 + (2 * entries + 1) * pane


def rows(
    formats: list[str], dims: dict[str, int], ways: list[tuple[str, str]], repeats: int
) -> Iterator[dict[str, Any]]:
    """Every measurement; a way that cannot run gives a row with the reason."""
    for fmt in formats:
        case = Attention(fmt, dims)
        for entries in range(1, dims["S"] + 1):
            wanted = case.reference(case.table(entries))
            unpacked_ms = 0.0  # cuDNN's bf16 attention alone, over keys and values that lie unpacked already
            for method, kind in ways:
                row: dict[str, Any] = {"cache": fmt, "keys": entries * dims["L"], "method": method, "kind": kind}
                try:
                    row |= measure(case, method, kind, entries, wanted, repeats)
                    if (method, kind) == ("cudnn", "bf16"):
                        unpacked_ms = row["attend_ms"]
                    if unpacked_ms:
                        row["ratio"] = unpacked_ms / row["ms"]
                except (LongtakeError, RuntimeError) as error:
                    row["note"] = " ".join(str(error).split())[:300]
                yield row


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 without a GPU, 2 if a row could not be timed."""
    parser = argparse.ArgumentParser(prog="longtake bench kernels attention", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--tokens", type=int, default=7040, help="tokens of a chunk")
    parser.add_argument("--slots", type=int, default=4, help="chunks in the window")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--cache", choices=(*CACHE_FORMATS, "all"), default="nvfp4")
    parser.add_argument("--no-portable", action="store_true", help="leave out the slow one")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    args = parser.parse_args(arguments)
    if no_gpu():
        return 1
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    dims = {"S": args.slots, "L": args.tokens, "H": args.heads, "D": args.dim}
    formats = list(CACHE_FORMATS) if args.cache == "all" else [args.cache]
    ways = [way for way in WAYS if way[0] != "portable" or not args.no_portable]
    return exit_code(print_rows(rows(formats, dims, ways, args.repeats), COLUMNS, args.json, dims=dims))
