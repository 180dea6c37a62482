"""The convolution ops through a library: launchers like those of our kernels, over the same addresses.

The weight at its address is [N, kt, kh, kw, C], channels last as all the rest (`library_weight` makes it, once, when
weights are loaded). cuDNN's plans are chosen in prepare(); a launch allocates nothing, so a CUDA graph can capture it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longtake.errors import UnavailableError
from longtake.plugins.conv.cudnn_conv import CudnnConv, Geometry, geometry, handle_of
from longtake.plugins.conv.plans import choice_key, remember, remembered, timed_plans
from longtake.plugins.conv.reference import library_weight
from longtake.plugins.device_memory import on_stream, tensor_at
from longtake.plugins.kernels import Dims
from longtake.plugins.launch import LibraryLauncher
from longtake.plugins.linear.library import CublasLtLinear
from longtake.plugins.linear.op import LINEAR_BF16
from longtake.plugins.shapes import shape_of
from longtake.plugins.spec import Op

log = logging.getLogger(__name__)


def trial_tensors(op: Op, dims: Dims) -> dict[str, Tensor]:
    """Random tensors of an op's sizes by name, on the GPU, for one try; the weight as `library_weight` leaves it."""
    tensors = {}
    for tensor in op.spec.tensors:
        values = torch.empty(shape_of(tensor, dims), dtype=torch.bfloat16, device="cuda").normal_()
        if tensor.channels_last:
            values = library_weight(values).mul_(math.prod(values.shape[1:]) ** -0.5)
        tensors[tensor.name] = values
    return tensors


class CudnnLibraryConv(LibraryLauncher):
    """Through cuDNN's graphs: bias and residual are part of the convolution."""

    method = "cudnn"

    def make_ready(self) -> None:
        """See LibraryLauncher. Takes the tensors' memory for a moment, unless the choice of a plan is remembered."""
        key = choice_key(self.spec.name, self.dims)
        self._conv = CudnnConv(self.op, self.dims, handle_of(torch.cuda.current_device()))
        self._plan = remembered(key)
        try:
            if self._plan in self._conv.plans:
                self.workspace_bytes = self._conv.build(self._plan)
                return
        except Exception as error:  # cuDNN's types, and RuntimeError
            log.warning("the plan kept for %s fails: %s", key, error)
        tensors = trial_tensors(self.op, self.dims)
        rows = list(timed_plans(self._conv, {name: tensor.data_ptr() for name, tensor in tensors.items()}))
        del tensors
        torch.cuda.empty_cache()  # these tensors may be a large part of what the GPU has
        good = [row for row in rows if "ms" in row]
        if not good:
            raise UnavailableError(f"no plan of cuDNN runs {key}", got="; ".join(str(row) for row in rows[:4]))
        best = min(good, key=lambda row: row["ms"])
        log.info("%s: %s, %.3f ms, the fastest of %d plans", key, best["plan"], best["ms"], len(good))
        self._plan, self.workspace_bytes = best["plan"], best["workspace"]
        remember(key, self._plan)

    def run(self, pointers: Sequence[int], stream: int, workspace: int) -> None:
        """See LibraryLauncher."""
        self._conv.run(self._plan, dict(zip(self.spec.names, pointers)), workspace, stream)


class TorchConv(LibraryLauncher):
    """Through torch's call of cuDNN, benchmarked at the first call; bias and residual are passes of their own."""

    method = "torch"

    def make_ready(self) -> None:
        """See LibraryLauncher."""
        try:
            self.convolve(trial_tensors(self.op, self.dims))
        except RuntimeError as error:
            raise UnavailableError(f"torch does not run {self.spec.name}", got=f"{self.dims}: {error}") from None
        torch.cuda.empty_cache()

    def run(self, pointers: Sequence[int], stream: int, workspace: int) -> None:
        """See LibraryLauncher."""
        tensors = {t.name: tensor_at(p, shape_of(t, self.dims)) for t, p in zip(self.spec.tensors, pointers)}
        with on_stream(stream):
            self.convolve(tensors)

    def convolve(self, tensors: dict[str, Tensor]) -> None:
        """Write `out` from x, weight, bias and perhaps residual."""
        sizes = geometry(self.op, self.dims)
        x, weight, out = views(sizes, tensors)
        ones = [1] * len(sizes.padding)
        torch.ops.aten.cudnn_convolution.out(x, weight, sizes.padding, ones, ones, 1, True, False, False, out=out)
        tensors["out"].add_(tensors["bias"])
        if "residual" in tensors:
            tensors["out"].add_(tensors["residual"])


def views(sizes: Geometry, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and out, whatever the shape of their contiguous memory, channels first over channels last."""

    def view(name: str, shape: tuple[int, ...]) -> Tensor:
        return tensors[name].view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)

    return view("x", sizes.x), view("weight", sizes.weight), view("out", sizes.out)


LAUNCHERS: dict[str, Any] = {
    "cudnn": CudnnLibraryConv,
    "torch": TorchConv,
    "cublaslt": lambda op, dims: CublasLtLinear(  # a 1x1x1 convolution is a product over all positions
        LINEAR_BF16, {"T": dims["T"] * dims["Y"] * dims["X"], "N": dims["N"], "K": dims["C"]}
    ),
}
