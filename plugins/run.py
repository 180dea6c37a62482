"""Run an op by name: the fastest launcher for this GPU, or our kernel over torch's tensors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from longtake.dtypes import of_torch
from longtake.errors import LongtakeError, UnavailableError
from longtake.plugins.kernels import COMPUTE_DTYPES, Dims, Kernel
from longtake.plugins.launch import Launcher, OpLauncher, way_names
from longtake.plugins.registry import op_named
from longtake.plugins.shapes import dims_from_shapes, shape_of, torch_dtype
from longtake.plugins.spec import Op, TensorSpec

log = logging.getLogger(__name__)


def launcher_for(op: Op, dims: Dims, attention: str = "bf16", compute_capability: str = "") -> OpLauncher:
    """The fastest launcher of an op for this GPU, prepared; says which, and why faster ones don't run.

    Args:
        dims: sizes of the op's letters but W.
        attention: what attention's two products are computed in, "bf16" or "fp8"; without FP8 attention it is bf16.
        compute_capability: such as "9.0"; by default that of the current device.

    Raises:
        UnavailableError: nothing runs these sizes here.
    """
    capability = compute_capability or "{}.{}".format(*torch.cuda.get_device_capability())
    ways = {way.method for way in op.ways}
    methods = op.methods(capability, dims, attention) if op.methods else [way.method for way in op.ways]
    declined = []
    for method in methods:
        if method not in ways:
            continue
        try:
            launcher = launcher_by(op, method, dims)
        except UnavailableError as error:
            declined.append(str(error))
            log.warning("%s %s cannot run through %s: %s", op.spec.name, _shown(dims), method, error)
            continue
        level = logging.INFO if len(ways) > 1 else logging.DEBUG
        log.log(level, "%s %s runs through %s", op.spec.name, _shown(dims), method)
        return launcher
    raise UnavailableError(
        f"no library runs {op.spec.name} here",
        got="; ".join(declined) or f"compute capability {capability}",
        expected=way_names(op),
        fix=op.otherwise or None,
    )


def launcher_by(op: Op, method: str, dims: Dims) -> OpLauncher:
    """The launcher of one way of running an op, prepared and tried out.

    Raises:
        UnavailableError: it does not run these sizes here.
        LongtakeError: the op has no such way.
    """
    way = next((way for way in op.ways if way.method == method), None)
    if way is None:
        raise LongtakeError(f"{op.spec.name} does not run through this", got=method, expected=way_names(op))
    launcher: OpLauncher = Launcher(op, dims) if isinstance(way, Kernel) else way.load()[method](op, dims)
    launcher.prepare()
    launcher.try_out()
    return launcher


def _shown(dims: Dims) -> str:
    return "x".join(f"{letter}{size}" for letter, size in dims.items())


def run_kernel(op_name: str, *tensors: Tensor, dtype: str | None = None, out: Tensor | None = None) -> Any:
    """Run an op on CUDA tensors (inputs in spec order) on torch's current stream.

    Aliased outputs are the input tensors, written in place; another one is `out`, or allocated. Returns a tensor, or
    a tuple. `dtype` is needed only where no input has the compute dtype (nvfp4_dequantize; default "bf16").
    """
    spec = op_named(op_name).spec
    dims = dims_from_shapes(spec, [t.shape for t in tensors])
    dtype = _compute_dtype(spec.inputs, tensors) or dtype or "bf16"
    for tensor_spec, tensor in zip(spec.inputs, tensors):
        _check_tensor(op_name, tensor_spec, tensor, dtype)
    device = tensors[0].device
    aliases = dict(spec.aliases)
    outputs = tuple(
        tensors[aliases[i]] if i in aliases else _output(op_name, t, dims, dtype, device, out)
        for i, t in enumerate(spec.outputs)
    )
    fixed = tuple(sorted((letter, size) for letter, size in dims.items() if letter != "W"))
    launcher = _launcher(op_name, fixed, dtype, device.index or 0)
    workspace = torch.empty(max(launcher.workspace_bytes, 1), dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        pointers = [t.data_ptr() for t in (*tensors, *outputs)]
        launcher.launch(pointers, stream, workspace.data_ptr(), dims.get("W", 0))
    return outputs if len(outputs) > 1 else outputs[0]


@lru_cache(maxsize=256)
def _launcher(op_name: str, dims: tuple[tuple[str, int], ...], dtype: str, device: int) -> Launcher:
    with torch.cuda.device(device):
        return Launcher(op_named(op_name), dict(dims), dtype).prepare()


def _output(op_name: str, spec: TensorSpec, dims: Dims, dtype: str, device: torch.device, out: Tensor | None) -> Tensor:
    """`out`, checked, or a new tensor."""
    if out is None:
        return torch.empty(shape_of(spec, dims), dtype=torch_dtype(spec, dtype), device=device)
    if tuple(out.shape) != shape_of(spec, dims):
        raise LongtakeError(
            f"{op_name}: {spec.name} has the wrong shape", got=list(out.shape), expected=list(shape_of(spec, dims))
        )
    _check_tensor(op_name, spec, out, dtype)
    return out


def _compute_dtype(specs: Sequence[TensorSpec], tensors: Sequence[Tensor]) -> str | None:
    """The dtype of the first tensor that has the compute dtype, or None if the op has no such input."""
    dtypes = (tensor.dtype for spec, tensor in zip(specs, tensors) if spec.dtype == "compute")
    return next((of_torch(dtype).name for dtype in dtypes), None)


def _check_tensor(op_name: str, spec: TensorSpec, tensor: Tensor, dtype: str) -> None:
    if dtype not in COMPUTE_DTYPES:
        raise LongtakeError(f"{op_name}: unknown compute dtype", got=dtype, expected=" | ".join(COMPUTE_DTYPES))
    wanted = torch_dtype(spec, dtype)
    if not tensor.is_cuda or tensor.dtype != wanted or not tensor.is_contiguous():
        contiguous = "contiguous" if tensor.is_contiguous() else "not contiguous"
        raise LongtakeError(
            f"{op_name}: {spec.name} does not suit the kernel",
            got=f"{tensor.dtype} on {tensor.device}, {contiguous}",
            expected=f"{wanted} on a CUDA device, contiguous",
        )
