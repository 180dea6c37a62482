"""The exchanges of a cut network that ranks share, run by their communicator between its steps, on the pass's stream.

Legend: L tokens of a rank, H heads, D head_dim, P ranks; T frames, X columns, C channels, G ghost rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from longtake.dtypes import DTYPES
from longtake.formats.segmented_graph import SegmentedGraph, Step
from longtake.plugins.exchange import FIRST_GHOST, GATHER_TOKENS, HALO, TAKE_ROWS
from longtake.runtime.backends.segments.arena import aligned, storage_bytes
from longtake.runtime.parallel.comm import Comm

SIDES = 4  # of a halo: to and from the rank before, to and from the one behind


def exchange_bytes(graph: SegmentedGraph, step: Step) -> int:
    """What a step takes while it runs: its tensors once more, in the order of the ranks they go to or come from; of a halo the
    rows that travel."""
    name, ghost = _told(step)
    if name == TAKE_ROWS:
        return 0
    if name == HALO:
        kind = graph.tensors[step.inputs[0]]
        frames, _, columns, channels = (int(size) for size in kind.shape)
        return SIDES * aligned(DTYPES[kind.dtype].bytes(frames * ghost * columns * channels))
    return sum(storage_bytes(graph.tensors[name]) for name in step.inputs)


class Exchanges:
    """Of one network. Nothing is allocated and nobody waits on the host, so a CUDA graph captures what is enqueued here."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def run(self, step: Step, values: Mapping[str, Tensor], scratch: Tensor) -> None:
        """Enqueue one. scratch: uint8, `exchange_bytes` of it."""
        name, ghost = _told(step)
        inputs, outputs = [values[n] for n in step.inputs], [values[n] for n in step.outputs]
        if name == TAKE_ROWS:
            self.comm.take_rows(inputs[0], FIRST_GHOST, outputs[0])
        elif name == HALO:
            frames, _, *rest = inputs[0].shape
            self.comm.trade_rows(inputs[0], ghost, _staged(scratch, inputs[0].dtype, [(frames, ghost, *rest)] * SIDES))
        else:
            trade = self.comm.trade_tokens if name == GATHER_TOKENS else self.comm.trade_heads
            trade(inputs, outputs, _staged(scratch, inputs[0].dtype, [tuple(x.shape) for x in inputs]))

    def largest(self, scratch: Tensor) -> None:
        """What ranks have found between an op's two launches, fp32 in `scratch`: the largest of all."""
        self.comm.largest(scratch.view(torch.float32))


def _told(step: Step) -> tuple[str, int]:
    """The exchange, and a halo's ghost rows."""
    name, _, ghost = step.name.rpartition("_")
    return (name, int(ghost)) if ghost.isdecimal() else (step.name, 0)


def _staged(scratch: Tensor, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Tensors of equal size, side by side in scratch."""
    made, each = [], scratch.nbytes // len(shapes)
    for i, shape in enumerate(shapes):
        size = torch.Size(shape).numel() * dtype.itemsize
        made.append(scratch[i * each : i * each + size].view(dtype).view(shape))
    return made
