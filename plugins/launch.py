"""Launch an op's kernels on a stream: no allocation, no synchronisation, so a CUDA graph can capture it.

Everything happens in the current CUDA context, which is torch's (and TensorRT's): the device's primary one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from longtake.errors import LongtakeError
from longtake.plugins import driver
from longtake.plugins.kernels import COMPUTE_DTYPES, TABLE_LENGTH, WORKSPACE, Call, Dims, Kernel
from longtake.plugins.nvrtc import compile_cubin
from longtake.plugins.spec import Op

ALIGNMENT = 16  # bytes; the kernels load vectors of that size


class OpLauncher:
    """One op for fixed dims. method: how it is computed, a method's name in longtake/machine/capability.py."""

    method = ""
    workspace_bytes = 0

    def __init__(self, op: Op, dims: Dims) -> None:
        self.op, self.spec, self.dims = op, op.spec, dict(dims)

    @abstractmethod
    def prepare(self) -> OpLauncher:
        """Make ready for launches in the current context. Call it before capturing a CUDA graph."""

    def try_out(self) -> None:
        """Run once with a known answer, where that is worth while. Raises UnavailableError if it is another."""

    @abstractmethod
    def launch(self, pointers: Sequence[int], stream: int, workspace: int = 0, table_len: int = 0) -> None:
        """Enqueue the op on raw stream handle `stream`.

        pointers: device addresses, inputs then outputs in spec order; an aliased output has its input's address.
        workspace: device address of workspace_bytes bytes. table_len: W, for the ops that have it.
        """

    def _check(self, pointers: Sequence[int], workspace: int, table_len: int, longest: int | None = None) -> None:
        """`longest`: the most entries that the table may have, if there is a bound."""
        spec, tensors = self.spec, self.spec.tensors
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
        if self.op.reads_table and table_len < 1:
            raise LongtakeError(f"{spec.name}: empty table", got=table_len, expected="at least one entry")
        if longest is not None and table_len > longest:
            raise LongtakeError(f"{spec.name}: table too long", got=table_len, expected=f"at most {longest} entries")


class LibraryLauncher(OpLauncher):
    """One that calls a library: made ready once, then run over the same addresses as any other."""

    _ready = False

    def prepare(self) -> OpLauncher:
        """See OpLauncher.prepare. Raises UnavailableError if the library declines. May take memory for a moment."""
        if not self._ready:
            self.make_ready()
            self._ready = True
        return self

    def launch(self, pointers: Sequence[int], stream: int, workspace: int = 0, table_len: int = 0) -> None:
        """See OpLauncher.launch."""
        self._check(pointers, workspace, table_len)
        self.prepare()
        self.run(pointers, stream, workspace)

    @abstractmethod
    def make_ready(self) -> None:
        """Do once what a launch must not: what fails must fail before the run, and a library's handles must be there
        before a capture."""

    @abstractmethod
    def run(self, pointers: Sequence[int], stream: int, workspace: int) -> None:
        """Enqueue the op."""


class Launcher(OpLauncher):
    """The kernel of one op for fixed dims and compute dtype.

    Args:
        dims: sizes of the op's letters; W may be missing, since launch() is told the table's length.
        dtype: compute dtype, "bf16" or "fp32".
        arch: such as "sm_90a"; by default that of the current device.
        kernel: another kernel of the same op; by default the portable one that the op names.
    """

    method = "portable"

    def __init__(
        self, op: Op, dims: Dims, dtype: str = "bf16", arch: str | None = None, kernel: Kernel | None = None
    ) -> None:
        super().__init__(op, dims)
        if dtype not in COMPUTE_DTYPES:
            raise LongtakeError(
                f"{op.spec.name}: unknown compute dtype", got=dtype, expected=" | ".join(COMPUTE_DTYPES)
            )
        if not (kernel or op.kernel):
            raise LongtakeError(f"{op.spec.name} has no kernel of ours", expected=f"a library: {way_names(op)}")
        self.kernel: Kernel = kernel or op.kernel  # type: ignore[assignment]  # just checked
        self.dtype = dtype
        self.workspace_bytes = self.kernel.workspace_bytes(dims)
        self._arch = arch
        self.addresses: dict[str, int] = {}  # more arguments of the kernels, by name
        self._calls = self.kernel.calls(dims)
        self._functions: list[Any] | None = None

    def cubin(self, arch: str) -> bytes:
        """The compiled kernel for `arch`; needs no GPU."""
        return compile_kernel(self.kernel, self.dims, self.dtype, arch)

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

    def launch_around(
        self, between: Callable[[], None], pointers: Sequence[int], stream: int, workspace: int, table_len: int = 0
    ) -> None:
        """`launch` with what `between` enqueues behind the first of its kernels."""
        self._check(pointers, workspace, table_len)
        self.prepare()
        driver.ensure_context()
        self.enqueue(self._calls[:1], pointers, stream, workspace, table_len)
        between()
        self.enqueue(self._calls[1:], pointers, stream, workspace, table_len, first=1)

    def enqueue(
        self,
        calls: Sequence[Call],
        pointers: Sequence[int],
        stream: int,
        workspace: int,
        table_len: int,
        first: int = 0,
    ) -> None:
        """Enqueue `calls`: those of the kernel that prepare() has loaded, from the one at `first` on, maybe for other dims."""
        for call, function in zip(calls, (self._functions or ())[first:]):
            values = self.arguments(call, pointers, workspace, table_len)
            driver.launch(function, call.grid, call.threads, stream, values, call.shared_bytes)

    def arguments(self, call: Call, pointers: Sequence[int], workspace: int, table_len: int) -> tuple[int, ...]:
        """The values of a call's arguments: addresses and int32."""
        known = dict(zip(self.spec.names, pointers))
        known |= {WORKSPACE: workspace, TABLE_LENGTH: table_len, **self.addresses}
        known |= self.kernel.buffers(self.dims, workspace)
        return tuple(a if isinstance(a, int) else known[a] for a in call.arguments)


_SCALARS = ((), ("1",), ("W",), ("S", "2"))  # read element by element, so the alignment of their type is enough


def way_names(op: Op) -> str:
    """What an op can be run by, for a message."""
    return ", ".join(way.method for way in op.ways)


def compile_kernel(kernel: Kernel, dims: Dims, dtype: str, arch: str) -> bytes:
    """The cubin of a kernel; needs no GPU. Raises LongtakeError with the compiler's log."""
    return compile_cubin(kernel.source, {**kernel.macros(dims), "COMPUTE_BF16": int(dtype == "bf16")}, arch)
