"""Time what lies between a block's linears at the sizes of Wan2.2-TI2V-5B, 704x1280, a chunk of 8 latent frames.

longtake bench kernels norm    a table: milliseconds, GB/s of tensors read and written once, share of the
                                         memory's peak, error against the reference; then cross-attention; seconds on an H100
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from torch import Tensor

from longtake.plugins import registry
from longtake.plugins.bench.harness import Bench, Row, inputs_on_gpu, measure
from longtake.plugins.run import launcher_for


def as_in_a_network(values: Tensor, name: str, dtype: str) -> Tensor:
    """Normal numbers, and a factor that brings them into E4M3's range."""
    return values.abs() * 100 if name == "factor" else values


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Every op, and cross-attention."""
    for op in (*registry.block_norm.OPS, *registry.quantize_fp8.OPS):
        channels = args.ffn if op.name == "gelu_quantize_fp8" else args.dim
        dims = {"L": args.tokens, "C": channels, "F": args.frames}
        yield {"op": op.name, "shape": f"{args.tokens}x{channels}", **_measured(op, dims)}
    (op,) = registry.cross_attention.OPS
    dims = {"L": args.tokens, "E": args.text, "H": args.heads, "D": args.dim // args.heads}
    row = {"op": op.name, "shape": f"{args.tokens}x{args.text}", **_measured(op, dims)}
    yield row | {"tflops": 4 * args.tokens * args.text * args.dim / row["ms"] / 1e9}


def _measured(op: registry.Op, dims: dict[str, int]) -> Row:
    launcher = launcher_for(op, dims)
    row = measure(op, dims, launcher, inputs_on_gpu(op, dims, as_in_a_network), 50)
    return row | {"method": launcher.method}


BENCH = Bench(
    "norm",
    __doc__,
    columns=("op", "shape", "method", "ms", "gb_s", "of_peak", "tflops", "error"),
    rows=rows,
    options={
        "tokens": (7040, "tokens of a chunk"),
        "dim": (3072, "features"),
        "ffn": (14336, "features inside the FFN"),
        "frames": (8, "latent frames of a chunk"),
        "text": (512, "tokens of a prompt"),
        "heads": (24, "heads"),
    },
)

main = BENCH.main
