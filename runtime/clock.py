"""Stage times of one chunk: device events on a GPU, so that measuring adds no synchronisation; a host clock elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StageClock:
    """Collects milliseconds by stage; a stage timed several times adds up."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body as `name`."""
        start = self._now()
        yield
        self._marks.append((name, start, self._now()))

    def milliseconds(self) -> dict[str, float]:
        """Milliseconds by stage. On a GPU, call it only after the stream was synchronised."""
        total: dict[str, float] = {}
        for name, start, end in self._marks:
            spent = start.elapsed_time(end) if self._cuda else 1e3 * (end - start)
            total[name] = total.get(name, 0.0) + spent
        return total
