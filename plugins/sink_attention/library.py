"""Sink attention through a library: our kernel lays the window out, cuDNN (or torch's SDPA) attends over it.

attention_launcher() chooses among these, our own kernel for Hopper and the portable one.
Launchers of the op like the portable one: same tensors, same table, no allocation (torch's excepted), on our stream.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from longtake.plugins import driver
from longtake.plugins.capability import attention_methods
from longtake.plugins.device_memory import on_stream, tensor_at
from longtake.plugins.kernels import Call, Dims
from longtake.plugins.launch import Launcher, compute_capability_of
from longtake.plugins.sink_attention.cudnn_graph import AMAX, CudnnAttention, frontend
from longtake.plugins.sink_attention.hopper import HopperSinkAttention
from longtake.plugins.sink_attention.trial import ONES, trials
from longtake.plugins.sink_attention.window import FACTOR_BYTES, FACTORS, addresses, parts, window_kernels
from longtake.runtime.errors import UnavailableError

log = logging.getLogger(__name__)


class WindowedAttention(Launcher):
    """Lay out, attend, widen. Subclasses attend. Tables have at most S entries."""

    def __init__(self, op_name: str, dims: Dims, attention: str = "bf16", arch: str | None = None) -> None:
        fixed = {letter: size for letter, size in dims.items() if letter != "W"}
        kernels = window_kernels(op_name.removeprefix("sink_attention_"), attention)
        super().__init__(op_name, {**fixed, "W": fixed["S"]}, "bf16", arch, kernels)
        self.attention = attention
        self.workspace_bytes = addresses(self.dims, attention, 0)[1]

    def launch(self, pointers: Sequence[int], stream: int, workspace: int = 0, table_len: int = 0) -> None:
        """See Launcher.launch."""
        self._check(pointers, workspace, table_len, longest=self.dims["S"])
        self.prepare()
        driver.ensure_context()
        for step, function in zip(self.kernels.calls({**self.dims, "W": table_len}), self._functions or ()):
            if step.function != "widen_out":
                values = self.arguments(step, pointers, workspace, table_len)
                driver.launch(function, step.grid, step.threads, stream, values)
        self._attend(pointers, workspace, table_len, stream)
        self._merge(pointers, workspace, table_len, stream)

    def _merge(self, pointers: Sequence[int], workspace: int, table_len: int, stream: int) -> None:
        """What follows attention: for fp8, the parts' outputs as one, in bf16."""
        if self.attention == "fp8":
            assert self._functions is not None  # prepare() has loaded them
            step, function = self.kernels.calls({**self.dims, "W": table_len})[-1], self._functions[-1]
            values = self.arguments(step, pointers, workspace, table_len)
            driver.launch(function, step.grid, step.threads, stream, values)

    def arguments(self, call: Call, pointers: Sequence[int], workspace: int, table_len: int) -> tuple[int, ...]:
        """See Launcher.arguments; the workspace's buffers have names as well."""
        spec = self.kernels.spec
        known = dict(zip((t.name for t in (*spec.inputs, *spec.outputs)), pointers))
        known |= addresses(self.dims, self.attention, workspace)[0]
        return tuple(a if isinstance(a, int) else known[a] for a in call.arguments)

    def _attend(self, pointers: Sequence[int], workspace: int, table_len: int, stream: int) -> None:
        found, end = addresses(self.dims, self.attention, workspace)
        given = {"q": pointers[0], "k": found["window_k"], "v": found["window_v"], "out": pointers[-1]}
        if self.attention == "fp8":
            given |= {"q": found["query8"], "out": found["out8"]}
            given |= {name: found["factors"] + i * FACTOR_BYTES for i, name in enumerate(FACTORS)}
            given |= {name: found[name] for name in (*AMAX, "stats")}
        self.attend(given, end, table_len, stream)

    @abstractmethod
    def attend(self, pointers: Mapping[str, int], workspace: int, table_len: int, stream: int) -> None:
        """Enqueue attention over a window of `table_len` blocks; `workspace` is what lies after the buffers.

        For fp8: over each of window.parts() apart, into out [parts, L,H,D] and, if there are several, stats [parts, H,L].
        """


class CudnnSinkAttention(WindowedAttention):
    """Through cuDNN's frontend. prepare() plans a graph for every length, so none is planned on the way."""

    method = "cudnn"
    _graphs: dict[tuple[int, bool], CudnnAttention] | None = None

    def prepare(self) -> Launcher:
        """See Launcher.prepare. Raises UnavailableError without the frontend or if cuDNN declines the sizes."""
        super().prepare()
        if self._graphs is None:
            cudnn, dims = frontend(), self.dims
            self._handle = cudnn.create_handle()
            self._graphs = {
                (keys, stats): CudnnAttention(
                    dims["L"], keys, dims["H"], dims["D"], self.attention, self._handle, stats=stats
                )
                for keys, stats in sorted({plan for w in range(1, dims["S"] + 1) for plan in self._plans(w)})
            }
            self.workspace_bytes += max(graph.workspace_bytes for graph in self._graphs.values())
            self._try()
        return self

    def _parts(self, entries: int) -> tuple[tuple[int, int], ...]:
        """(first key, keys) of each run of cuDNN for a window of `entries` blocks."""
        tokens = self.dims["L"]
        return parts(tokens, entries) if self.attention == "fp8" else ((0, entries * tokens),)

    def _plans(self, entries: int) -> list[tuple[int, bool]]:
        """The graph of each part: its keys, and whether it writes statistics."""
        cut = self._parts(entries)
        return [(keys, len(cut) > 1) for _, keys in cut]

    def _try(self) -> None:
        """Attend over windows with a known answer, of every length: what fails must fail before the run.

        Raises UnavailableError. Takes the workspace, queries and an output for a moment.
        """
        fp8, dims = self.attention == "fp8", self.dims
        memory = torch.empty(-(-self.workspace_bytes // 4) * 4, dtype=torch.uint8, device="cuda")
        q, out = torch.ones(2, dims["L"], dims["H"], dims["D"], dtype=torch.bfloat16, device="cuda")
        base, pointers = memory.data_ptr(), (q.data_ptr(), out.data_ptr())
        places = {name: place - base for name, place in addresses(dims, self.attention, base)[0].items()}
        if not fp8:
            memory.view(torch.bfloat16).fill_(1.0)
        for entries in range(1, dims["S"] + 1):
            for trial in trials(dims, entries) if fp8 else ONES:
                expected = trial.fill(memory, places, dims, entries) if fp8 else 1.0
                bounds = (expected, trial.tolerance if fp8 else 0.02)
                self._try_one(f"{entries} blocks {trial.name}", bounds, pointers, out, base, entries)

    def _try_one(
        self, what: str, bounds: tuple[float, float], pointers: tuple[int, int], out: Tensor, base: int, entries: int
    ) -> None:
        out.fill_(float("nan"))
        stream = torch.cuda.current_stream().cuda_stream
        try:
            self._attend(pointers, base, entries, stream)
            known = [0] * (len(self.kernels.spec.inputs)) + [pointers[-1]]  # the merge reads no input of the op
            self._merge(known, base, entries, stream)
            low, high = out.min().item(), out.max().item()
        except Exception as error:  # cuDNN's types, and RuntimeError
            raise UnavailableError("cuDNN's attention fails", got=f"{type(error).__name__}: {error}") from None
        expected, tolerance = bounds
        if not (expected - tolerance <= low and high <= expected + tolerance):  # a NaN is refused, too
            raise UnavailableError(
                f"cuDNN's {self.attention} attention over {what} is wrong",
                got=f"{low:.4g} to {high:.4g}",
                expected=f"{expected:.4g}",
            )

    def attend(self, pointers: Mapping[str, int], workspace: int, table_len: int, stream: int) -> None:
        """See WindowedAttention.attend."""
        assert self._graphs is not None  # launch() has called prepare()
        dims, size = self.dims, 1 if self.attention == "fp8" else 2
        row = dims["H"] * dims["D"] * size
        cut = self._parts(table_len)
        for index, (first, keys) in enumerate(cut):
            given = dict(pointers)
            given["k"], given["v"] = (pointers[name] + first * row for name in ("k", "v"))
            given["out"] += index * dims["L"] * row
            if len(cut) > 1:
                given["stats"] += index * dims["L"] * dims["H"] * 4
            self._graphs[keys, len(cut) > 1].run(given, workspace, stream)


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

    def attend(self, pointers: Mapping[str, int], workspace: int, table_len: int, stream: int) -> None:
        """See WindowedAttention.attend."""
        queries, heads, dim = self.dims["L"], self.dims["H"], self.dims["D"]
        sizes = {"q": queries, "k": table_len * queries, "v": table_len * queries, "out": queries}
        q, k, v, out = (tensor_at(pointers[name], (n, heads, dim)) for name, n in sizes.items())
        with on_stream(stream):
            out.copy_(torch_attention(q, k, v))


def torch_attention(q: Tensor, k: Tensor, v: Tensor, fused: bool = True) -> Tensor:
    """bf16 [L, H, D], [N, H, D] twice to [L, H, D]. `fused`: raise RuntimeError if neither cuDNN nor flash takes it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    others = [] if fused else [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *others], set_priority=True):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def attention_launcher(op_name: str, dims: Dims, attention: str = "bf16", compute_capability: str = "") -> Launcher:
    """The fastest way to compute a sink attention op in bf16 here, prepared; says which, and why faster ones don't.

    Args:
        op_name: "sink_attention_nvfp4" or "sink_attention_bf16". dims: S, L, H and D.
        attention: what the two products are computed in, "bf16" or "fp8"; without FP8 attention it is bf16.
        compute_capability: such as "9.0"; by default that of the current device.
    """
    compute_capability = compute_capability_of(compute_capability)
    for method, kind in attention_methods(compute_capability, attention, dims["D"]):
        try:
            launcher = LAUNCHERS[method](op_name, dims, kind).prepare() if method in LAUNCHERS else None
            if isinstance(launcher, HopperSinkAttention):
                launcher.try_out()
        except UnavailableError as error:
            log.warning("%s cannot run through %s in %s: %s", op_name, method, kind, error)
            continue
        log.info("%s runs through %s in %s", op_name, method, kind)
        return launcher or Launcher(op_name, dims, "bf16").prepare()
    raise AssertionError("the portable kernel is always listed")


LAUNCHERS: dict[str, Any] = {
    "cudnn": CudnnSinkAttention, "torch": TorchSinkAttention, "wgmma": HopperSinkAttention
}  # fmt: skip
