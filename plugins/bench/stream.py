"""Time the stream extension at the sizes of the Wan2.2-TI2V-5B decoder, 704x1280, one latent a step.

A row: milliseconds, GB/s of x, y and cache read and written, error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from longtake.options import Command
from longtake.plugins.bench.harness import Row, TableOptions, exit_code, inputs_on_gpu, measure, memory_use
from longtake.plugins.registry import op_named
from longtake.plugins.run import launcher_for

# op, frames, height, width, channels, how often in a step
CASES = (
    ("stream_extend", 1, 44, 80, 48, 1),
    ("norm_silu_extend", 1, 44, 80, 1024, 10),
    ("stream_extend", 1, 44, 80, 1024, 1),
    ("norm_silu_extend", 2, 88, 160, 1024, 6),
    ("stream_extend", 2, 88, 160, 1024, 1),
    ("norm_silu_extend", 4, 176, 320, 1024, 1),
    ("norm_silu_extend", 4, 176, 320, 512, 5),
    ("norm_silu_extend", 4, 352, 640, 512, 1),
    ("norm_silu_extend", 4, 352, 640, 256, 6),
)
PAST = 2
COLUMNS = ("op", "shape", "count", "ms", "gb_s", "of_peak", "error")


def rows() -> Iterator[Row]:
    """Every case, in bf16."""
    for name, frames, height, width, channels, count in CASES:
        op, dims = op_named(name), {"T": frames, "Y": height, "X": width, "C": channels, "F": PAST}
        row = measure(op, dims, launcher_for(op, dims), inputs_on_gpu(op, dims, lambda values, *_: values), 50)
        frame = 2 * height * width * channels
        row |= memory_use((2 * (frames + PAST) + min(frames, PAST)) * frame / row["ms"] / 1e6)
        yield {"op": name, "shape": f"{frames}x{height}x{width}x{channels}", "count": count, **row}


def run(table: TableOptions) -> int:
    """Print the table, and the sum over a step."""
    measured = table.show(COLUMNS, rows())
    sys.stdout.write(f"a step: {sum(row['count'] * row['ms'] for row in measured):.2f} ms\n")
    return exit_code(measured)


COMMAND = Command(run, (TableOptions,), __doc__)
