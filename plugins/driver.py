"""The few CUDA driver calls that launching needs: context, module, kernel."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

from longtake.errors import LongtakeError, UnavailableError
from longtake.plugins.nvrtc import arch_for

TENSOR_MAP_BYTES = 128


@lru_cache(maxsize=1)
def _driver() -> Any:
    """The driver bindings, initialized. Raises UnavailableError without them, without a driver or without a GPU."""
    try:
        from cuda.bindings import driver

        status = driver.cuInit(0)[0]
    except Exception as error:  # a missing library is reported with the bindings' own types
        raise UnavailableError(
            "no CUDA driver to launch kernels with",
            got=f"{type(error).__name__}: {error}",
            fix="run on a machine with an NVIDIA GPU and its driver, with cuda-bindings installed",
        ) from None
    _checked((status,), "find a GPU")
    return driver


def _checked(result: tuple[Any, ...], what: str) -> Any:
    """The value of a driver call's result tuple. Raises LongtakeError if the call failed."""
    status, *values = result
    if int(status) != 0:
        raise LongtakeError(f"CUDA could not {what}", got=getattr(status, "name", str(status)))
    return values[0] if values else None


def _current_context() -> int:
    return int(_checked(_driver().cuCtxGetCurrent(), "name the current context"))


def ensure_context() -> int:
    """Make device 0's primary context current in this thread if none is; returns the current context's device."""
    driver = _driver()
    if not _current_context():
        device = _checked(driver.cuDeviceGet(0), "find a GPU")
        primary = _checked(driver.cuDevicePrimaryCtxRetain(device), "open the GPU")
        _checked(driver.cuCtxSetCurrent(primary), "use the GPU")
    return int(_checked(driver.cuCtxGetDevice(), "name the current GPU"))


@cache
def device_arch(device: int) -> str:
    """The NVRTC target of a device, such as "sm_90a"."""
    driver = _driver()
    which = driver.CUdevice_attribute
    major, minor = (
        int(_checked(driver.cuDeviceGetAttribute(attribute, device), "read the compute capability"))
        for attribute in (
            which.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            which.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return arch_for(major, minor)


def load_functions(cubin: bytes, names: Sequence[str]) -> list[Any]:
    """The kernels of these names, loaded into the current context (now, not at their first launch)."""
    module = _module(cubin, _current_context())
    return [_checked(_driver().cuModuleGetFunction(module, n.encode()), f"find kernel {n}") for n in names]


@cache
def _module(cubin: bytes, context: int) -> Any:
    """The cubin loaded into `context`, which is current; once, and as long as the process lives."""
    return _checked(_driver().cuModuleLoadData(cubin), "load the compiled kernels")


def allow_shared(function: Any, shared_bytes: int) -> None:
    """Let a kernel be launched with so much dynamic shared memory; more than 48 KiB must be asked for."""
    which = _driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(
        _driver().cuFuncSetAttribute(function, which, shared_bytes), f"give a kernel {shared_bytes} bytes to share"
    )


def tensor_map(address: int, sizes: Sequence[int], box: Sequence[int]) -> bytes:
    """What the copy engine knows of a dense tensor of bytes, the innermost size first, and the box that one copy takes of
    it: rows of 128 bytes, swizzled, and zeros for what lies outside. `address` and every row are aligned to 16 bytes."""
    driver = _driver()
    strides = [math.prod(sizes[:i]) for i in range(1, len(sizes))]
    made = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        len(sizes),
        address,
        [driver.cuuint64_t(size) for size in sizes],
        [driver.cuuint64_t(stride) for stride in strides],
        [driver.cuuint32_t(size) for size in box],
        [driver.cuuint32_t(1) for _ in box],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return ctypes.string_at(_checked(made, "describe a tensor to the copy engine").getPtr(), TENSOR_MAP_BYTES)


def multiprocessors(device: int) -> int:
    """How many the device has: thread blocks that stay until all work is done are started once for each."""
    which = _driver().CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
    return int(_checked(_driver().cuDeviceGetAttribute(which, device), "count the multiprocessors"))


def launch(
    function: Any, grid: tuple[int, int], threads: int, stream: int, values: Sequence[int], shared_bytes: int = 0
) -> None:
    """Enqueue a kernel on a raw stream handle; each value is a device address or an int32."""
    boxes = (ctypes.c_int64 * len(values))(*values)  # the kernel reads an int32 from the low half
    first = ctypes.addressof(boxes)
    launch_boxes(function, grid, threads, stream, [first + 8 * i for i in range(len(values))], shared_bytes)


def launch_boxes(
    function: Any, grid: tuple[int, int], threads: int, stream: int, boxes: Sequence[int], shared_bytes: int = 0
) -> None:
    """The same for arguments of any size: `boxes` are the host's addresses of them, read before this returns."""
    parameters = (ctypes.c_void_p * len(boxes))(*boxes)
    status = _driver().cuLaunchKernel(
        function, *grid, 1, threads, 1, 1, shared_bytes, stream, ctypes.addressof(parameters), 0
    )
    _checked(status, "launch a kernel")
