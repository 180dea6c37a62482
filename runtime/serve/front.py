"""What one front knows: the store, the way to the registry and to workers, who may come in, what is measured."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from longtake.formats.model_name import parts_of_full
from longtake.runtime.serve.auth import Door
from longtake.runtime.serve.contract import ServeError
from longtake.runtime.serve.grants import ChangeRefusedError, WorkerLostError, Workers
from longtake.runtime.serve.journal import Journal
from longtake.runtime.serve.limits import Limits
from longtake.runtime.serve.meters import Meters
from longtake.runtime.serve.store import Store
from longtake.runtime.serve.traces import Traces


@contextmanager
def writing() -> Iterator[None]:
    """Where a front writes to the store. Raises ServeError store_full if it cannot."""
    try:
        yield
    except OSError as error:
        words = f"the store cannot be written to: {error.strerror or error}"
        detail = {"fix": "free space, or make it writable, then ask again"}
        raise ServeError("store_full", words, status=503, retry_s=30, detail=detail) from None


@dataclass(eq=False)
class Front:
    """See above. desk: a `Desk`, or what speaks to one in another process. status: why nothing can be made yet, or ""."""

    store: Store
    desk: Any
    workers: Workers
    limits: Limits
    meters: Meters
    door: Door
    codec: str = "h264"
    status: str = ""
    traces: Traces = field(default_factory=Traces)
    leaving: bool = False
    jobs: Any = None
    connections: set[Any] = field(default_factory=set)
    _sockets: Counter[str] = field(default_factory=Counter)
    _about: dict[str, Any] | None = None
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    _measured: dict[str, float] = field(default_factory=dict)

    async def about(self) -> dict[str, Any]:
        """The model's description. Raises ServeError until a worker has told it."""
        if self._about is None:
            self._about = await self.desk.model()
        if self._about is None:
            raise ServeError("not_ready", self.status or "no worker is ready yet", status=503, retry_s=5)
        return self._about

    async def ready(self) -> str:
        """Why no chunk can be started now; "" if one can."""
        if self.leaving:
            return "the server is stopping"
        if self.status:
            return self.status
        return "" if await self.desk.has_worker() else "no worker is there"

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Hold a task until it is done, so that it is not collected before."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settle(self, seconds: float) -> None:
        """Wait for the tasks that are kept."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=seconds)

    def has_room_for_socket(self, user: str) -> bool:
        """Whether a user may open one more."""
        return self._sockets[user] < self.limits.user_sessions + self.limits.user_sockets

    def count_socket(self, user: str, change: int) -> None:
        self._sockets[user] += change
        self._sockets += Counter()  # forgets users without any
        self.meters.set("websockets", self._sockets.total())

    async def workers_call(self, call: Awaitable[Any], quiet: bool = False) -> Any:
        """What a worker answers. quiet: that the session is not there any more is no error.

        Raises:
            ServeError: it refuses. ConnectionError: it is gone.
        """
        try:
            return await call
        except ChangeRefusedError as error:
            if quiet:
                return None
            raise ServeError(error.code, error.message, detail=error.detail) from None
        except WorkerLostError as error:
            if quiet:
                return None
            raise ConnectionError(str(error)) from None

    def measured(self, first_chunk_s: float | None = None, chunk_s: float | None = None) -> dict[str, float]:
        """Running means of what sessions took here; empty before the first."""
        for name, value in (("first_chunk_s", first_chunk_s), ("chunk_s", chunk_s)):
            if value is not None:
                old = self._measured.get(name, value)
                self._measured[name] = round(0.7 * old + 0.3 * value, 3)
        return dict(self._measured)

    def estimates(self) -> dict[str, Any]:
        """What a viewer may expect: seconds to the first chunk and a chunk, and whether that keeps up; None if not measured."""
        chunk_s = self._measured.get("chunk_s")
        about = self._about or {}
        keeps_up = None if chunk_s is None else chunk_s <= about.get("chunk_s", 0)
        return {"first_chunk_s": self._measured.get("first_chunk_s"), "chunk_s": chunk_s, "realtime": keeps_up}

    def own(self, user: str, session: str, what: str = "session") -> Journal:
        """A user's own session, called `what` there. Raises ServeError not_found for anybody else's, too."""
        journal = self.store.find(session)
        if journal is None or journal.meta.user != user:
            raise ServeError("not_found", f"there is no such {what}", status=404, detail={"got": session[:60]})
        return journal

    def report(self, journal: Journal) -> dict[str, Any]:
        """What was made: frames, chunks, mean milliseconds by stage."""
        chunks = [about for about in journal.chunks() if about.get("media")]
        names = sorted({name for about in chunks for name in about["ms"]})
        stages = {name: round(sum(about["ms"].get(name, 0) for about in chunks) / len(chunks), 1) for name in names}
        meta, about = journal.meta, self._about or {}
        return {
            "kind": "serve",
            "preset": about.get("preset"),
            "recipe": parts_of_full(meta.model)[1],
            "backend": about.get("backend"),
            "gpu": about.get("gpu"),
            "resolution": f"{meta.width}x{meta.height}",
            "steps": meta.steps,
            "guidance": meta.guidance,
            "seed": meta.seed,
            "chunks": len(chunks),
            "stage_ms": stages,
            "frames": sum(about["frames"] for about in chunks),
            "seconds": round(time.time() - meta.created, 3),
        }

    async def forget(self, journal: Journal) -> None:
        """Remove a session; whoever makes it loses it first."""
        number = await self.desk.ask(journal.meta.user, journal.id, journal.meta.kind, journal.leased(), True)
        await self.desk.release(journal.id, number)
        await asyncio.to_thread(self.store.remove, journal.id)

    async def room_for(self, user: str) -> None:
        """Raise ServeError if a user's sessions take all the space that he may have."""
        used = await asyncio.to_thread(self.store.bytes_of, user)
        if used >= self.limits.user_bytes:
            detail = {
                "got": f"{used} bytes",
                "expected": f"below {self.limits.user_bytes}",
                "fix": "delete some videos",
            }
            raise ServeError("quota", "your videos take all your space", status=429, retry_s=60, detail=detail)
