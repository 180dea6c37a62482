"""What the benches of the kernels share: a timer, an error, a table whose rows appear as they come."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def no_gpu() -> bool:
    """Whether there is none to time; says so."""
    if torch.cuda.is_available():
        return False
    sys.stderr.write("needs an NVIDIA GPU: torch.cuda.is_available() is False here\n")
    return True


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
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


def line_of(row: dict[str, Any], columns: tuple[str, ...]) -> str:
    """A row of a table, its cells 10 wide."""
    cells = (f"{row.get(c, ''):.4g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns)
    return "  ".join(cell.rjust(10) for cell in cells)


def print_rows(
    rows: Iterable[dict[str, Any]], columns: tuple[str, ...], path: Path | None = None, **facts: Any
) -> list[dict[str, Any]]:
    """Print a table row by row; with a path, write {"gpu", *facts, "rows"} there after each, so that a cut run leaves its
    rows. Returns them."""
    sys.stdout.write("  ".join(c.rjust(10) for c in columns) + "\n")
    found: list[dict[str, Any]] = []
    for row in rows:
        sys.stdout.write(line_of(row, columns) + "\n")
        sys.stdout.flush()
        found.append(row)
        if path:
            report = {"gpu": torch.cuda.get_device_name(), **facts, "rows": found}
            path.write_text(json.dumps(report, indent=1))
    return found


def exit_code(rows: Iterable[dict[str, Any]]) -> int:
    """0 if every row was timed, else 2."""
    return 0 if all("ms" in row for row in rows) else 2
