"""Where sessions ask for a place: the registry with a clock, and whoever waits for it; and the loop that drives one session."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from longtake.runtime.serve.grants import Event, Grant, Running, WorkerLostError, Workers
from longtake.runtime.serve.journal import Journal
from longtake.runtime.serve.limits import Limits
from longtake.runtime.serve.meters import Meters
from longtake.runtime.serve.registry import ACTIVE, MIDDLE, PARKED, Queue, QuotaError, Registry

log = logging.getLogger(__name__)

PATIENCE = 3  # losses in a row without a new chunk, after which a session fails
POLL_S = 5.0  # how long `wait` waits for news


class Desk:
    """The registry's only user. Its methods are asynchronous so that it may be in another process."""

    def __init__(self, limits: Limits, meters: Meters) -> None:
        self.registry = Registry(limits.user_sessions, limits.user_jobs, limits.queue)
        self.born = secrets.randbits(
            30
        )  # numbers of an earlier desk, which forgot all when it died, are not this one's
        self.registry.first_number(self.born << 32)
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

    async def register(
        self, worker: str, slots: int, generation: int, about: dict[str, Any], running: Sequence[Running] = ()
    ) -> bool:
        """A worker is there, with what it runs. False if a newer deployment has begun, so that it should end."""
        now = time.monotonic()
        self.registry.register(worker, slots, generation, now)
        for one in running:
            self.registry.adopt(one.grant, one.user, one.kind, now)
        for late in self.registry.expired(now):
            self.registry.lost(late, now)
        self.about = about
        self.meters.set("worker_up", len(self.registry.workers))
        self._tell()
        return not self.registry.stale(worker)

    async def begin_generation(self) -> int:
        """A new deployment begins: workers of older ones get nothing new, and end. Its number, above those of earlier desks."""
        self.registry.generation = max(self.registry.generation + 1, time.time_ns())
        return self.registry.generation

    async def generation(self) -> int:
        return self.registry.generation

    async def model(self) -> dict[str, Any] | None:
        """What the workers serve; None until one has told it."""
        return self.about

    async def load(self) -> float:
        return self.registry.load()

    async def ask(self, user: str, session: str, kind: str, epoch: int, moved: bool = False) -> int:
        """The number under which to wait. Raises QuotaError."""
        self._grants.pop(session, None)
        entry = self.registry.ask(user, session, kind, time.monotonic(), epoch, moved)
        self._tell()
        return entry.number

    async def wait(self, session: str, number: int, known: Queue | None) -> Grant | Queue | str:
        """The grant, or a position other than `known`, or after a while the same.

        "taken" if somebody else asked since, "forgotten" if it was another desk that was asked.
        """
        if number >> 32 != self.born:
            return "forgotten"
        until = time.monotonic() + POLL_S
        while True:
            news = self._news
            if not self.registry.is_asked(session, number):
                return "taken"
            if grant := self._grants.pop(session, None):
                return grant
            position = self.registry.position(session)
            if position is not None and (position != known or time.monotonic() > until):
                return position
            if position is None and time.monotonic() > until:
                return "taken"
            try:
                await asyncio.wait_for(news.wait(), max(0.01, until - time.monotonic()))
            except TimeoutError:
                continue

    async def set_state(self, session: str, epoch: int, state: str) -> None:
        """A running session's state, if the lease is the newest."""
        if self.registry.holds(session, epoch):
            self.registry.moves(session, state)
            self._tell()

    async def known(self) -> frozenset[str]:
        """Sessions that wait or run."""
        return frozenset(self.registry.entries)

    async def state(self, session: str) -> str | None:
        return self.registry.state(session)

    async def position(self, session: str) -> Queue | None:
        return self.registry.position(session)

    async def again(self, meta_user: str, kind: str, session: str, number: int, epoch: int, worker: str = "") -> int:
        """It lost its worker, or is moved: it waits again, before all others. worker: that is gone.

        The number to wait with; 0 if somebody else has asked since.
        """
        now = time.monotonic()
        if worker:
            self.registry.workers.pop(worker, None)
        if number >> 32 != self.born:
            number = self.registry.ask(meta_user, session, kind, now, epoch, True).number
        elif self.registry.is_asked(session, number):
            self.registry.again(session, now)
        else:
            number = 0
        self._tell()
        return number

    async def release(self, session: str, number: int, epoch: int = 0) -> None:
        """It neither waits nor runs any more. epoch: of its grant, by which a later desk knows it."""
        if self.registry.is_asked(session, number):
            self._grants.pop(session, None)
            self.registry.release(session, number, time.monotonic())
        elif number >> 32 != self.born and self.registry.holds(session, epoch):
            self.registry.release(session, self.registry.entries[session].number)
        self._tell()

    async def someone_waits(self) -> bool:
        return self.registry.waits() > 0

    async def people_wait(self) -> bool:
        return self.registry.people_wait()

    async def has_worker(self) -> bool:
        return bool(self.registry.workers)


async def asked(desk: Any, journal: Journal, again: bool = False) -> int:
    """Ask for a place; the number is what `drive` waits with. again: it waited or ran before. Raises QuotaError."""
    meta = journal.meta
    asking = asyncio.ensure_future(desk.ask(meta.user, journal.id, meta.kind, journal.leased(), again))
    try:
        return int(await asyncio.shield(asking))
    except asyncio.CancelledError:  # whoever asked has gone meanwhile: a place would be nobody's, and never given back
        with contextlib.suppress(QuotaError):
            await desk.release(journal.id, int(await asking))
        raise


def _taken_over(journal: Journal) -> Event:
    return Event("end", {"state": "lost", "code": "taken_over", "reason": "taken over", "chunks": journal.count()})


async def _granted(desk: Any, journal: Journal, number: int) -> AsyncIterator[Grant | Event | int]:
    """Where it waits, whenever that changes; at last the grant, or nothing if somebody else asked since.

    A number, if it has to be asked for anew, because the desk died.
    """
    position: Queue | None = None
    while (answer := await desk.wait(journal.id, number, position)) != "taken":
        if isinstance(answer, Grant):
            yield answer
            return
        if answer == "forgotten":
            number = await asked(desk, journal, again=True)
            yield number
        elif answer != position:
            position = answer
            facts = {"position": answer.position, "ahead": answer.ahead, "estimate_s": answer.estimate_s}
            yield Event("queued", facts)


async def drive(
    desk: Any, workers: Workers, journal: Journal, number: int, window: int | None, meters: Meters
) -> AsyncIterator[Event]:
    """Wait, be granted, stream; when the worker is lost, wait again. Events: "queued", "granted", what a worker tells, "moved".

    The last event is "end", always. However it ends, the place is given back.
    """
    fails, moved, held, meta = 0, False, None, journal.meta
    try:
        while True:
            held = None
            async for answer in _granted(desk, journal, number):
                if isinstance(answer, Grant):
                    held = answer
                elif isinstance(answer, int):
                    number = answer
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
            await asyncio.sleep(0.5 * fails)
            gone = held.worker if reason == "worker_lost" else ""
            number = await desk.again(meta.user, meta.kind, journal.id, number, held.epoch, gone)
            if not number:
                yield _taken_over(journal)
                return
            moved = True
            yield Event("moved", {"reason": reason, "replaying": journal.count()})
    finally:
        await desk.release(journal.id, number, held.epoch if held else 0)
