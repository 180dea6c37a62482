"""`WS /v1/realtime/video`: one socket shows one session while it is made. Losing the socket loses nothing.

Four tasks share a connection: one reads what the client says, one drives the session (queue, worker, another worker), one
sends what is in the journal, one is the media clock of a viewer who says nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import WebSocket
from starlette.websockets import WebSocketDisconnect, WebSocketState

from longtake.runtime.serve.contract import FIRST, ServeError, refused
from longtake.runtime.serve.controls import Controls
from longtake.runtime.serve.desk import asked, drive
from longtake.runtime.serve.flow import Flow, MediaClock, Rate
from longtake.runtime.serve.front import Front, writing
from longtake.runtime.serve.grants import Event, Grant
from longtake.runtime.serve.journal import Journal
from longtake.runtime.serve.lingering import linger
from longtake.runtime.serve.messages import (
    BUSY,
    END_CODES,
    IDLE_CLOSE,
    LAST_WORDS_S,
    QUOTA,
    chunk_facts,
    chunk_seconds,
    message_of,
    start_facts,
    text_of,
)
from longtake.runtime.serve.openings import Opening, opened
from longtake.runtime.serve.registry import QuotaError

log = logging.getLogger(__name__)


class Connection:
    """One socket. `cursor`: the next chunk to send."""

    def __init__(self, front: Front, socket: WebSocket, user: str) -> None:
        self.front, self.socket, self.user = front, socket, user
        self.request_id: str | None = None
        self.journal: Journal | None = None
        self.flow = Flow()
        self.grant: Grant | None = None
        self.cursor = self.shown = 0
        self.started = self.placed = False
        self.ended: Event | None = None
        self.active, self.news = asyncio.Event(), asyncio.Event()
        self.asked: dict[str, float] = {}  # when changes came in, by event_id, for the delay that is measured
        self.heard = self.born = time.monotonic()
        self.closing = self.gone = self.new = False
        self.span: Any = None  # of its trace
        self.driving: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()

    async def send(self, kind: str, binary: bytes | None = None, /, **facts: Any) -> None:
        """Send a message, and right after it what it announces."""
        if self.gone:
            return
        text = json.dumps({"type": kind, **facts}, ensure_ascii=False)
        async with self._writing:
            await self.socket.send_text(text)
            if binary is not None:
                await self.socket.send_bytes(binary)

    async def fail(self, error: ServeError, event_id: str | None = None) -> None:
        """Say what is wrong; close the socket if that is how it ends."""
        self.front.meters.add("errors", code=error.code)
        async with self._writing:
            await self.socket.send_text(json.dumps(error.frame(self.request_id, event_id)))
        if error.close is not None:
            await self.close(error.close)

    async def give_up(self) -> None:
        """Stop before a worker has the session."""
        assert self.journal is not None and self.driving is not None
        self.driving.cancel()
        with writing():
            self.journal.finish("stopped")
        self.started = True
        await self._finish(Event("end", {"state": "stopped"}))

    async def close(self, code: int) -> None:
        self.closing = True
        if self.socket.application_state is WebSocketState.CONNECTED:
            await self.socket.close(code)

    # ---- from the first message to the last ------------------------------------------------------------------------------

    async def run(self) -> None:
        """The whole life of the connection."""
        opening = await self._first()
        if opening is None:
            return
        self.journal, self.flow, self.cursor = opening.journal, opening.flow, opening.next_chunk
        self.request_id, self.shown, self.new = opening.journal.id, opening.next_chunk - 1, opening.new
        self.placed = opening.journal.count() > 0  # its first chunk is there already: nothing is measured of it
        with self.front.traces.session(opening.journal.id, "live", self.socket.headers.get("traceparent")) as self.span:
            await self._attend()

    async def _attend(self) -> None:
        """From the session's opening to the socket's end."""
        self.front.connections.add(self)
        tasks = [asyncio.create_task(each) for each in (self._read(), self._drive(), self._show(), self._tick())]
        self.driving = tasks[1]
        try:
            waiting = set(tasks)
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if (
                done == {self.driving} and self.driving.cancelled()
            ):  # given up in the queue: the end is still to be said
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if not task.cancelled() and (error := task.exception()) and not _gone(error):
                    raise error
        finally:
            self.gone = True
            self.front.connections.discard(self)
            reading, driving, *others = tasks
            for task in (reading, *others):
                task.cancel()
            await asyncio.gather(reading, *others, return_exceptions=True)
            if not driving.done():
                self.front.keep(asyncio.create_task(linger(self, driving)))

    async def _first(self) -> Opening | None:
        """What the first message opens; None if the socket is closed for it."""
        limits = self.front.limits
        try:
            text = await asyncio.wait_for(text_of(self.socket), limits.first_message_s)
            message = message_of(text, limits.first_message_bytes)
            if not isinstance(message, FIRST):
                raise ServeError("not_started", "the first message begins, resumes or retakes a session", close=4400)
            return await opened(self.front, self.user, message)
        except TimeoutError:
            detail = {"fix": "send it at once"}
            await self.fail(ServeError("idle", "no first message came", close=IDLE_CLOSE, detail=detail))
        except ServeError as error:
            error.close = error.close or {404: 4404, 429: QUOTA, 503: BUSY}.get(error.status, 4400)
            await self.fail(error)
        return None

    # ---- what the client says --------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        limits = self.front.limits
        rate = Rate(limits.messages_per_second, limits.message_burst, time.monotonic)
        controls = Controls(self)
        while not self.closing:
            event_id = None
            try:
                text = await text_of(self.socket)
                self.heard = time.monotonic()
                if not rate.allows():
                    raise ServeError("rate_limited", "too many messages", status=429)
                message = message_of(text, limits.message_bytes)
                event_id = getattr(getattr(message, "interaction", message), "event_id", None)
                await controls.handle(message)
            except ServeError as error:
                await self.fail(error, event_id)

    async def worker(self, call: Callable[[Grant], Awaitable[Any]], wait_s: float = 60.0) -> Any:
        """Call the worker that has the session; while it moves, wait for the next one."""
        for _ in range(3):
            try:
                await asyncio.wait_for(self.active.wait(), wait_s)
            except TimeoutError:
                raise ServeError("no_capacity", "no worker has the session now", status=503) from None
            grant = self.grant
            assert grant is not None
            try:
                return await self.front.workers_call(call(grant))
            except ConnectionError:
                self.active.clear()
        raise ServeError("no_capacity", "no worker has the session now", status=503)

    # ---- the session -----------------------------------------------------------------------------------------------------

    async def _drive(self) -> None:
        assert self.journal is not None
        if end := self.journal.end():
            await self._begin()
            await self._finish(Event("end", {**end, "chunks": self.journal.count()}))
        else:
            try:
                number = await asked(self.front.desk, self.journal)
                front = self.front
                async for event in drive(
                    front.desk, front.workers, self.journal, number, self.flow.ahead, front.meters
                ):
                    await self._on(event)
            except QuotaError as error:
                if self.new:  # nothing of it was made, and nobody has its id
                    await asyncio.to_thread(self.front.store.remove, self.journal.id)
                await self.fail(refused(error.code, error, status=429, close=QUOTA))
        await asyncio.Event().wait()  # the sender closes the socket, once all is sent

    async def _on(self, event: Event) -> None:
        facts = event.facts
        if event.kind == "queued" and not self.started:
            await self.send("session.queued", **facts)
        elif event.kind == "granted":
            self.grant = facts["grant"]
            self.born = self.born if facts["moved"] else time.monotonic()
        elif event.kind == "opened":
            self.active.set()
            await self._begin()
            await self.advance()
        elif event.kind == "chunk":
            self.front.traces.chunk(self.span, **facts)
        elif event.kind == "moved":
            self.active.clear()
            await self.send("session.moved", request_id=self.request_id, **facts)
        elif event.kind == "end":
            await self._finish(event)
        self.news.set()

    async def _begin(self) -> None:
        if self.started:
            return
        self.started = True
        assert self.journal is not None
        about = start_facts(self.journal, await self.front.about(), self.flow)
        await self.send("video.start", **about, estimates=self.front.estimates(), next_chunk=self.cursor)

    async def _finish(self, event: Event) -> None:
        self.ended = event
        self.active.set()
        self.news.set()

    # ---- what is shown ---------------------------------------------------------------------------------------------------

    async def _show(self) -> None:
        """Send what is in the journal, in order, as fast as the socket takes it; at the end say how it ended."""
        assert self.journal is not None
        first_media, init_sent = 0, False
        while True:
            self.news.clear()
            first_media = int(self.journal.meta.about.get("first_media", 0)) or await self._first_media()
            self.cursor = max(self.cursor, first_media)
            while self.started and self.cursor < self.journal.count():
                await self._send_chunk(self.journal, self.cursor, not init_sent)
                init_sent = True
                self.cursor += 1
            if self.ended is not None and (not self.started or self.cursor >= self.journal.count()):
                await self._say_end(self.ended)
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.news.wait(), 1.0)

    async def _first_media(self) -> int:
        """The first chunk that is shown; it is known once an uploaded clip was taken in."""
        if self.journal is None or not self.journal.meta.clip:
            return 0
        self.journal = self.front.store.journal(self.journal.id)
        return int(self.journal.meta.about.get("first_media", 0)) if self.started else 1 << 30

    async def _send_chunk(self, journal: Journal, index: int, with_init: bool) -> None:
        facts, data = await asyncio.to_thread(chunk_facts, journal, index, with_init)
        await self.send("video.chunk_metadata", data, **facts)
        meters, now = self.front.meters, time.monotonic()
        first = None if self.placed else now - self.born
        self.front.measured(first, chunk_seconds(facts["ms"]))
        if first is not None:
            self.placed = True
            meters.observe("first_chunk_seconds", first)
        for ident in facts["started_event_ids"]:
            if (asked := self.asked.pop(ident, None)) is not None:
                meters.observe("interaction_seconds", now - asked)
        meters.set("ahead_chunks", index - self.shown)
        if self.clock:
            self.clock.arrived(facts["num_frames"])

    async def _say_end(self, event: Event) -> None:
        assert self.journal is not None
        facts, state = event.facts, event.facts.get("state")
        code, reason = facts.get("code", ""), facts.get("reason", "")
        if state in ("done", "stopped"):
            await self.send(
                "session.done",
                request_id=self.request_id,
                session_id=self.journal.id,
                chunks=self.journal.count(),
                stopped=state == "stopped",
                reason=reason or state,
                report=self.front.report(self.journal),
            )
            await asyncio.sleep(LAST_WORDS_S)
            await self.close(1000)
        elif state == "parked" and reason in ("idle", "paused"):
            await self.fail(ServeError("idle", f"parked: {reason} for too long; resume it", close=IDLE_CLOSE))
        elif state == "parked" and not code:
            await self.close(1001)
        else:
            close = END_CODES.get(code, 1011)
            await self.fail(
                ServeError(code or "failed", reason or "the session failed", close=close, detail=facts.get("detail"))
            )

    # ---- the clock ---------------------------------------------------------------------------------------------------------

    clock: MediaClock | None = None

    async def _tick(self) -> None:
        """Acknowledge for a viewer in `realtime` mode; in `ack` mode notice that nobody is there any more."""
        if self.flow.mode == "realtime" and self.journal is not None:
            self.clock = MediaClock(self.journal.meta.fps, time.monotonic)
            self._offset = self.cursor
        while True:
            await asyncio.sleep(0.1)
            if self.clock and self.active.is_set() and self.grant and not self.ended:
                self.shown = self._offset + self.clock.shown()
                await self.advance()

    async def advance(self) -> None:
        """Tell the worker what is shown. One that is lost is no end of the connection: the session moves."""
        assert self.grant is not None
        await self.front.workers_call(self.front.workers.advance(self.grant, self.shown), quiet=True)


def _gone(error: BaseException) -> bool:
    """Whether an error is only that the client went away."""
    return isinstance(error, WebSocketDisconnect | RuntimeError | OSError)


async def serve_socket(front: Front, socket: WebSocket, user: str) -> None:
    """Serve one socket of a user who may come in."""
    connection = Connection(front, socket, user)
    front.count_socket(user, 1)
    try:
        await socket.accept()
        await connection.run()
    except Exception as error:
        defect = ServeError("internal_error", "a defect; the session is kept", close=1011, status=500)
        if not _gone(error):
            log.exception("a connection failed")
            with contextlib.suppress(Exception):
                await connection.fail(error if isinstance(error, ServeError) else defect)
    finally:
        front.count_socket(user, -1)
