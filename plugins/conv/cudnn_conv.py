"""One convolution as a cuDNN graph, through nvidia-cudnn-frontend: described once, its plans built and run by index.

The graph is convolution, + bias, + residual, computed in fp32 and rounded once; everything is channels last. Nothing here
allocates or synchronises while it runs, so a CUDA graph can capture it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from longtake.errors import UnavailableError
from longtake.plugins.kernels import Dims
from longtake.plugins.sink_attention.cudnn_graph import frontend
from longtake.plugins.spec import Op


@dataclass(frozen=True)
class Geometry:
    """Sizes as cuDNN wants them, batch and channels first: x [1,C,T,Y,X] in 3-D, and in 2-D where time or the frame plays
    no part: frames are the batch of a 1x3x3 kernel, positions the width of a 3x1x1 one."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    out: tuple[int, ...]
    padding: tuple[int, ...]

    @property
    def flops(self) -> float:
        """Multiplications and additions, padding counted as if it were there."""
        return 2.0 * math.prod(self.out) * math.prod(self.weight[1:])


def geometry(op: Op, dims: Dims) -> Geometry:
    """The sizes of a convolution op. dims: T, Y, X, C and N."""
    t, y, x, c, n = (dims[letter] for letter in "TYXCN")
    time, side, _ = op.kernel_size
    if side == 2:  # four sets of weights, each for every other row and column of what comes out
        return Geometry((t, c, y, x), (4 * n, c, side, side), (t, n, 2 * y, 2 * x), (1, 1))
    if time == 1:
        return Geometry((t, c, y, x), (n, c, side, side), (t, n, y, x), (side // 2,) * 2)
    if side == 1:
        return Geometry((1, c, t, y * x), (n, c, time, 1), (1, n, t - time + 1, y * x), (0, 0))
    return Geometry((1, c, t, y, x), (n, c, time, side, side), (1, n, t - time + 1, y, x), (0, side // 2, side // 2))


def channels_last_strides(shape: tuple[int, ...]) -> list[int]:
    """Strides of a dense tensor whose sizes are given channels first, and whose channels lie last."""
    strides, step = [0] * len(shape), shape[1]
    strides[1] = 1
    for i in reversed(range(2, len(shape))):
        strides[i] = step
        step *= shape[i]
    strides[0] = step
    return strides


@cache
def handle_of(device: int) -> Any:
    """cuDNN's handle for a device of this process, which must be the current one."""
    return frontend().create_handle()


class CudnnConv:
    """A convolution's graph and the plans that cuDNN suggests for it, best guess first; none is built yet.

    fused: with bias and, where the op has one, residual; otherwise the product alone.

    Raises:
        UnavailableError: cuDNN has no plan.
    """

    def __init__(self, op: Op, dims: Dims, handle: Any, fused: bool = True) -> None:
        self._cudnn, self._handle = frontend(), handle
        self._build(geometry(op, dims), "residual" in op.spec.names, fused)
        try:
            self._graph.validate()
            self._graph.build_operation_graph()
            modes = self._cudnn.heur_mode
            self._graph.create_execution_plans([modes.A, modes.B, modes.FALLBACK])
            names = [self._graph.get_plan_name_at_index(i) for i in range(self._graph.get_execution_plan_count())]
        except Exception as error:  # cuDNN's types, and RuntimeError
            raise UnavailableError(
                f"cuDNN has no {op.spec.name} for {dict(dims)}", got=f"{type(error).__name__}: {str(error)[:500]}"
            ) from None
        self.plans: dict[str, int] = {}
        for index, name in enumerate(names):
            if re.search(r"eng\d", name):  # cuDNN's own: the frontend adds kernels that it compiles in Python
                self.plans.setdefault(name, index)

    def _build(self, sizes: Geometry, add: bool, fused: bool) -> None:
        types, graph_type = self._cudnn.data_type, self._cudnn.pygraph
        graph = graph_type(
            name="conv", io_data_type=types.BFLOAT16, intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT, handle=self._handle,
        )  # fmt: skip

        def tensor(name: str, shape: tuple[int, ...]) -> Any:
            strides = channels_last_strides(shape)
            return graph.tensor(name=name, dim=list(shape), stride=strides, data_type=types.BFLOAT16)

        tensors = {"x": tensor("x", sizes.x), "weight": tensor("weight", sizes.weight)}
        ones, padding = [1] * len(sizes.padding), list(sizes.padding)
        out = graph.conv_fprop(
            image=tensors["x"], weight=tensors["weight"], pre_padding=padding, post_padding=padding, stride=ones, dilation=ones
        )  # fmt: skip
        if fused:
            out.set_data_type(types.FLOAT)
            tensors["bias"] = tensor("bias", (1, sizes.out[1], *ones))
            out = graph.bias(input=out, bias=tensors["bias"])
            if add:
                out.set_data_type(types.FLOAT)
                tensors["residual"] = tensor("residual", sizes.out)
                out = graph.add(a=out, b=tensors["residual"])
        out.set_output(True).set_data_type(types.BFLOAT16)
        out.set_dim(list(sizes.out)).set_stride(channels_last_strides(sizes.out))
        self._graph, self._tensors = graph, {**tensors, "out": out}

    def build(self, plan: str) -> int:
        """Make a plan ready (some are compiled); the bytes of workspace that it needs. Raises what cuDNN raises."""
        self._graph.build_plan_at_index(self.plans[plan])
        return int(self._graph.get_workspace_size_plan_at_index(self.plans[plan]))

    def run(self, plan: str, pointers: Mapping[str, int], workspace: int, stream: int) -> None:
        """Enqueue on a raw stream handle. `pointers`: addresses of x, weight, out and, fused, bias and residual."""
        self._cudnn.set_stream(self._handle, stream)
        addresses = {tensor.uid: pointers[name] for name, tensor in self._tensors.items()}
        self._graph.execute_plan_at_index(addresses, workspace, self.plans[plan], handle=self._handle)
