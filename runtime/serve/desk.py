"""Where sessions ask for a place: the registry with a clock, and whoever waits for it; and the loop that drives one session."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from longtake.runtime.serve.grants import Event, Grant, WorkerLostError, Workers
from longtake.runtime.serve.journal import Journal
from longtake.runtime.serve.limits import Limits
from longtake.runtime.serve.meters import Meters
from longtake.runtime.serve.registry import ACTIVE, MIDDLE, PARKED, Queue, Registry

log = logging.getLogger(__name__)

PATIENCE = 3  # losses in a row without a new chunk, after which a session fails
POLL_S = 5.0  # how long `wait` waits for news


class Desk:
    """The registry's only user. Its methods are asynchronous so that it may be in another process."""

    def __init__(self, limits: Limits, meters: Meters) -> None:
        self.registry = Registry(limits.user_sessions, limits.user_jobs, limits.queue)
        self.meters = meters
        self._news = asyncio.Event()
        self._grants: dict[str, Grant] = {}
        self.about: dict[str, Any] | None = None

    def _tell(self) -> None:
        for grant in self.registry.place(time.monotonic()):
            entry = self.registry.entries[grant.session]
            self._grants[grant.session] = grant
            self.meters.observe("queue_wait_seconds", time.monotonic() - entry.asked)
        self.meters.set("queue_length", self.registry.waits())
        for state in (*MIDDLE, PARKED):
            count = sum(one.state == state for one in self.registry.entries.values())
            self.meters.set("sessions", count, state=state)
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def register(self, worker: str, slots: int, generation: int, about: dict[str, Any]) -> None:
        self.registry.register(worker, slots, generation, time.monotonic())
        self.about = about
        self.meters.set("worker_up", len(self.registry.workers))
        self._tell()

    async def heartbeat(self, worker: str) -> bool:
        return self.registry.heartbeat(worker, time.monotonic())

    async def lost(self, worker: str) -> None:
        """A worker is gone; its sessions wait again."""
        self.registry.lost(worker, time.monotonic())
        self.meters.set("worker_up", len(self.registry.workers))
        self._tell()

    async def ask(self, user: str, session: str, kind: str, epoch: int, moved: bool = False) -> int:
        """The number under which to wait. Raises QuotaError."""
        self._grants.pop(session, None)
        entry = self.registry.ask(user, session, kind, time.monotonic(), epoch, moved)
        self._tell()
        return entry.number

    async def wait(self, session: str, number: int, known: Queue | None) -> Grant | Queue | None:
        """The grant, or a position other than `known`, or after a while the same; None if somebody else asked since."""
        until = time.monotonic() + POLL_S
        while True:
            news = self._news
            if not self.registry.is_asked(session, number):
                return None
            if grant := self._grants.pop(session, None):
                return grant
            position = self.registry.position(session)
            if position != known or position is None or time.monotonic() > until:
                return position
            try:
                await asyncio.wait_for(news.wait(), max(0.01, until - time.monotonic()))
            except TimeoutError:
                continue

    async def set_state(self, session: str, epoch: int, state: str) -> None:
        """A running session's state, if the lease is the newest."""
        if self.registry.holds(session, epoch):
            self.registry.moves(session, state)
            self._tell()

    async def state(self, session: str) -> str | None:
        return self.registry.state(session)

    async def position(self, session: str) -> Queue | None:
        return self.registry.position(session)

    async def again(self, session: str, epoch: int, worker: str = "") -> bool:
        """It lost its worker: it waits again. worker: that is gone. False if another lease has begun."""
        if worker:
            self.registry.workers.pop(worker, None)
        held = self.registry.holds(session, epoch)
        if held:
            self.registry.again(session, time.monotonic())
        self._tell()
        return held

    async def release(self, session: str, number: int) -> None:
        if self.registry.is_asked(session, number):
            self._grants.pop(session, None)
        self.registry.release(session, number)
        self._tell()

    async def someone_waits(self) -> bool:
        return self.registry.waits() > 0

    async def has_worker(self) -> bool:
        return bool(self.registry.workers)


async def asked(desk: Any, journal: Journal, again: bool = False) -> int:
    """Ask for a place; the number is what `drive` waits with. again: it waited or ran before. Raises QuotaError."""
    meta = journal.meta
    return int(await desk.ask(meta.user, journal.id, meta.kind, journal.leased(), again))


def _taken_over(journal: Journal) -> Event:
    return Event("end", {"state": "lost", "code": "taken_over", "reason": "taken over", "chunks": journal.count()})


async def _granted(desk: Any, journal: Journal, number: int) -> AsyncIterator[Grant | Event]:
    """Where it waits, whenever that changes; at last the grant, or nothing if somebody else asked since."""
    position: Queue | None = None
    while (answer := await desk.wait(journal.id, number, position)) is not None:
        if isinstance(answer, Grant):
            yield answer
            return
        if answer != position:
            position = answer
            facts = {"position": answer.position, "ahead": answer.ahead, "estimate_s": answer.estimate_s}
            yield Event("queued", facts)


async def drive(
    desk: Any, workers: Workers, journal: Journal, number: int, window: int | None, meters: Meters
) -> AsyncIterator[Event]:
    """Wait, be granted, stream; when the worker is lost, wait again. Events: "queued", "granted", what a worker tells, "moved".

    The last event is "end", always. However it ends, the place is given back.
    """
    fails, moved = 0, False
    try:
        while True:
            held: Grant | None = None
            async for answer in _granted(desk, journal, number):
                if isinstance(answer, Grant):
                    held = answer
                else:
                    yield answer
            if held is None:
                yield _taken_over(journal)
                return
            yield Event("granted", {"grant": held, "moved": moved})
            before, reason = journal.count(), "worker_lost"
            try:
                async for event in workers.stream(held, window):
                    if event.kind == "opened":
                        await desk.set_state(journal.id, held.epoch, ACTIVE)
                    if event.kind == "end" and event.facts.get("reason") == "drain":
                        reason = "drain"
                        break
                    yield event
                    if event.kind == "end":
                        return
            except WorkerLostError as error:
                log.warning("worker lost", extra={"session": journal.id, "worker": held.worker, "reason": str(error)})
            fails = 0 if journal.count() > before or reason == "drain" else fails + 1
            if fails >= PATIENCE:
                journal.finish("failed", "its worker was lost again and again", "worker_lost")
                yield Event(
                    "end", {"state": "failed", "code": "worker_lost", "reason": "worker lost", "chunks": before}
                )
                return
            meters.add("session_moves", reason=reason)
            if not await desk.again(journal.id, held.epoch, held.worker if reason == "worker_lost" else ""):
                yield _taken_over(journal)
                return
            moved = True
            yield Event("moved", {"reason": reason, "replaying": journal.count()})
    finally:
        await desk.release(journal.id, number)
