"""Cross-attention through a library: cuDNN as it stands, or torch's SDPA, over the same addresses as any launcher.

No allocation (torch's SDPA excepted, whose output a CUDA graph keeps in its pool), on our stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from longtake.errors import UnavailableError
from longtake.plugins.device_memory import on_stream, tensor_at
from longtake.plugins.kernels import Dims
from longtake.plugins.launch import LibraryLauncher, OpLauncher
from longtake.plugins.sink_attention.cudnn_graph import CudnnAttention, frontend
from longtake.plugins.sink_attention.library import torch_attention
from longtake.plugins.spec import Op

BYTES = 2  # of a bf16 number


class CudnnCrossAttention(LibraryLauncher):
    """Through cuDNN's frontend. dims: L, E, H and D."""

    method = "cudnn"

    def make_ready(self) -> None:
        """See LibraryLauncher."""
        dims, handle = self.dims, frontend().create_handle()
        self._graph = CudnnAttention(dims["L"], dims["E"], dims["H"], dims["D"], handle)
        self.workspace_bytes = self._graph.workspace_bytes
        _require_ones(self, self.workspace_bytes)

    def run(self, pointers: Sequence[int], stream: int, workspace: int) -> None:
        """See LibraryLauncher."""
        q, context, out = pointers
        values = context + self.dims["E"] * self.dims["H"] * self.dims["D"] * BYTES
        self._graph.run({"q": q, "k": context, "v": values, "out": out}, workspace, stream)


class TorchCrossAttention(LibraryLauncher):
    """Through torch's scaled_dot_product_attention: cuDNN's or flash's, or whatever torch has for the sizes."""

    method = "torch"

    def __init__(self, op: Op, dims: Dims, fused: bool = True) -> None:
        super().__init__(op, dims)
        self.fused = fused

    def make_ready(self) -> None:
        """See LibraryLauncher. Raises UnavailableError if torch has no fused attention for the sizes."""
        _require_ones(self, 0)

    def run(self, pointers: Sequence[int], stream: int, workspace: int) -> None:
        """See LibraryLauncher."""
        row = self.dims["H"], self.dims["D"]
        q, out = (tensor_at(pointers[i], (self.dims["L"], *row)) for i in (0, 2))
        k, v = tensor_at(pointers[1], (2, self.dims["E"], *row))
        with on_stream(stream):
            out.copy_(torch_attention(q, k, v, fused=self.fused))


def _require_ones(launcher: LibraryLauncher, workspace_bytes: int) -> None:
    """Attend once over nothing but ones, which gives ones. Raises UnavailableError."""
    dims, method = launcher.dims, launcher.method
    row = dims["H"], dims["D"]
    q, out = torch.ones(2, dims["L"], *row, dtype=torch.bfloat16, device="cuda")
    out.zero_()
    context = torch.ones(2, dims["E"], *row, dtype=torch.bfloat16, device="cuda")
    workspace = torch.empty(workspace_bytes + 1, dtype=torch.uint8, device="cuda")
    try:
        pointers = [t.data_ptr() for t in (q, context, out)]
        launcher.run(pointers, torch.cuda.current_stream().cuda_stream, workspace.data_ptr())
        worst = float((out.float() - 1).abs().max())
    except Exception as error:  # cuDNN's types, and RuntimeError
        raise UnavailableError(f"{method}'s attention fails", got=f"{type(error).__name__}: {error}") from None
    if not worst <= 0.02:
        raise UnavailableError(f"{method}'s attention over ones is wrong", got=f"off by {worst:.3g}", expected="1")


def unfused(op: Op, dims: Dims) -> OpLauncher:
    """Through whatever torch has for the sizes."""
    return TorchCrossAttention(op, dims, fused=False)


LAUNCHERS: dict[str, Any] = {"cudnn": CudnnCrossAttention, "torch": TorchCrossAttention}
