"""The driver's figure of this process's GPU memory after every step that allocates: which promise was kept, which not."""

from __future__ import annotations

import logging
from typing import Any

import torch

from longtake.runtime.backends.trt.engine import device_bytes_used

log = logging.getLogger(__name__)


class MemoryLog:
    """Rows {"step", "terms", "bytes", "torch_bytes", "reserved_bytes", "highest_bytes"} in the order of the steps.

    bytes: of the process, by the driver; torch_bytes: of tensors that are alive; reserved_bytes: what torch's allocator
    holds, so the difference of the last two is its slack, and what the first has on top are contexts, kernels, libraries.
    highest_bytes: what it was at most so far, between steps too: now, with the most that torch's allocator ever held in the
    place of what it holds. terms: names of the budget's terms that a step allocates. peak: the largest of all.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak, self._noted = device, 0, 0
        self.rows: list[dict[str, Any]] = []

    def add(self, step: str, *terms: str) -> None:
        """Note what the driver says now. A step that repeats is noted again only if it made the process larger."""
        found, reserved = device_bytes_used(self.device), torch.cuda.memory_reserved(self.device)
        highest = found - reserved + torch.cuda.max_memory_reserved(self.device)
        self.peak = max(self.peak, highest)
        known = any(row["step"] == step for row in self.rows)
        if known and found <= self._noted:
            return
        self._noted = max(self._noted, found)
        row: dict[str, Any] = {
            "step": step, "terms": list(terms), "bytes": found,
            "torch_bytes": torch.cuda.memory_allocated(self.device),
            "reserved_bytes": reserved, "highest_bytes": highest,
        }  # fmt: skip
        self.rows.append(row)
        log.info("memory: %.3f GB after %s (tensors %.3f, held by torch %.3f)", found / 1e9, step,
                 row["torch_bytes"] / 1e9, row["reserved_bytes"] / 1e9)  # fmt: skip
