"""What the benches of the kernels share: options, a timer, an error, inputs, a table whose rows appear as they come."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.plugins.kernels import Dims
from longtake.plugins.launch import OpLauncher
from longtake.plugins.shapes import shape_of
from longtake.plugins.spec import Op
from longtake.plugins.tensors import torch_dtype

Row = dict[str, Any]
PEAK = 3.35e12  # bytes a second of an H100's memory


@dataclass(frozen=True)
class Bench:
    """A bench of one family of ops.

    rows: makes the table's rows from the options, one after the other; one that failed has a note and no "ms".
    options: option -> (default, help), where the default's type is the option's; a tuple is a choice of several.
    facts: what stands beside the rows in the JSON file. summary: lines to print after the table.
    """

    name: str
    doc: str
    columns: tuple[str, ...]
    rows: Callable[[argparse.Namespace], Iterator[Row]]
    options: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    facts: Callable[[argparse.Namespace], Mapping[str, Any]] = lambda args: {}
    summary: Callable[[list[Row]], Iterable[str]] = lambda rows: ()

    def main(self, arguments: list[str] | None = None) -> int:
        """Print the table; 1 without a GPU, 2 if a row could not be timed."""
        args = self._parser().parse_args(arguments)
        if not torch.cuda.is_available():
            sys.stderr.write("needs an NVIDIA GPU: torch.cuda.is_available() is False here\n")
            return 1
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        rows = print_rows(self.rows(args), self.columns, args.json, **self.facts(args))
        sys.stdout.writelines(f"{line}\n" for line in self.summary(rows))
        return 0 if all("ms" in row for row in rows) else 2

    def _parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(
            prog=f"longtake bench kernels {self.name}",
            description=self.doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for option, (default, text) in self.options.items():
            if isinstance(default, tuple):
                parser.add_argument(f"--{option}", nargs="+", choices=default, default=list(default), help=text)
            elif isinstance(default, bool):
                parser.add_argument(f"--{option}", action="store_true", help=text)
            else:
                parser.add_argument(f"--{option}", type=type(default), default=default, help=text)
        parser.add_argument("--json", type=Path, help="write the rows there as well, after each one")
        return parser


def milliseconds(work: Callable[[], None], repeats: int) -> float:
    """Median time of `work`, captured into a CUDA graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Relative L2 error."""
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


def inputs_on_gpu(op: Op, dims: Dims, values: Callable[[Tensor, str, str], Tensor]) -> list[Tensor]:
    """Inputs in spec order: what `values` makes of random normal numbers, a tensor's name and its dtype."""
    generator = torch.Generator("cuda").manual_seed(0)
    normal = ((t, torch.randn(shape_of(t, dims), device="cuda", generator=generator)) for t in op.spec.inputs)
    return [values(numbers, t.name, t.dtype).to(torch_dtype(t)) for t, numbers in normal]


def measure(op: Op, dims: Dims, launcher: OpLauncher, inputs: list[Tensor], repeats: int) -> Row:
    """Milliseconds, GB/s of tensors read and written once, and the worst relative L2 error of an output, in bf16."""
    wanted = op.reference(*inputs)
    aliases = dict(op.spec.aliases)
    outputs = [
        inputs[aliases[i]]
        if i in aliases
        else torch.full(shape_of(t, dims), float("nan"), device="cuda").to(torch_dtype(t))
        for i, t in enumerate(op.spec.outputs)
    ]
    workspace = torch.empty(max(launcher.workspace_bytes, 1), dtype=torch.uint8, device="cuda")
    pointers = [t.data_ptr() for t in (*inputs, *outputs)]

    def work() -> None:
        launcher.launch(pointers, torch.cuda.current_stream().cuda_stream, workspace.data_ptr())

    work()
    pairs = zip(outputs, wanted if isinstance(wanted, tuple) else (wanted,))
    error = max(relative_error(out, w) for out, w in pairs)
    del wanted
    ms = milliseconds(work, repeats)
    gb_s = sum(t.nbytes for t in (*inputs, *outputs)) / ms / 1e6
    return {"ms": ms, "gb_s": gb_s, "of_peak": gb_s * 1e9 / PEAK, "error": error}


def note_of(error: Exception) -> str:
    """A failure, for a row."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def line_of(row: Row, columns: tuple[str, ...]) -> str:
    """A row of a table, its cells 10 wide."""
    cells = (f"{row.get(c, ''):.4g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns)
    return "  ".join(cell.rjust(10) for cell in cells)


def print_rows(rows: Iterable[Row], columns: tuple[str, ...], path: Path | None = None, **facts: Any) -> list[Row]:
    """Print a table row by row; with a path, write {"gpu", *facts, "rows"} there after each, so that a cut run leaves its
    rows. Returns them."""
    sys.stdout.write("  ".join(c.rjust(10) for c in columns) + "\n")
    printed: list[Row] = []
    for row in rows:
        sys.stdout.write(line_of(row, columns) + "\n")
        sys.stdout.flush()
        printed.append(row)
        if path:
            report = {"gpu": torch.cuda.get_device_name(), **facts, "rows": printed}
            path.write_text(json.dumps(report, indent=1))
    return printed
