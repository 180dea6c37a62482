"""What the benches of the kernels share: options, a timer, an error, inputs, a table whose rows appear as they come."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.cuda_streams import event_times
from longtake.errors import UnavailableError
from longtake.files import write_json
from longtake.machine.memory_rate import memory_rate
from longtake.options import option
from longtake.plugins.kernels import Dims
from longtake.plugins.launch import OpLauncher
from longtake.plugins.shapes import shape_of, torch_dtype
from longtake.plugins.spec import Op

Row = dict[str, Any]


@dataclass(frozen=True)
class BlockOptions:
    """What"""

    tokens: int = option(7040, metavar="N")
    """tokens of a chunk"""
    dim: int = option(3072, metavar="N")
    """features"""
    ffn: int = option(14336, metavar="N")
    """features inside the FFN"""


@dataclass(frozen=True)
class TableOptions:
    """Output"""

    json: Path | None = option(None, metavar="FILE")
    """write the rows there as well, after each one (default: nowhere)"""

    def show(self, columns: Sequence[str], rows: Iterable[Row], **facts: Any) -> list[Row]:
        """Print a table row by row; with `json`, write {"gpu", *facts, "rows"} there after each, so that a cut run leaves
        its rows. Returns them. Raises UnavailableError without a GPU."""
        require_gpu()
        logging.getLogger("longtake").setLevel(logging.INFO)
        sys.stdout.write("  ".join(c.rjust(10) for c in columns) + "\n")
        printed: list[Row] = []
        for row in rows:
            sys.stdout.write(line_of(row, columns) + "\n")
            sys.stdout.flush()
            printed.append(row)
            if self.json:
                write_json(self.json, {"gpu": torch.cuda.get_device_name(), **facts, "rows": printed})
        return printed


def require_gpu() -> None:
    """Raise UnavailableError if there is none."""
    if not torch.cuda.is_available():
        raise UnavailableError("this needs an NVIDIA GPU", got="none", fix="run it on a machine with one")


def exit_code(rows: Sequence[Row]) -> int:
    """2 if a row could not be timed, else 0."""
    return 0 if all("ms" in row for row in rows) else 2


def milliseconds(work: Callable[[], None], repeats: int) -> float:
    """Median time of `work`, captured into a CUDA graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    return sorted(event_times(graph.replay, repeats))[repeats // 2]


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
    return {"ms": ms, **memory_use(gb_s), "error": error}


def memory_use(gb_s: float) -> Row:
    """GB/s and, on a GPU whose memory's rate is known, the share of it."""
    rate = memory_rate(torch.cuda.get_device_name())
    return {"gb_s": gb_s, **({"of_peak": gb_s * 1e9 / rate} if rate else {})}


def note_of(error: Exception) -> str:
    """A failure, for a row."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def line_of(row: Row, columns: Sequence[str]) -> str:
    """A row of a table, its cells 10 wide."""
    cells = (f"{row.get(c, ''):.4g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns)
    return "  ".join(cell.rjust(10) for cell in cells)
