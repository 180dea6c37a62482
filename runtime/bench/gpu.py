"""The GPU's own account: name, driver, clocks, power, temperature and memory, through NVML."""

from __future__ import annotations

import platform
from typing import Any

import torch

from longtake.machine.nvml import nvml
from longtake.provenance import cpu_name


def device_from_name(name: str) -> torch.device:
    """The device called `name`; "" is the first GPU, or the CPU without one."""
    return torch.device(name or ("cuda:0" if torch.cuda.is_available() else "cpu"))


def gpu_state(device: torch.device) -> dict[str, Any]:
    """What the driver says right now: clocks in MHz, power in W, temperature in C; {} without a GPU or NVML."""
    if device.type != "cuda":
        return {}
    try:
        with nvml() as pynvml:
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            return {
                "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
                "sm_mhz_max": pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
                "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
                "power_w": round(pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3, 1),
                "power_limit_w": round(pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3, 1),
                "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
                "driver": str(pynvml.nvmlSystemGetDriverVersion()),
            }
    except Exception as error:  # NVML raises its own types, and each query may be unsupported
        return {"unknown": f"{type(error).__name__}: {error}"}


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    if device.type != "cuda":
        return {"gpu": None, "cpu": cpu_name(), "note": "timings of a CPU: they only show that the benchmark runs"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "gpu_memory_gb": round(properties.total_memory / 1e9, 2),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cpu": cpu_name(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "system": platform.platform(),
    }


def peak_bytes(device: torch.device) -> int:
    """Memory of this process on the device as the driver counts it now.

    torch's allocator and ours give nothing back in between, so at the end of a part this is its peak.
    """
    if device.type != "cuda":
        return 0
    from longtake.runtime.backends.trt.engine import device_bytes_used

    return device_bytes_used(device)


def synchronize(device: torch.device) -> None:
    """Wait for everything enqueued on `device`; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
