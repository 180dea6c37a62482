"""One session in a worker: what it may do next."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from longtake.errors import LongtakeError
from longtake.runtime.serve.grants import Event, Grant
from longtake.runtime.serve.journal import Journal
from longtake.runtime.session import Session

AHEAD = 2  # chunks that are not yet in the journal while the next is made: one being decoded, one being encoded


def store_full(error: OSError) -> tuple[str, str, LongtakeError]:
    """Why a session is put aside that cannot be kept: in words, as a code, and what to do."""
    known = LongtakeError(f"the store cannot be used: {error.strerror}", fix="free space, then resume")
    return known.what, "store_full", known


@dataclass
class Live:
    """One session in this worker. window: chunks ahead of `shown`; None: no limit."""

    grant: Grant
    journal: Journal
    events: asyncio.Queue[Event]
    loop: asyncio.AbstractEventLoop
    window: int | None
    shown: int = -1
    session: Session | None = None
    committed: int = 0
    paused_at: float | None = None
    ending: str = ""  # "stop", "park": at the next boundary
    why: str = ""
    attempts: int = 0
    made: int = 0  # chunks, counted by the thread that makes them
    handled: int = 0  # those of them that were kept, or failed to be, counted by the thread that keeps them
    failed_at: int | None = None
    touched: float = field(default_factory=time.monotonic)
    served: int = 0
    opened: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)  # of live changes
    over: bool = False

    def tell(self, kind: str, **facts: Any) -> None:
        """Send an event to whoever streams it, from any thread."""
        event = Event(kind, facts)
        with contextlib.suppress(RuntimeError):  # a loop that is closed has nobody to tell
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    @property
    def index(self) -> int:
        """The next chunk to be made."""
        session = self.session  # read once: another thread may end it
        return session.next_index if session else self.committed

    @property
    def exhausted(self) -> bool:
        """Whether its script has ended."""
        session = self.session
        return session is not None and not session.remaining and not session.options.endless

    @property
    def settled(self) -> bool:
        """Whether everything that was made is in the journal."""
        return self.session is None or self.index == self.committed

    def may_begin(self) -> bool:
        """Whether its next chunk may be begun now."""
        if self.session is None or self.over or self.ending or self.paused_at is not None or self.exhausted:
            return False
        if self.attempts and self.made != self.handled:
            return False  # if it fails again, the session is over: nobody may write into it then
        within = self.window is None or self.index - self.window <= self.shown
        return within and self.index - self.committed <= AHEAD

    @property
    def waits_for_viewer(self) -> bool:
        """Whether it goes on as soon as the viewer has seen more. A viewer who waits, for a chunk or for the device, is not waited for."""
        watched = self.session is not None and self.window is not None and self.paused_at is None
        return watched and self.settled and not self.may_begin()

    def wants_the_device(self) -> bool:
        """Whether the device thread has something to do for it."""
        if self.over:
            return False
        return self.session is None or self.may_begin() or (self.settled and bool(self.ending or self.exhausted))
