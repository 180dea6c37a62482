"""A worker holds the model and makes chunks: one thread for the device, one for the encoder, any number of sessions in turn.

It needs no more than a grant: what the session is stands in its journal. What it makes goes into the journal, too; whoever
shows it reads it there, and is told here only that it is there.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator
from typing import Any

from longtake.cuda_streams import on_own_stream
from longtake.errors import LongtakeError
from longtake.runtime.chunk import Chunk
from longtake.runtime.generator import Generator
from longtake.runtime.sampling import CancelledError
from longtake.runtime.serve.changes import taken
from longtake.runtime.serve.describe import description
from longtake.runtime.serve.grants import Ack, Change, ChangeRefusedError, Event, Grant, Running
from longtake.runtime.serve.journal import Journal, LeaseLostError
from longtake.runtime.serve.keeping import is_decoded, keep_chunk
from longtake.runtime.serve.live import Live, store_full
from longtake.runtime.serve.logs import shown
from longtake.runtime.serve.meters import Meters
from longtake.runtime.serve.rebuild import OtherEnginesError, rebuild, take_in_clip
from longtake.runtime.serve.states import StateKeeper, is_worth_keeping, keep_state
from longtake.runtime.serve.store import Store
from longtake.runtime.snapshot import Snapshot

log = logging.getLogger(__name__)

POLL_S = 1.0  # how often a worker with nothing to do looks at its clocks


class Worker:
    """See above. `name` is the registry's name for it."""

    def __init__(
        self, generator: Generator, store: Store, name: str, meters: Meters, *, idle_s: float, paused_s: float
    ) -> None:
        self.generator, self.store, self.name, self.meters = generator, store, name, meters
        self.idle_s, self.paused_s = idle_s, paused_s
        self.lives: dict[Grant, Live] = {}
        self.draining = self._closed = False
        self._turn = 0
        self._wake = threading.Condition()
        self._encoding: queue.Queue[tuple[Live, Chunk, dict[str, Any], Snapshot | None] | None] = queue.Queue()
        self._states = StateKeeper(name, generator.backend.device)
        self._threads = [
            threading.Thread(target=target, name=f"longtake-{name}", daemon=True)
            for name, target in (("device", self._run_device), ("encode", self._run_encoder))
        ]
        for thread in self._threads:
            thread.start()

    def describe(self) -> dict[str, Any]:
        """What it serves: sizes, lengths, defaults, what the model can. The metrics get what is of interest there."""
        about = description(self.generator)
        self.meters.worker(about, self.generator.backend.peak_bytes())
        return about

    def running(self) -> list[Running]:
        """What it makes now."""
        lives = [live for live in list(self.lives.values()) if not live.over and not live.ending]
        return [Running(live.grant, live.journal.meta.user, live.journal.meta.kind) for live in lives]

    def drain(self, why: str = "drain") -> None:
        """Park every session at its next boundary, so that it moves to another worker."""
        with self._wake:
            for live in self.lives.values():
                if not live.ending:
                    live.ending, live.why = "park", why
            self._wake.notify_all()

    async def stream(self, grant: Grant, window: int | None) -> AsyncGenerator[Event]:
        """Make the session's chunks for as long as this is iterated; events say what there is."""
        journal = Journal(self.store.folder(grant.session))
        live = Live(grant, journal, asyncio.Queue(), asyncio.get_running_loop(), window)
        live.committed = journal.count()
        with self._wake:
            live.ending = "park" if self.draining else ""  # a place that came free while all is parked is none
            self.lives[grant] = live
            self._wake.notify_all()
        try:
            while True:
                event = await live.events.get()
                yield event
                if event.kind == "end":
                    return
        finally:
            if not live.over:
                self._end(live, "park")

    async def interact(self, grant: Grant, change: Change) -> Ack:
        """Ask for a change at the next chunk boundary; it is in the journal when this returns.

        Raises:
            ChangeRefusedError: the session cannot show it.
        """
        live = self._live(grant)
        return await asyncio.to_thread(self._interact, live, change)

    async def control(self, grant: Grant, what: str) -> dict[str, Any]:
        """ "pause" or "continue" at the next boundary, "stop" before the next pass, "park" at the next boundary."""
        live = self._live(grant)
        live.touched = time.monotonic()
        if what == "pause":
            live.paused_at = live.paused_at or time.monotonic()
        elif what == "continue":
            live.paused_at = None
        elif what in ("stop", "park"):
            self._end(live, what)
        with self._wake:
            self._wake.notify_all()
        return {"chunk": live.index}

    async def advance(self, grant: Grant, shown: int) -> None:
        """The viewer now sees chunk `shown`; also a sign of life."""
        live = self.lives.get(grant)
        if live is None:
            return
        with self._wake:
            live.shown, live.touched = max(live.shown, shown), time.monotonic()
            self._wake.notify_all()

    def _live(self, grant: Grant) -> Live:
        live = self.lives.get(grant)
        if live is None or live.over:
            raise ChangeRefusedError("not_active", "the session is not being made here")
        return live

    def _end(self, live: Live, how: str) -> None:
        with self._wake:
            live.ending, session = live.ending or how, live.session
            if how == "stop" and session is not None:
                session.cancel()
            self._wake.notify_all()

    def _interact(self, live: Live, change: Change) -> Ack:
        live.opened.wait(120)
        live.touched = time.monotonic()
        try:
            return taken(live, change)
        finally:
            with self._wake:
                self._wake.notify_all()

    def _run_device(self) -> None:
        while not self._closed:
            with self._wake:
                self._watch_clocks()
                live = self._next()
                if live is None:
                    self._wake.wait(POLL_S)
                    continue
            live.served = self._turn = self._turn + 1
            try:
                self._serve(live)
            except Exception as error:  # a defect in one session must not end the others
                log.exception("session %s failed", live.grant.session)
                self._over(live, "failed", f"{type(error).__name__}", "internal_error")

    def _next(self) -> Live | None:
        """Whose turn it is: of those with something to do the one that was served longest ago."""
        waiting = [live for live in self.lives.values() if live.wants_the_device()]
        waiting = [live for live in waiting if live.session or not (before := self._before(live)) or before.settled]
        return min(waiting, key=lambda live: live.served) if waiting else None

    def _before(self, live: Live) -> Live | None:
        """An older connection's hold on the same session, in this worker."""
        return next(
            (one for one in self.lives.values() if one is not live and one.grant.session == live.grant.session), None
        )

    def _watch_clocks(self) -> None:
        now = time.monotonic()
        for live in self.lives.values():
            idle = live.waits_for_viewer and now - live.touched > self.idle_s
            long = live.paused_at is not None and now - live.paused_at > self.paused_s
            if (idle or long) and not live.ending:
                live.ending, live.why = "park", "idle" if idle else "paused"

    def _serve(self, live: Live) -> None:
        if live.session is None and live.ending:
            self._over(live, "stopped" if live.ending == "stop" else "parked", live.why)
        elif live.session is None:
            self._open(live)
        elif live.ending and not live.settled:
            return  # asked to end a moment ago: what was made is kept first
        elif live.ending == "stop":
            self._over(live, "stopped")
        elif live.exhausted and live.index == live.committed:
            self._over(live, "done")
        elif live.ending:
            self._park(live)
        else:
            self._step(live)

    def _open(self, live: Live) -> None:
        journal, begun = live.journal, time.monotonic()
        if before := self._before(live):
            self._take_over(live, before)
            return
        try:
            journal.take(live.grant.epoch, self.name)
            count = journal.count()
            if count:
                live.tell("replaying", chunks=count)
            session = rebuild(self.generator, journal)
            if journal.meta.clip and not count:
                take_in_clip(session, journal)
        except LeaseLostError as error:
            self._over(live, "lost", error.what, "lease_lost")
        except LongtakeError as error:
            code = "engines_differ" if isinstance(error, OtherEnginesError) else "cannot_open"
            self._over(live, "failed", error.what, code, error)
        except OSError as error:
            self._over(live, "parked", *store_full(error))
        else:
            with self._wake:
                live.session, live.committed, live.touched = session, journal.count(), time.monotonic()
            if count:
                self.meters.observe("replay_seconds", time.monotonic() - begun)
            live.opened.set()
            live.tell("opened", chunk=live.committed)
            about = {"chunk": live.committed, "prompt": shown(journal.meta.script[0][0])}
            log.info("opened", extra={"session": journal.id, "worker": self.name, **about})

    def _take_over(self, live: Live, before: Live) -> None:
        """Go on with what an older connection held: nothing has to be replayed."""
        try:
            live.journal.take(live.grant.epoch, self.name)
        except (LeaseLostError, OSError) as error:
            self._over(live, "lost", str(error), "lease_lost")
            return
        with self._wake:
            live.session, live.touched, before.session = before.session, time.monotonic(), None
            live.committed = live.journal.count()
        self._over(before, "lost", "taken over by another connection", "taken_over")
        if live.session is not None:
            live.opened.set()
            live.tell("opened", chunk=live.committed)

    def _step(self, live: Live) -> None:
        session = live.session
        assert session is not None
        begun = time.monotonic()
        try:
            chunk = next(session)
        except (CancelledError, StopIteration):
            return  # asked to stop: the next turn sees it
        except (LongtakeError, RuntimeError) as error:
            live.attempts += 1
            log.warning("session %s: chunk %d failed (%s)", live.grant.session, session.next_index, error)
            if live.attempts > 1:
                known = error if isinstance(error, LongtakeError) else None
                self._over(live, "failed", known.what if known else type(error).__name__, "chunk_failed", known)
            return
        live.attempts, live.made = 0, live.made + 1
        facts = {"position": session.position.as_json(), "began": begun}
        self._encoding.put((live, chunk, facts, self._states.state_after(session, chunk)))

    def _park(self, live: Live) -> None:
        """Keep the whole state, so that resuming is quick; the journal alone would do."""
        assert live.session is not None
        try:
            if is_worth_keeping(live.session, live.journal):
                keep_state(live.journal, live.session.snapshot())
        except Exception as error:  # the journal alone will do
            log.warning("session %s: its state is not kept: %s", live.grant.session, error)
        self._over(live, "parked", live.why)

    def _over(
        self, live: Live, state: str, reason: str = "", code: str = "", error: LongtakeError | None = None
    ) -> None:
        with self._wake:
            if live.over:
                return
            live.over = True
            self.lives.pop(live.grant, None)
            session, live.session = live.session, None
        if state == "failed" and self.generator.backend.failure:
            state = "parked"  # the worker failed, not the session: it goes on elsewhere, or with the next worker
        if session is not None:
            session.close(discard=True)
        try:
            if state in ("done", "stopped", "failed"):
                live.journal.require_lease()
                live.journal.finish(state, reason, code)
        except (LongtakeError, OSError) as problem:
            log.warning("session %s: its end is not kept: %s", live.grant.session, problem)
        live.opened.set()
        detail = {"got": error.got, "expected": error.expected, "fix": error.fix} if error else {}
        detail = {key: str(value) for key, value in detail.items() if value is not None}
        live.tell("end", state=state, reason=reason, code=code, detail=detail, chunks=live.committed)

    def _run_encoder(self) -> None:
        with on_own_stream(self.generator.backend.device, self):
            while (job := self._encoding.get()) is not None:
                self._encode(*job)
                del job

    def _encode(self, live: Live, chunk: Chunk, facts: dict[str, Any], state: Snapshot | None) -> None:
        try:
            if not live.over and is_decoded(live, chunk):
                self._keep(live, chunk, facts, state)
        except LeaseLostError as error:
            self._over(live, "lost", error.what, "lease_lost")
        except OSError as error:
            self._over(live, "parked", *store_full(error))
        except Exception as error:
            log.exception("session %s: chunk %d is lost", live.grant.session, chunk.index)
            known = error if isinstance(error, LongtakeError) else None
            self._over(live, "failed", known.what if known else type(error).__name__, "chunk_failed", known)
        live.handled += 1

    def _keep(self, live: Live, chunk: Chunk, facts: dict[str, Any], state: Snapshot | None) -> None:
        """Put a chunk into the journal, say that it is there."""
        journal = live.journal
        kept = keep_chunk(journal, self.generator.backend.preset, chunk, facts["position"])
        with self._wake:
            live.committed, live.failed_at, live.touched = chunk.index + 1, None, time.monotonic()
            self._wake.notify_all()
        seconds = time.monotonic() - facts["began"]
        live.tell("chunk", index=chunk.index, seconds=seconds, ms=kept.ms)
        self.meters.set("gpu_memory_bytes", float(self.generator.backend.peak_bytes()), kind="used")
        self.meters.chunk(kept.ms, kept.frames, seconds, journal.meta.fps, kept.bytes)
        log.info("chunk", extra={"session": journal.id, "chunk": chunk.index, "ms": kept.ms})
        if state is not None:
            self._states.keep(journal, state)

    def close(self, within: float) -> None:
        """Let the running chunk end and park every session, for `within` seconds at most; then end the threads."""
        self.draining = True
        self.drain("")
        until = time.monotonic() + within
        while self.lives and time.monotonic() < until:
            time.sleep(0.02)
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._encoding.put(None)
        for thread in self._threads:
            thread.join(2)
        self._states.close(2)
