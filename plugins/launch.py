"""Launch an op's kernels on a stream: no allocation, no synchronisation, so a CUDA graph can capture it.

Everything happens in the current CUDA context, which is torch's (and TensorRT's): the device's primary one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from longtake.dtypes import DTYPES
from longtake.errors import LongtakeError
from longtake.plugins import driver
from longtake.plugins.kernels import (
    COMPUTE_DTYPES,
    TABLE_LENGTH,
    WORKSPACE,
    Call,
    Dims,
    Kernels,
    dims_from_shapes,
    kernels_of,
    shape_of,
)
from longtake.plugins.nvrtc import compile_cubin
from longtake.plugins.spec import OpSpec, TensorSpec

ALIGNMENT = 16  # bytes; the kernels load vectors of that size


def compute_capability_of(given: str = "") -> str:
    """`given`, or else the current device's compute capability, such as "9.0"."""
    return given or "{}.{}".format(*torch.cuda.get_device_capability())


class OpLauncher:
    """One op for fixed dims. method: how it is computed, a method's name in longtake/machine/capability.py."""

    method = ""
    workspace_bytes = 0

    def __init__(self, spec: OpSpec, dims: Dims) -> None:
        self.spec, self.dims = spec, dict(dims)

    @abstractmethod
    def prepare(self) -> OpLauncher:
        """Make ready for launches in the current context. Call it before capturing a CUDA graph."""

    @abstractmethod
    def launch(self, pointers: Sequence[int], stream: int, workspace: int = 0, table_len: int = 0) -> None:
        """Enqueue the op on raw stream handle `stream`.

        pointers: device addresses, inputs then outputs in spec order; an aliased output has its input's address.
        workspace: device address of workspace_bytes bytes. table_len: W, for the ops that have it.
        """

    def _check(self, pointers: Sequence[int], workspace: int, table_len: int, longest: int | None = None) -> None:
        """`longest`: the most entries that the table may have, if there is a bound."""
        spec = self.spec
        tensors = (*spec.inputs, *spec.outputs)
        if len(pointers) != len(tensors):
            raise LongtakeError(f"{spec.name}: wrong number of pointers", got=len(pointers), expected=len(tensors))
        for tensor, pointer in zip(tensors, pointers):
            if not pointer or (pointer % ALIGNMENT and tensor.shape not in _SCALARS):
                raise LongtakeError(
                    f"{spec.name}: bad address of {tensor.name}", got=hex(pointer), expected=f"{ALIGNMENT}-byte aligned"
                )
        for output, source in spec.aliases:
            if pointers[len(spec.inputs) + output] != pointers[source]:
                raise LongtakeError(
                    f"{spec.name}: {spec.outputs[output].name} must be written in place",
                    expected="the output at the input's address",
                    fix="build the engine with the preview feature ALIASED_PLUGIN_IO_10_03",
                )
        if self.workspace_bytes and not workspace:
            raise LongtakeError(f"{spec.name}: no workspace", expected=f"{self.workspace_bytes} bytes")
        if any("W" in t.shape for t in spec.inputs) and table_len < 1:
            raise LongtakeError(f"{spec.name}: empty table", got=table_len, expected="at least one entry")
        if longest is not None and table_len > longest:
            raise LongtakeError(f"{spec.name}: table too long", got=table_len, expected=f"at most {longest} entries")


class Launcher(OpLauncher):
    """The kernels of one op for fixed dims and compute dtype.

    Args:
        op_name: a name of OPS.
        dims: sizes of the op's letters; W may be missing, since launch() is told the table's length.
        dtype: compute dtype, "bf16" or "fp32".
        arch: such as "sm_90a"; by default that of the current device.
        kernels: other kernels of the same op; by default the portable ones that kernels_of() names.
    """

    method = "portable"

    def __init__(
        self,
        op_name: str,
        dims: Dims,
        dtype: str = "bf16",
        arch: str | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        if dtype not in COMPUTE_DTYPES:
            raise LongtakeError(f"{op_name}: unknown compute dtype", got=dtype, expected=" | ".join(COMPUTE_DTYPES))
        self.kernels: Kernels = kernels or kernels_of(op_name)
        super().__init__(self.kernels.spec, dims)
        self.dtype = dtype
        self.workspace_bytes = self.kernels.workspace_bytes(dims)
        self._arch = arch
        self._calls = self.kernels.calls(dims)
        self._functions: list[Any] | None = None

    def cubin(self, arch: str) -> bytes:
        """The compiled kernels for `arch`; needs no GPU."""
        return compile_kernels(self.kernels, self.dims, self.dtype, arch)

    def prepare(self) -> Launcher:
        """Compile and load the kernels into the current context. Call it before capturing a CUDA graph."""
        if self._functions is None:
            device = driver.ensure_context()
            cubin = self.cubin(self._arch or driver.device_arch(device))
            self._functions = driver.load_functions(cubin, [call.function for call in self._calls])
            for call, function in zip(self._calls, self._functions):
                if call.shared_bytes:
                    driver.allow_shared(function, call.shared_bytes)
        return self

    def launch(self, pointers: Sequence[int], stream: int, workspace: int = 0, table_len: int = 0) -> None:
        """See OpLauncher.launch."""
        self._check(pointers, workspace, table_len)
        self.prepare()
        driver.ensure_context()
        self.enqueue(self._calls, pointers, stream, workspace, table_len)

    def enqueue(
        self, calls: Sequence[Call], pointers: Sequence[int], stream: int, workspace: int, table_len: int
    ) -> None:
        """Enqueue `calls`: those of the kernels that prepare() has loaded, maybe for other dims."""
        for call, function in zip(calls, self._functions or ()):
            values = self.arguments(call, pointers, workspace, table_len)
            driver.launch(function, call.grid, call.threads, stream, values, call.shared_bytes)

    def arguments(self, call: Call, pointers: Sequence[int], workspace: int, table_len: int) -> tuple[int, ...]:
        """The values of a call's arguments: addresses and int32."""
        spec = self.kernels.spec
        known = dict(zip((t.name for t in (*spec.inputs, *spec.outputs)), pointers))
        known |= {WORKSPACE: workspace, TABLE_LENGTH: table_len, **self.kernels.buffers(self.dims, workspace)}
        return tuple(a if isinstance(a, int) else known[a] for a in call.arguments)


_SCALARS = (("1",), ("W",), ("S", "2"))  # read element by element, so the alignment of their type is enough


def compile_kernels(kernels: Kernels, dims: Dims, dtype: str, arch: str) -> bytes:
    """The cubin of an op's kernels; needs no GPU. Raises LongtakeError with the compiler's log."""
    return compile_cubin(kernels.source, {**kernels.macros(dims), "COMPUTE_BF16": int(dtype == "bf16")}, arch)


def run_kernel(op_name: str, *tensors: Tensor, dtype: str | None = None, out: Tensor | None = None) -> Any:
    """Run an op on CUDA tensors (inputs in spec order) on torch's current stream.

    Aliased outputs are the input tensors, written in place; another one is `out`, or allocated. Returns a tensor, or
    a tuple. `dtype` is needed only where no input has the compute dtype (nvfp4_dequantize; default "bf16").
    """
    spec = kernels_of(op_name).spec
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
        return Launcher(op_name, dict(dims), dtype).prepare()


def _output(
    op_name: str, spec: TensorSpec, dims: Dims, dtype: str, device: torch.device, given: Tensor | None
) -> Tensor:
    """`given`, checked, or a new tensor."""
    if given is None:
        return torch.empty(shape_of(spec, dims), dtype=torch_dtype(spec, dtype), device=device)
    if tuple(given.shape) != shape_of(spec, dims):
        raise LongtakeError(
            f"{op_name}: {spec.name} has the wrong shape", got=list(given.shape), expected=list(shape_of(spec, dims))
        )
    _check_tensor(op_name, spec, given, dtype)
    return given


def torch_dtype(tensor: TensorSpec, dtype: str = COMPUTE_DTYPES[0]) -> torch.dtype:
    """What `tensor` holds in torch where the op computes in `dtype`."""
    return DTYPES[dtype if tensor.dtype == "compute" else tensor.dtype].torch


def _compute_dtype(specs: Sequence[TensorSpec], tensors: Sequence[Tensor]) -> str | None:
    """The dtype of the first tensor that has the compute dtype, or None if the op has no such input."""
    names = {DTYPES[name].torch: name for name in COMPUTE_DTYPES}
    for spec, tensor in zip(specs, tensors):
        if spec.dtype == "compute":
            return names.get(tensor.dtype, str(tensor.dtype))
    return None


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
