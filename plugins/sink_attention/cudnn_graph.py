"""cuDNN's attention over dense windows, through nvidia-cudnn-frontend: one graph a window length, built once.

Nothing here allocates or synchronises while it runs, so a CUDA graph can capture it. On Hopper FP8 attention writes
E4M3 only (cuDNN 9.19), so that is the output asked for everywhere.
Legend: L queries, N keys, H heads, D head_dim.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from longtake.plugins.sink_attention.window import FACTORS
from longtake.runtime.errors import UnavailableError

log = logging.getLogger(__name__)

FRONTEND_FIX = "pip install nvidia-cudnn-frontend, beside a torch that brings cuDNN 9"
AMAX = ("amax_s", "amax_o")


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
    """softmax(q k^T / sqrt(D)) v over dense [tokens, H, D] tensors, for fixed sizes.

    `attention`: "bf16", or "fp8" for E4M3 with the scales FACTORS. `device`: a cuDNN device profile to plan for, where
    there is no GPU; the graph can then be planned, not run. `stats`: also write the log-sum-exp of each query's scaled
    scores, fp32 [H, L].
    """

    def __init__(
        self, queries: int, keys: int, heads: int, dim: int, attention: str, handle: Any, device: Any = None,
        stats: bool = False,
    ):  # fmt: skip
        self._cudnn, self._handle, self._stats = frontend(), handle, stats
        declined = []
        for option in ("AUTO", "COMPOSITE") if attention == "bf16" else (False, True):
            try:
                self._build(queries, keys, heads, dim, attention, option, device)
                self._graph.deselect_engines(["sdpa_fwd_prefill"])  # the frontend's own kernels: compiled with CuTe DSL
                self._graph.build([self._cudnn.heur_mode.A, self._cudnn.heur_mode.FALLBACK])
                break
            except Exception as error:  # cuDNN's types, and RuntimeError
                declined.append(f"{option}: {type(error).__name__}: {str(error)[:1000]}")
        else:
            raise UnavailableError(
                f"cuDNN has no {attention} attention for {queries} queries, {keys} keys, {heads} heads of {dim}",
                got="; ".join(declined),
            )
        self.workspace_bytes = int(self._graph.get_workspace_size())

    def _build(self, queries: int, keys: int, heads: int, dim: int, attention: str, option: Any, device: Any) -> None:
        """Describe the graph. `option`: which of cuDNN's implementations (bf16), or whether the largest probability
        and output are asked for as well (fp8: not every release lets them be left out)."""
        types = self._cudnn.data_type
        io = types.BFLOAT16 if attention == "bf16" else types.FP8_E4M3
        planned_for = {} if device is None else {"device_property": device, "sm_version": 90, "sm_count": 132}
        graph = self._cudnn.pygraph(
            name=f"attention_{attention}_{queries}x{keys}", io_data_type=io, intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT, handle=self._handle, **planned_for,
        )  # fmt: skip
        sizes = {"q": queries, "k": keys, "v": keys}
        tensors = {name: graph.tensor(name=name, data_type=io, **_dense(n, heads, dim)) for name, n in sizes.items()}
        options: dict[str, Any] = {"attn_scale": dim**-0.5, "generate_stats": self._stats, "name": "attention"}
        if attention == "bf16":
            implementation = getattr(self._cudnn.attention_implementation, option)
            out, logs = graph.sdpa(**tensors, **options, implementation=implementation)
        else:
            tensors |= {name: graph.tensor(name=name, data_type=types.FLOAT, **_one()) for name in FACTORS}
            out, logs, *found = graph.sdpa_fp8(**tensors, **options)
            for name, tensor in zip(AMAX, found, strict=True):
                tensor.set_output(option).set_dim(_one()["dim"]).set_stride(_one()["stride"]).set_data_type(types.FLOAT)
                if option:
                    tensors[name] = tensor
        layout = _dense(queries, heads, dim)
        out.set_output(True).set_dim(layout["dim"]).set_stride(layout["stride"]).set_data_type(io)
        if self._stats:
            rows = {"dim": [1, heads, queries, 1], "stride": [heads * queries, queries, 1, 1]}
            logs.set_output(True).set_dim(rows["dim"]).set_stride(rows["stride"]).set_data_type(types.FLOAT)
            tensors["stats"] = logs
        self._graph, self._tensors = graph, {**tensors, "out": out}

    def run(self, pointers: Mapping[str, int], workspace: int, stream: int) -> None:
        """Enqueue on a raw stream handle. `pointers`: addresses of q, k, v, out; for fp8 also FACTORS and AMAX, and stats."""
        self._cudnn.set_stream(self._handle, stream)
        given = {tensor.uid: pointers[name] for name, tensor in self._tensors.items()}
        self._graph.execute(given, workspace, handle=self._handle)


def _dense(tokens: int, heads: int, dim: int) -> dict[str, list[int]]:
    """cuDNN's [batch, heads, tokens, dim] over memory in the order [tokens, heads, dim]."""
    return {"dim": [1, heads, tokens, dim], "stride": [tokens * heads * dim, dim, heads * dim, 1]}


def _one() -> dict[str, list[int]]:
    return {"dim": [1, 1, 1, 1], "stride": [1, 1, 1, 1]}
