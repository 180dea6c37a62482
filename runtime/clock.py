"""Stage times: device events on a GPU, so that measuring adds no synchronisation; a host clock elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StageClock:
    """Collects milliseconds by stage, from several threads if need be."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._cuda = device, device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body as one occurrence of `name`, on whatever stream is current."""
        start = self._now()
        yield
        self._marks.append((name, start, self._now()))

    def take(self) -> dict[str, list[float]]:
        """Milliseconds of every occurrence since the last call, by stage. On a GPU its streams must have been waited for."""
        marks, self._marks = self._marks, []
        taken: dict[str, list[float]] = {}
        for name, start, end in marks:
            taken.setdefault(name, []).append(start.elapsed_time(end) if self._cuda else 1e3 * (end - start))
        return taken

    def milliseconds(self) -> dict[str, float]:
        """Milliseconds by stage since the last call; a stage timed several times adds up. See `take`."""
        return {name: sum(spent) for name, spent in self.take().items()}
