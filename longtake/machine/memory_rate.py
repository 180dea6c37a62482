"""How fast a GPU's memory is, by the vendor's figures."""

from __future__ import annotations

HBM_BYTES_PER_S = {"H100": 3.35e12, "H200": 4.8e12}


def memory_rate(gpu: str | None) -> float | None:
    """Bytes a second of the GPU of this name ("NVIDIA H200"); None for one that is not listed."""
    return next((rate for name, rate in HBM_BYTES_PER_S.items() if name in (gpu or "")), None)
