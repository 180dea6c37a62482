"""Jobs: sessions that nobody watches. They are in the store before they are answered, and survive a restart of everything."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from longtake.runtime.serve.desk import drive
from longtake.runtime.serve.front import Front
from longtake.runtime.serve.journal import Journal

log = logging.getLogger(__name__)


class Jobs:
    """Drives every job of the store that has not ended."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._leaving = False

    def begin(self) -> None:
        """Take up what an earlier process left."""
        left = [one for one in self.front.store.all() if one.meta.kind == "video" and one.end() is None]
        for journal in sorted(left, key=lambda one: one.meta.created):
            self.add(journal, again=True)

    def add(self, journal: Journal, again: bool = False) -> asyncio.Task[None]:
        """Drive a job; `again`: it waited or ran before, so that quotas do not count."""
        task = asyncio.create_task(self._run(journal, again))
        self._tasks[journal.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(journal.id, None))
        return task

    async def _run(self, journal: Journal, again: bool) -> None:
        front, begun, last = self.front, time.monotonic(), time.monotonic()
        async for event in drive(front.desk, front.workers, journal, None, front.meters, again):
            if event.kind == "opened":
                last = time.monotonic()
            if event.kind == "chunk":
                now = time.monotonic()
                front.measured(chunk_s=now - last)
                last = now
            if event.kind == "end" and event.facts.get("state") == "failed" and journal.end() is None:
                with contextlib.suppress(OSError):
                    journal.finish("failed", str(event.facts.get("reason")), str(event.facts.get("code")))
            if event.kind == "end":
                facts = {
                    "session": journal.id,
                    "state": event.facts.get("state"),
                    "s": round(time.monotonic() - begun, 3),
                }
                log.info("job ended", extra=facts)

    def cancel(self, session: str) -> None:
        """Stop driving a job."""
        if task := self._tasks.get(session):
            task.cancel()

    def end(self) -> None:
        """Stop all; what they are is in the store."""
        self._leaving = True
