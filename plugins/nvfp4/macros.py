"""The codec's limits, for its kernels."""

from __future__ import annotations

from longtake.plugins.kernels import Macros
from longtake.plugins.nvfp4.reference import RULE_LIMITS


def limit_macros(rule: str) -> Macros:
    """The codec's limits as the macros that codec.cuh expects."""
    m2, m3 = RULE_LIMITS[rule]
    return {"LIMIT_E2M1": f"{m2}f", "LIMIT_E4M3": f"{m3}f"}
