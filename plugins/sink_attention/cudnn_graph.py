"""cuDNN's attention over dense windows, through nvidia-cudnn-frontend: one graph a window length, built once.

Nothing here allocates or synchronises while it runs, so a CUDA graph can capture it.
Legend: L queries, N keys, H heads, D head_dim.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from longtake.errors import UnavailableError

log = logging.getLogger(__name__)

FRONTEND_FIX = "pip install nvidia-cudnn-frontend, beside a torch that brings cuDNN 9"


def frontend() -> Any:
    """The module `cudnn`. Raises UnavailableError if it, or the cuDNN library behind it, cannot be loaded."""
    try:
        import cudnn

        log.debug("cuDNN %s, frontend %s", cudnn.backend_version_string(), cudnn.__version__)
    except Exception as error:  # a missing library is reported with the bindings' own types
        raise UnavailableError(
            "cuDNN's frontend cannot be loaded", got=f"{type(error).__name__}: {error}", fix=FRONTEND_FIX
        ) from None
    return cudnn


class CudnnAttention:
    """softmax(q k^T / sqrt(D)) v over dense bf16 [tokens, H, D] tensors, for fixed sizes.

    `device`: a cuDNN device profile to plan for, where there is no GPU; the graph can then be planned, not run.
    """

    def __init__(self, queries: int, keys: int, heads: int, dim: int, handle: Any, device: Any = None):
        self._cudnn, self._handle = frontend(), handle
        declined = []
        for option in ("AUTO", "COMPOSITE"):
            try:
                self._build(queries, keys, heads, dim, option, device)
                self._graph.deselect_engines(["sdpa_fwd_prefill"])  # the frontend's own kernels: compiled with CuTe DSL
                self._graph.build([self._cudnn.heur_mode.A, self._cudnn.heur_mode.FALLBACK])
                break
            except Exception as error:  # cuDNN's types, and RuntimeError
                declined.append(f"{option}: {type(error).__name__}: {str(error)[:1000]}")
        else:
            raise UnavailableError(
                f"cuDNN has no bf16 attention for {queries} queries, {keys} keys, {heads} heads of {dim}",
                got="; ".join(declined),
            )
        self.workspace_bytes = int(self._graph.get_workspace_size())

    def _build(self, queries: int, keys: int, heads: int, dim: int, option: str, device: Any) -> None:
        """Describe the graph. `option`: which of cuDNN's implementations."""
        types = self._cudnn.data_type
        planned_for = {} if device is None else {"device_property": device, "sm_version": 90, "sm_count": 132}
        graph = self._cudnn.pygraph(
            name=f"attention_bf16_{queries}x{keys}", io_data_type=types.BFLOAT16, intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT, handle=self._handle, **planned_for,
        )  # fmt: skip
        sizes = {"q": queries, "k": keys, "v": keys}
        tensors = {
            name: graph.tensor(name=name, data_type=types.BFLOAT16, **_dense(n, heads, dim))
            for name, n in sizes.items()
        }
        implementation = getattr(self._cudnn.attention_implementation, option)
        out, _ = graph.sdpa(
            **tensors, attn_scale=dim**-0.5, generate_stats=False, name="attention", implementation=implementation
        )
        layout = _dense(queries, heads, dim)
        out.set_output(True).set_dim(layout["dim"]).set_stride(layout["stride"]).set_data_type(types.BFLOAT16)
        self._graph, self._tensors = graph, {**tensors, "out": out}

    def run(self, pointers: Mapping[str, int], workspace: int, stream: int) -> None:
        """Enqueue on a raw stream handle. `pointers`: addresses of q, k, v and out."""
        self._cudnn.set_stream(self._handle, stream)
        given = {tensor.uid: pointers[name] for name, tensor in self._tensors.items()}
        self._graph.execute(given, workspace, handle=self._handle)


def _dense(tokens: int, heads: int, dim: int) -> dict[str, list[int]]:
    """cuDNN's [batch, heads, tokens, dim] over memory in the order [tokens, heads, dim]."""
    return {"dim": [1, heads, tokens, dim], "stride": [tokens * heads * dim, dim, heads * dim, 1]}
