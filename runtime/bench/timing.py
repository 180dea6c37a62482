"""Times of repeated work: device events on a GPU (no synchronisation is added), a host clock elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Marks:
    """Collects the milliseconds of named spans, on whatever stream is current; spans may come from several threads."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time the body as one occurrence of `name`."""
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def take(self) -> dict[str, list[float]]:
        """Milliseconds of every span since the last call, by name, in order; waits for the device."""
        synchronize(self.device)
        spans, self._spans = self._spans, []
        found: dict[str, list[float]] = {}
        for name, start, end in spans:
            spent = start.elapsed_time(end) if self.device.type == "cuda" else 1e3 * (end - start)
            found.setdefault(name, []).append(spent)
        return found


def synchronize(device: torch.device) -> None:
    """Wait for everything enqueued on `device`; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mean(values: list[float]) -> float:
    """Mean, 0 for nothing."""
    return statistics.fmean(values) if values else 0.0


def spread(values: list[float]) -> float:
    """Largest minus smallest over the mean: how steady the state was; 0 for fewer than two."""
    return (max(values) - min(values)) / mean(values) if len(values) > 1 and mean(values) else 0.0
