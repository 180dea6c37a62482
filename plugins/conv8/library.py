"""The convolutions of 8-bit codes through launchers over the same addresses: our kernel in two forms, and torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longtake.errors import UnavailableError
from longtake.plugins.codes import decode
from longtake.plugins.conv.cudnn_conv import geometry
from longtake.plugins.conv8.hopper import HopperConv, HopperRowsConv
from longtake.plugins.conv8.reference import FOLDED, spread
from longtake.plugins.device_memory import on_stream, tensor_at
from longtake.plugins.launch import LibraryLauncher
from longtake.plugins.shapes import shape_of, torch_dtype


class WidenedConv(LibraryLauncher):
    """Through torch's call of cuDNN, codes widened to fp32: for GPUs that our kernel does not run on. Slow, and takes four
    times the memory of its input from torch."""

    method = "torch"

    def make_ready(self) -> None:
        """See LibraryLauncher."""
        if not torch.cuda.is_available():
            raise UnavailableError(f"torch does not run {self.op.name} here", got="no GPU")

    def run(self, pointers: Sequence[int], stream: int, workspace: int) -> None:
        """See LibraryLauncher."""
        with on_stream(stream):
            self.convolve(
                {
                    t.name: tensor_at(p, shape_of(t, self.dims), torch_dtype(t))
                    for t, p in zip(self.spec.tensors, pointers)
                }
            )

    def convolve(self, tensors: dict[str, Tensor]) -> None:
        """Write `out` from x, weight (its channels last in memory), scale, bias and perhaps residual."""
        sizes = geometry(self.op, self.dims)
        x, weight = (
            decode(tensors[name], self.op.codes).view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
            for name, shape in (("x", sizes.x), ("weight", sizes.weight))
        )
        convolution = torch.nn.functional.conv3d if len(sizes.padding) == 3 else torch.nn.functional.conv2d
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            product = convolution(x, weight, padding=sizes.padding).movedim(1, -1)
        scaled = product * tensors["scale"]
        scaled = spread(scaled) if self.op.kernel_size == FOLDED else scaled.reshape(tensors["out"].shape)
        out = scaled + tensors["bias"].float()
        if "residual" in tensors:
            out += tensors["residual"].float()
        tensors["out"].copy_(out)


LAUNCHERS: dict[str, Any] = {"wgmma": HopperConv, "wgmma_rows": HopperRowsConv, "torch": WidenedConv}
