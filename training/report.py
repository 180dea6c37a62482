"""The run report of a training run: what it was trained with, how fast, and how good it is on held-out data."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import torch

from longtake.provenance import origin, resident_bytes
from longtake.training.models.presets import PRESETS


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Peak memory in GB of 10^9 bytes, and whose it is."""
    if device.type == "cuda":
        return {"peak_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 3), "peak_of": "torch's GPU memory"}
    return {"peak_gb": round(resident_bytes() / 1e9, 3), "peak_of": "resident memory of the process (CPU)"}


def present_memory(device: torch.device) -> str:
    """Memory for a progress bar: the GPU's peak, or what the process has resident now."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB peak"
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):  # not Linux
        return f"{peak_memory(device)['peak_gb']:.1f} GB peak"
    return f"{pages * resource.getpagesize() / 1e9:.1f} GB"


def train_report(
    side: dict[str, Any], steps_per_s: float, metrics: dict[str, float], device: torch.device
) -> dict[str, Any]:
    """The report of a run whose checkpoints share the facts `side`, JSON-ready.

    steps_per_s: of the steps made since the start or resumption, evaluations and resume points included.
    """
    preset = PRESETS.get(side["preset"])
    return {
        "kind": "train",
        **origin(),
        **side,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "resolution": f"{preset.width}x{preset.height}" if preset else None,
        "steps_per_s": round(steps_per_s, 3),
        **peak_memory(device),
        "metrics": metrics,
    }
