"""Time what lies between a block's linears at the sizes of Wan2.2-TI2V-5B, 704x1280, a chunk of 8 latent frames.

A row: milliseconds, GB/s of tensors read and written once, share of the memory's peak, error against the reference; then
cross-attention. Seconds on an H100.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from longtake.options import Command, option
from longtake.plugins import registry
from longtake.plugins.bench.harness import BlockOptions, Row, TableOptions, exit_code, inputs_on_gpu, measure
from longtake.plugins.run import launcher_for

COLUMNS = ("op", "shape", "method", "ms", "gb_s", "of_peak", "tflops", "error")


@dataclass(frozen=True)
class NormOptions(BlockOptions):
    """What"""

    frames: int = option(8, metavar="N")
    """latent frames of a chunk"""
    text: int = option(512, metavar="N")
    """tokens of a prompt"""
    heads: int = option(24, metavar="N")
    """heads"""


def as_in_a_network(values: Tensor, name: str, dtype: str) -> Tensor:
    """Normal numbers, and a factor that brings them into E4M3's range."""
    return values.abs() * 100 if name == "factor" else values


def rows(options: NormOptions) -> Iterator[Row]:
    """Every op, and cross-attention."""
    for op in (*registry.block_norm.OPS, *registry.quantize_fp8.OPS):
        channels = options.ffn if op.name == "gelu_quantize_fp8" else options.dim
        dims = {"L": options.tokens, "C": channels, "F": options.frames}
        yield {"op": op.name, "shape": f"{options.tokens}x{channels}", **_measured(op, dims)}
    (op,) = registry.cross_attention.OPS
    dims = {"L": options.tokens, "E": options.text, "H": options.heads, "D": options.dim // options.heads}
    row = {"op": op.name, "shape": f"{options.tokens}x{options.text}", **_measured(op, dims)}
    yield row | {"tflops": 4 * options.tokens * options.text * options.dim / row["ms"] / 1e9}


def _measured(op: registry.Op, dims: dict[str, int]) -> Row:
    launcher = launcher_for(op, dims)
    row = measure(op, dims, launcher, inputs_on_gpu(op, dims, as_in_a_network), 50)
    return row | {"method": launcher.method}


def run(options: NormOptions, table: TableOptions) -> int:
    """Print the table."""
    return exit_code(table.show(COLUMNS, rows(options)))


COMMAND = Command(run, (NormOptions, TableOptions), __doc__)
