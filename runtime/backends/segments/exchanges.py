"""The exchanges of a cut network that ranks share, run by their communicator between its steps, on the pass's stream.

Legend: L tokens of a rank, H heads, D head_dim, P ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from longtake.formats.segmented_graph import SegmentedGraph, Step
from longtake.plugins.exchange import GATHER_TOKENS
from longtake.runtime.backends.segments.arena import storage_bytes
from longtake.runtime.parallel.comm import Comm


class Exchanges:
    """Of one network. Nothing is allocated and nobody waits on the host, so a CUDA graph captures what is enqueued here."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def scratch_bytes(self, graph: SegmentedGraph, step: Step) -> int:
        """What a step takes while it runs: its tensors once more, in the order of the ranks they go to or come from."""
        return sum(storage_bytes(graph.tensors[name]) for name in step.inputs)

    def run(self, step: Step, values: Mapping[str, Tensor], scratch: Tensor) -> None:
        """Enqueue one. scratch: uint8, `scratch_bytes` of it."""
        trade = self.comm.trade_tokens if step.name == GATHER_TOKENS else self.comm.trade_heads
        inputs, start = [values[name] for name in step.inputs], 0
        staged = []
        for x in inputs:
            staged.append(scratch[start : start + x.nbytes].view(x.dtype).view(x.shape))
            start += scratch.nbytes // len(inputs)
        trade(inputs, [values[name] for name in step.outputs], staged)

    def largest(self, scratch: Tensor) -> None:
        """What ranks have found between an op's two launches, fp32 in `scratch`: the largest of all."""
        self.comm.largest(scratch.view(torch.float32))
