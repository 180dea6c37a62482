"""The memory budget beside the measured peak, where the budget can be computed."""

from __future__ import annotations

from typing import Any

from longtake.runtime.bench.options import BenchOptions


def budget_beside(options: BenchOptions, ours: dict[str, Any]) -> dict[str, Any] | None:
    """{"gb", "measured_gb", "off_by"} of our side; None before anything was measured on a GPU."""
    budget, measured = ours.get("budget_gb"), ours.get("peak_gb")
    if not budget or not measured:
        return None
    return {"gb": budget, "measured_gb": measured, "off_by": round(measured / budget - 1, 4)}
