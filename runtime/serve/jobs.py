"""Jobs: sessions that nobody watches. They are in the store before they are answered, and survive a restart of everything."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

from longtake.errors import LongtakeError
from longtake.runtime.serve.desk import asked, drive
from longtake.runtime.serve.front import Front
from longtake.runtime.serve.grants import ChangeRefusedError, Grant, WorkerLostError
from longtake.runtime.serve.journal import Journal
from longtake.runtime.serve.messages import chunk_seconds

log = logging.getLogger(__name__)

EXPIRE_EVERY = 600.0  # seconds


class Jobs:
    """Drives every job of the store that has not ended, and removes what has stood there for too long."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self._tasks: set[asyncio.Task[None]] = set()
        self._cleaning: asyncio.Task[None] | None = None
        self._leaving = False

    async def begin(self) -> None:
        """Take up what an earlier process left."""
        jobs = [one for one in self.front.store.all() if one.meta.kind == "video"]
        for journal in sorted(jobs, key=lambda one: one.meta.created):
            try:
                if journal.end() is None:
                    await self.add(journal, again=True)
            except (LongtakeError, OSError) as error:  # one that is damaged does not keep the others
                log.warning("job %s is left out: %s", journal.id, error)
        self._cleaning = self._cleaning or asyncio.create_task(self._clean())

    async def _clean(self) -> None:
        while True:
            store, limits = self.front.store, self.front.limits  # a redeploy changes them
            try:
                known = await self.front.desk.known()
                for session in await asyncio.to_thread(store.expire, limits.parked_s, limits.kept_s, spared=known):
                    log.info("expired", extra={"session": session})
            except Exception:  # it is tried again
                log.exception("the store could not be cleaned")
            await asyncio.sleep(EXPIRE_EVERY)

    async def add(self, journal: Journal, again: bool = False) -> None:
        """Drive a job; `again`: it waited or ran before, so that quotas do not count. Raises QuotaError."""
        number = await asked(self.front.desk, journal, again)
        task = asyncio.create_task(self._run(journal, number))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, journal: Journal, number: int) -> None:
        """Drive it to its end; while people wait for a place, it makes room and waits, too."""
        with self.front.traces.session(journal.id, "video") as span:
            await self._drive(journal, number, span)

    async def _drive(self, journal: Journal, number: int, span: Any) -> None:
        front, begun = self.front, time.monotonic()
        grant: Grant | None = None
        async for event in drive(front.desk, front.workers, journal, number, None, front.meters):
            if event.kind == "granted":
                grant = event.facts["grant"]
            if event.kind == "chunk":
                front.measured(chunk_s=chunk_seconds(event.facts["ms"]))
                front.traces.chunk(span, **event.facts)
            if event.kind == "chunk" and grant and await front.desk.people_wait():
                with contextlib.suppress(ChangeRefusedError, WorkerLostError):
                    await front.workers.control(grant, "park")
            if event.kind == "end":
                state, reason, code = (str(event.facts.get(key) or "") for key in ("state", "reason", "code"))
                if state == "failed" and journal.end() is None:
                    with contextlib.suppress(OSError):
                        journal.finish("failed", reason, code)
                log.info(
                    "job ended", extra={"session": journal.id, "state": state, "s": round(time.monotonic() - begun, 3)}
                )
                if state == "parked" and not self._leaving:
                    await asyncio.sleep(1.0 if code else 0.0)  # a full disk is asked again, not hammered
                    front.keep(asyncio.create_task(self.add(journal, again=True)))

    def end(self) -> None:
        """Stop all; what they are is in the store."""
        self._leaving = True
        if self._cleaning is not None:
            self._cleaning.cancel()


class JobsElsewhere:
    """What a front does with a job where the registry is another process, which drives it."""

    def __init__(self, desk: Any) -> None:
        self.desk = desk

    async def add(self, journal: Journal) -> None:
        """Raises QuotaError."""
        await self.desk.add_job(journal.id)
