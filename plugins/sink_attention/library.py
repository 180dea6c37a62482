"""Sink attention through a library: our kernel lays the window out, cuDNN (or torch's SDPA) attends over it.

op.py lists these, our own kernel for Hopper and the portable one.
Launchers of the op like the portable one: same tensors, same table, no allocation (torch's excepted), on our stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longtake.errors import UnavailableError
from longtake.plugins.device_memory import on_stream, tensor_at
from longtake.plugins.launch import Launcher
from longtake.plugins.sink_attention.cudnn_graph import CudnnAttention, frontend
from longtake.plugins.sink_attention.hopper import HopperSinkAttention
from longtake.plugins.sink_attention.window import WindowedAttention, addresses


class CudnnSinkAttention(WindowedAttention):
    """Through cuDNN's frontend. prepare() plans a graph for every length, so none is planned on the way."""

    method = "cudnn"
    _graphs: dict[int, CudnnAttention] | None = None  # by the window's length

    def prepare(self) -> Launcher:
        """See Launcher.prepare. Raises UnavailableError without the frontend or if cuDNN declines the sizes."""
        super().prepare()
        if self._graphs is None:
            cudnn, dims = frontend(), self.dims
            self._handle = cudnn.create_handle()
            self._graphs = {
                entries: CudnnAttention(dims["L"], entries * dims["L"], dims["H"], dims["D"], self._handle)
                for entries in range(1, dims["S"] + 1)
            }
            self.workspace_bytes += max(graph.workspace_bytes for graph in self._graphs.values())
            self._try()
        return self

    def _try(self) -> None:
        """Attend over windows of ones, of every length: what fails must fail before the run.

        Raises UnavailableError. Takes the workspace, queries and an output for a moment.
        """
        dims = self.dims
        memory = torch.ones(-(-self.workspace_bytes // 2), dtype=torch.bfloat16, device="cuda")
        q, out = torch.ones(2, dims["L"], dims["H"], dims["D"], dtype=torch.bfloat16, device="cuda")
        for entries in range(1, dims["S"] + 1):
            out.fill_(float("nan"))
            stream = torch.cuda.current_stream().cuda_stream
            try:
                self.attend((q.data_ptr(), out.data_ptr()), stream, memory.data_ptr(), entries)
                low, high = out.min().item(), out.max().item()
            except Exception as error:  # cuDNN's types, and RuntimeError
                raise UnavailableError("cuDNN's attention fails", got=f"{type(error).__name__}: {error}") from None
            if not (0.98 <= low and high <= 1.02):  # a NaN is refused, too
                what = f"cuDNN's bf16 attention over {entries} blocks of ones is wrong"
                raise UnavailableError(what, got=f"{low:.4g} to {high:.4g}", expected="1")

    def attend(self, pointers: Sequence[int], stream: int, workspace: int, table_len: int) -> None:
        """See WindowedAttention.attend."""
        assert self._graphs is not None  # launch() has called prepare()
        window, end = addresses(self.dims, workspace)
        tensors = {"q": pointers[0], "k": window["window_k"], "v": window["window_v"], "out": pointers[-1]}
        self._graphs[table_len].run(tensors, end, stream)


class TorchSinkAttention(WindowedAttention):
    """Through torch's scaled_dot_product_attention, cuDNN's before flash's: it allocates its output."""

    method = "torch"
    _tried = False

    def prepare(self) -> Launcher:
        """See Launcher.prepare. Raises UnavailableError if torch has neither for the sizes."""
        super().prepare()
        if not self._tried:
            shape = (self.dims["L"], self.dims["H"], self.dims["D"])
            try:
                q, kv = (torch.zeros((n, *shape[1:]), dtype=torch.bfloat16, device="cuda") for n in (shape[0], 128))
                torch_attention(q, kv, kv)
            except RuntimeError as error:
                raise UnavailableError("torch has no fused attention for these sizes", got=str(error)) from None
            self._tried = True
        return self

    def attend(self, pointers: Sequence[int], stream: int, workspace: int, table_len: int) -> None:
        """See WindowedAttention.attend."""
        queries, heads, dim = self.dims["L"], self.dims["H"], self.dims["D"]
        window = addresses(self.dims, workspace)[0]
        q, out = (tensor_at(address, (queries, heads, dim)) for address in (pointers[0], pointers[-1]))
        k, v = (tensor_at(window[name], (table_len * queries, heads, dim)) for name in ("window_k", "window_v"))
        with on_stream(stream):
            out.copy_(torch_attention(q, k, v))


def torch_attention(q: Tensor, k: Tensor, v: Tensor, fused: bool = True) -> Tensor:
    """bf16 [L, H, D], [N, H, D] twice to [L, H, D]. `fused`: raise RuntimeError if neither cuDNN nor flash takes it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    others = [] if fused else [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *others], set_priority=True):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


LAUNCHERS: dict[str, Any] = {way.method: way for way in (CudnnSinkAttention, TorchSinkAttention, HopperSinkAttention)}
