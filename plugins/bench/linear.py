"""Time and check the linear ops through their library at the sizes of Wan2.2-TI2V-5B, or other ones.

longtake bench kernels linear            a table; seconds on an H100
longtake bench kernels linear --json F   the rows as JSON too
longtake bench kernels linear --tokens 256 --dim 128 --ffn 512    smaller

Each row: milliseconds in a CUDA graph, TFLOP/s, relative L2 error against fp32 over the same inputs; FP8 with and without
fast accumulation. In FP8 the reference multiplies the codes, so the error is that of adding up and of rounding to bf16.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.plugins.bench.harness import exit_code, milliseconds, no_gpu, print_rows, relative_error
from longtake.plugins.kernels import shape_of
from longtake.plugins.linear.library import CublasLtLinear
from longtake.plugins.ops import REFERENCES
from longtake.plugins.spec import LINEAR_OPS

COLUMNS = ("op", "T", "N", "K", "accum", "ms", "tflops", "error", "note")
E4M3_MAX = 448.0


def tensors_for(op_name: str, dims: dict[str, int]) -> list[Tensor]:
    """Inputs as in a network: normal activations, weights that keep their size; in FP8 codes that use E4M3's range."""
    generator = torch.Generator("cuda").manual_seed(0)

    def made(name: str, shape: tuple[int, ...], kind: str) -> Tensor:
        values = torch.randn(shape, device="cuda", generator=generator)
        if kind == "fp8":
            return (values * (E4M3_MAX / values.abs().max())).to(torch.float8_e4m3fn)
        if kind == "fp32":
            return values.abs() * 1e-4
        return (values * (shape[-1] ** -0.5 if name == "weight" else 1.0)).bfloat16()

    return [made(t.name, shape_of(t, dims), t.dtype) for t in LINEAR_OPS[op_name].inputs]


def measure(op_name: str, dims: dict[str, int], fast: bool, repeats: int) -> dict[str, Any]:
    """One row's figures. Raises LongtakeError where the library declines."""
    given = tensors_for(op_name, dims)
    out = torch.full((dims["T"], dims["N"]), float("nan"), dtype=torch.bfloat16, device="cuda")
    launcher = CublasLtLinear(op_name, dims, fast).prepare()
    pointers = [tensor.data_ptr() for tensor in (*given, out)]
    ms = milliseconds(lambda: launcher.launch(pointers, torch.cuda.current_stream().cuda_stream), repeats)
    tflops = 2 * dims["T"] * dims["N"] * dims["K"] / ms / 1e9
    return {"ms": ms, "tflops": tflops, "error": relative_error(out, REFERENCES[op_name](*given))}


def rows(tokens: int, dim: int, ffn: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Every measurement; a size that the library declines gives a row with the reason."""
    torch.backends.cuda.matmul.allow_tf32 = False  # of the reference
    for op_name in LINEAR_OPS:
        shapes = {"linear_gelu_bf16": ((ffn, dim),)}.get(op_name, ((dim, dim), (ffn, dim), (dim, ffn)))
        for n, k in shapes:
            for fast in (True, False) if op_name.endswith("fp8") else (True,):
                dims = {"T": tokens, "N": n, "K": k}
                accum = ("fast" if fast else "promoted") if op_name.endswith("fp8") else "fp32"
                row: dict[str, Any] = {"op": op_name, **dims, "accum": accum}
                try:
                    row |= measure(op_name, dims, fast, repeats)
                except (LongtakeError, RuntimeError) as error:
                    row["note"] = " ".join(str(error).split())[:300]
                yield row


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 without a GPU, 2 if a row could not be timed."""
    parser = argparse.ArgumentParser(prog="longtake bench kernels linear", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--tokens", type=int, default=7040, help="tokens of a chunk")
    parser.add_argument("--dim", type=int, default=3072)
    parser.add_argument("--ffn", type=int, default=14336)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    args = parser.parse_args(arguments)
    if no_gpu():
        return 1
    found = print_rows(rows(args.tokens, args.dim, args.ffn, args.repeats), COLUMNS, args.json)
    return exit_code(found)
