"""What each message of a running session does."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from longtake.errors import LongtakeError
from longtake.runtime.serve import contract
from longtake.runtime.serve.cameras import way_of
from longtake.runtime.serve.contract import Body, ServeError, refused
from longtake.runtime.serve.fork import Wish, fork
from longtake.runtime.serve.front import Front, writing
from longtake.runtime.serve.grants import Ack, Change, Event, Grant
from longtake.runtime.serve.journal import Journal
from longtake.runtime.serve.registry import ACTIVE, PAUSED
from longtake.runtime.serve.requests import Asker, checked_text
from longtake.runtime.serve.store import new_id

Handler = Callable[[Any], Awaitable[None]]


class Shown(Protocol):
    """What controls need of a connection. cursor: the next chunk to send; shown: the one on the screen."""

    front: Front
    journal: Journal | None
    user: str
    request_id: str | None
    grant: Grant | None
    active: asyncio.Event
    started: bool
    ended: Event | None
    cursor: int
    shown: int
    asked: dict[str, float]

    async def send(self, kind: str, binary: bytes | None = None, /, **facts: Any) -> None: ...

    async def worker(self, call: Callable[[Grant], Awaitable[Any]]) -> Any: ...

    async def give_up(self) -> None: ...

    async def advance(self) -> None: ...


class Controls:
    """Messages to what they do, for one connection."""

    def __init__(self, connection: Shown) -> None:
        self.to = connection
        self._handlers: dict[type[Body], Handler] = {
            contract.Interaction: self.interaction,
            contract.Acknowledge: self.acknowledge,
            contract.Playback: self.playback,
            contract.Pause: self.pause,
            contract.Continue: self.go_on,
            contract.Extend: self.extend,
            contract.SnapshotNow: self.snapshot,
            contract.Stop: self.stop,
            contract.Ping: self.ping,
        }

    async def handle(self, message: Body) -> None:
        """Do what a message asks for. Raises ServeError."""
        handler = self._handlers.get(type(message))
        if handler is None:
            raise ServeError("already_started", "this socket has its session", detail={"fix": "open another socket"})
        await handler(message)

    def _require_started(self) -> None:
        if not self.to.started:
            raise ServeError("not_started", "the session has not started yet", detail={"fix": "wait for video.start"})

    async def interaction(self, message: contract.Interaction) -> None:
        self._require_started()
        body, event = message.interaction, message.interaction.event
        camera, about = (event.multi_modal_data or contract.MultiModal()).camera, await self.to.front.about()
        if camera is not None and not about["can"]["camera"]:
            raise ServeError("interaction_failed", "this model has no camera", detail={"fix": "leave camera out"})
        if event.prompt is None and not event.cut and camera is None:
            detail = {"expected": "prompt, cut or camera"}
            raise ServeError(
                "bad_request", "an interaction changes the prompt, cuts, or moves the camera", detail=detail
            )
        if event.cut and not about["can"]["cut"]:
            raise ServeError("not_supported", "this model knows no cuts", detail={"fix": "leave cut out"})
        if event.prompt is not None:
            checked_text(event.prompt, "the new prompt", Asker(self.to.user, about, self.to.front.limits))
        way = None if camera is None else way_of(camera, about["fps"])
        ident = body.event_id or f"e{secrets.token_hex(4)}"
        self.to.asked.setdefault(ident, time.monotonic())
        ack = await self._change(Change(ident, event.prompt, bool(event.cut), way))
        await self.to.send(
            "session.interaction.queued",
            request_id=self.to.request_id,
            event_id=ident,
            at_chunk=ack.at_chunk,
            transition_chunks=0,
        )

    async def _change(self, change: Change) -> Ack:
        if self.to.ended is not None:
            raise ServeError("not_active", "the session has ended", detail={"fix": "retake it, or start another"})
        answer = await self.to.worker(lambda grant: self.to.front.workers.interact(grant, change))
        assert isinstance(answer, Ack)
        return answer

    async def acknowledge(self, message: contract.Acknowledge) -> None:
        if message.chunk >= self.to.cursor:
            detail = {"got": str(message.chunk), "expected": f"at most {self.to.cursor - 1}, the last one sent"}
            raise ServeError("bad_ack", "that chunk was not sent yet", detail=detail)
        self.to.shown = max(self.to.shown, message.chunk)
        if message.stalled_ms:
            self.to.front.meters.add("client_stall_seconds", message.stalled_ms / 1e3)
        await self._advance()

    async def playback(self, message: contract.Playback) -> None:
        about = await self.to.front.about()
        frame = int(message.position_seconds * about["fps"])
        chunk = (
            0
            if frame < about["first_chunk_frames"]
            else 1 + (frame - about["first_chunk_frames"]) // about["chunk_frames"]
        )
        await self.acknowledge(contract.Acknowledge(chunk=min(chunk, self.to.cursor - 1)))

    async def _advance(self) -> None:
        if self.to.active.is_set() and self.to.grant and self.to.ended is None:
            await self.to.advance()

    async def _control(self, what: str) -> int:
        answer = await self.to.worker(lambda grant: self.to.front.workers.control(grant, what))
        return int(answer["chunk"])

    async def pause(self, _: contract.Pause) -> None:
        self._require_started()
        chunk = await self._control("pause")
        await self._state(PAUSED)
        await self.to.send("session.paused", request_id=self.to.request_id, chunk=chunk)

    async def go_on(self, _: contract.Continue) -> None:
        self._require_started()
        chunk = await self._control("continue")
        await self._state(ACTIVE)
        await self.to.send("session.continued", request_id=self.to.request_id, chunk=chunk)

    async def _state(self, state: str) -> None:
        assert self.to.grant is not None and self.to.journal is not None
        await self.to.front.desk.set_state(self.to.journal.id, self.to.grant.epoch, state)

    async def extend(self, message: contract.Extend) -> None:
        self._require_started()
        assert self.to.journal is not None
        limits, journal = self.to.front.limits, self.to.journal
        total = max([journal.meta.chunks, *(event["total"] for event in journal.events() if event["type"] == "extend")])
        if total + message.chunks > limits.session_chunks:
            detail = {"expected": f"at most {limits.session_chunks} in all"}
            raise ServeError("bad_length", "too many chunks", detail=detail)
        ack = await self._change(Change(message.event_id or f"x{secrets.token_hex(4)}", extend=message.chunks))
        await self.to.send("session.extended", request_id=self.to.request_id, chunks=ack.at_chunk)

    async def snapshot(self, _: contract.SnapshotNow) -> None:
        self._require_started()
        assert self.to.journal is not None
        wish = Wish(self.to.journal.count())
        try:
            with writing():
                kept = await asyncio.to_thread(
                    fork, self.to.front.store, self.to.journal, new_id("live"), self.to.user, wish
                )
        except LongtakeError as error:
            raise refused("snapshot_failed", error) from None
        await self.to.send(
            "session.snapshot.saved", request_id=self.to.request_id, snapshot_id=kept.id, chunk=wish.from_chunk
        )

    async def stop(self, _: contract.Stop) -> None:
        if self.to.ended is None and self.to.active.is_set():
            await self._control("stop")
        elif self.to.ended is None:
            await self.to.give_up()

    async def ping(self, _: contract.Ping) -> None:
        await self._advance()
        await self.to.send("session.pong", request_id=self.to.request_id)
