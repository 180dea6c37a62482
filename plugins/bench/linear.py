"""Time and check the linear ops through their library at the sizes of Wan2.2-TI2V-5B, or other ones.

Seconds on an H100; smaller: --tokens 256 --dim 128 --ffn 512.

Each row: milliseconds in a CUDA graph, TFLOP/s, relative L2 error against fp32 over the same inputs; FP8 with and without
fast accumulation. In FP8 the reference multiplies the codes, so the error is that of adding up and of rounding to bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.options import Command, option
from longtake.plugins.bench.harness import BlockOptions, Row, TableOptions, exit_code, inputs_on_gpu, measure, note_of
from longtake.plugins.fp8 import E4M3_MAX
from longtake.plugins.linear.library import CublasLtLinear
from longtake.plugins.linear.op import OPS

COLUMNS = ("op", "T", "N", "K", "accum", "ms", "tflops", "error", "note")


@dataclass(frozen=True)
class LinearOptions(BlockOptions):
    """What"""

    repeats: int = option(20, metavar="N")
    """runs that the median is of"""


def as_in_a_network(values: Tensor, name: str, dtype: str) -> Tensor:
    """Normal activations, weights that keep their size; in FP8 codes that use E4M3's range."""
    if dtype == "fp8":
        return values * (E4M3_MAX / values.abs().max())
    if dtype == "fp32":
        return values.abs() * 1e-4
    return values * (values.shape[-1] ** -0.5 if name == "weight" else 1.0)


def rows(options: LinearOptions) -> Iterator[Row]:
    """Every measurement; a size that the library declines gives a row with the reason."""
    torch.backends.cuda.matmul.allow_tf32 = False  # of the reference
    dim, ffn = options.dim, options.ffn
    for op in OPS:
        eight_bits = op.spec.inputs[0].dtype == "fp8"
        shapes = ((ffn, dim),) if op.name == "linear_gelu_bf16" else ((dim, dim), (ffn, dim), (dim, ffn))
        for n, k in shapes:
            for fast in (True, False) if eight_bits else (True,):
                dims = {"T": options.tokens, "N": n, "K": k}
                accum = ("fast" if fast else "promoted") if eight_bits else "fp32"
                row: Row = {"op": op.name, **dims, "accum": accum}
                try:
                    launcher = CublasLtLinear(op, dims, fast).prepare()
                    row |= measure(op, dims, launcher, inputs_on_gpu(op, dims, as_in_a_network), options.repeats)
                    row["tflops"] = 2 * options.tokens * n * k / row["ms"] / 1e9
                except (LongtakeError, RuntimeError) as error:
                    row["note"] = note_of(error)
                yield row


def run(options: LinearOptions, table: TableOptions) -> int:
    """Print the table."""
    return exit_code(table.show(COLUMNS, rows(options)))


COMMAND = Command(run, (LinearOptions, TableOptions), __doc__)
