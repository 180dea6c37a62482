"""Slow viewers, long runs: what is held stays bounded."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import socket
import threading
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

import pytest
from serving import PROMPT, Live, Served, walk
from websockets.exceptions import ConnectionClosed

from longtake.runtime.serve.limits import Limits


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_viewer_who_does_not_read_costs_nothing(start: Any) -> None:
    """In free mode everything is made, and waits on disk: what is held for one who reads nothing is what a socket holds."""
    server: Served = start(limits=Limits(user_sessions=4))
    live = server.live(prompt=PROMPT, chunks=40)
    session = live.until("video.start")["session_id"]
    live.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    held = resident()
    until = time.monotonic() + 60
    while server.store.journal(session).count() < 40 and time.monotonic() < until:
        time.sleep(0.1)
    assert resident() - held < 60e6
    live.until("session.done")
    assert len(live.media) == 40


@pytest.mark.parametrize("pause_s", [0.4, pytest.param(10.0, marks=pytest.mark.slow)])
def test_a_slow_viewer_is_waited_for_and_changes_come_soon(start: Any, pause_s: float) -> None:
    server: Served = start()
    live = server.live(prompt=PROMPT, endless=True, flow={"mode": "ack", "window": 2})
    walk(server, live, window=2, chunks=3, pause_s=pause_s)
    at = live.interact("e", prompt="snow")["at_chunk"]
    assert at - 2 <= 3  # window + 1 after what is shown
    live.send("session.stop")
    live.until("session.done", ack=True)


class Aimless(threading.Thread):
    """Watches, changes, cuts, goes away, comes back, stops, begins anew, all at random."""

    def __init__(self, server: Served, seed: int, until: float) -> None:
        super().__init__(daemon=True)
        self.server, self.chance, self.until, self.chunks = server, random.Random(seed), until, 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        session = None
        try:
            while time.monotonic() < self.until:
                with contextlib.suppress(ConnectionClosed, TimeoutError, OSError, EOFError):
                    session = self._watch(session)
        except BaseException as error:
            self.failure = error

    def _watch(self, session: str | None) -> str | None:
        flow = {"mode": "ack", "window": 2}
        first: dict[str, Any] = {"prompt": PROMPT, "endless": True, "flow": flow}
        if session:
            first = {"type": "session.resume", "session_id": session, "next_chunk": 0, "flow": flow}
        live = Live(self.server.host, **first)
        while time.monotonic() < self.until:
            message = live.next(30)
            kind = message["type"]
            if kind == "video.start":
                session = message["session_id"]
            elif kind == "video.chunk_metadata":
                self.chunks += 1
                live.media.clear()
                live.messages.clear()
                live.send("session.ack", chunk=message["generation_chunk_index"])
                what = self.chance.randrange(30)
                if what < 3:
                    event = {"prompt": f"snow {what}", "cut": what == 0}
                    live.send("session.interaction", interaction={"event": event})
                elif what == 3:
                    live.drop()
                    return session
                elif what == 4 or message["generation_chunk_index"] > 60:
                    live.send("session.stop")
            elif kind == "session.done":
                live.close()
                return None
            elif kind == "error":
                live.close()
                return None
        live.close()
        return None


def own_threads() -> Counter[str]:
    """Threads by name, but for those of the client library and of the pool, whose number is bounded."""
    names = Counter(re.sub(r"[\d_]+.*", "", thread.name) for thread in threading.enumerate())
    return Counter({name: count for name, count in names.items() if name not in ("Thread-", "asyncio")})


def open_files() -> list[str]:
    """What this process holds open: paths, or "socket:[…]"."""
    held = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists them
            held.append(os.readlink(f"/proc/self/fd/{number}"))
    return sorted(held)


def soak(start: Any, seconds: float, figures: dict[str, Any]) -> None:
    server: Served = start(slots=3, limits=Limits(user_sessions=9, grace_s=0.5, parked_s=30))
    for toy in server.backends:  # its notes of every call are no growth of the server: 10 KB a chunk
        toy.calls, toy.states = deque(maxlen=1), deque(maxlen=1)
    warm = [Aimless(server, seed, time.monotonic() + seconds / 5) for seed in range(3)]
    for one in warm:
        one.start()
    for one in warm:
        one.join()
    until = time.monotonic() + 180
    while time.monotonic() < until and own_threads()["longtake-decode"]:  # of sessions that are being parked
        time.sleep(0.1)
    held, threads, files = resident(), own_threads(), open_files()
    viewers = [Aimless(server, seed, time.monotonic() + seconds * 4 / 5) for seed in range(10, 13)]
    for viewer in viewers:
        viewer.start()
    for viewer in viewers:
        viewer.join()
        assert viewer.failure is None and viewer.chunks > seconds / 10
    until = time.monotonic() + 180  # the server gives up on a viewer who vanished after two missed pings, 40 s
    while time.monotonic() < until and (own_threads() - threads or len(open_files()) > len(files) + 8):
        time.sleep(0.1)
    grown, more = resident() - held, Counter(now := open_files()) - Counter(files)
    figures |= {"seconds": seconds, "viewers": len(viewers), "chunks": sum(viewer.chunks for viewer in viewers)}
    figures |= {"growth_mb": round(grown / 1e6, 1), "of_mb": round(held / 1e6, 1), "files_more": len(now) - len(files)}
    assert grown < 100e6
    assert not own_threads() - threads
    assert len(now) <= len(files) + 8, dict(more)
    last = server.live(prompt=PROMPT, chunks=2)
    last.until("session.done")


@pytest.mark.slow
def test_90_seconds_of_soak(start: Any, figures: dict[str, Any]) -> None:
    soak(start, 90, figures)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_20_minutes_of_soak(start: Any, figures: dict[str, Any]) -> None:
    soak(start, 1200, figures)
