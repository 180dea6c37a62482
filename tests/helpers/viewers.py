"""Viewers of a cluster, and what they must have seen, whatever died meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from serving import PROMPT, Live, Served
from websockets.exceptions import ConnectionClosed, InvalidStatus


class Viewer(threading.Thread):
    """Watches one session to its end, whatever dies meanwhile; changes it now and then. pause_s: it looks at a chunk so long."""

    def __init__(self, host: str, seed: int, chunks: int = 14, pause_s: float = 0.0) -> None:
        super().__init__(daemon=True)
        self.host, self.seed, self.session, self.chunks, self.pause_s = host, seed, "", chunks, pause_s
        self.wanted: dict[str, dict[str, Any]] = {}
        self.seen: dict[int, bytes] = {}
        self.prompts: dict[int, str] = {}
        self.asked: dict[str, int] = {}
        self.sockets = self.refused = self.moved = 0
        self.done, self.failure = False, ""

    def run(self) -> None:
        until = time.monotonic() + 400
        while not self.done and time.monotonic() < until and "worker_lost" not in self.failure:
            try:
                self._watch()
            except InvalidStatus as error:  # Ray's proxy asked a front that died at that moment
                assert error.response.status_code >= 500
                self.refused += 1
                time.sleep(0.5)
            except (ConnectionClosed, OSError, TimeoutError, EOFError) as error:
                self.failure = repr(error)
                time.sleep(0.5)
        assert self.done, self.failure

    def _watch(self) -> None:
        flow = {"mode": "ack", "window": 1}
        if not self.session:
            live = Live(self.host, prompt=PROMPT, chunks=self.chunks, seed=self.seed, flow=flow)
        else:
            live = Live(self.host, type="session.resume", session_id=self.session, next_chunk=len(self.seen), flow=flow)
        self.sockets += 1
        if self.seen:
            live._ack(max(self.seen))
        while not self.done:
            message = live.next(90)
            if message["type"] == "video.start":
                self.session = message["session_id"]
                for ident in self.wanted.keys() - self.asked.keys():
                    self._change(live, ident)
            elif message["type"] == "video.chunk_metadata":
                self._saw(live, message)
            elif message["type"] == "session.interaction.queued":
                self.asked[message["event_id"]] = message["at_chunk"]
            elif message["type"] == "error" and message["code"] not in ("bad_ack",):
                self.failure = str(message)
                time.sleep(1)
                return
            self.moved += message["type"] == "session.moved"
            self.done = message["type"] == "session.done"

    def _saw(self, live: Live, message: dict[str, Any]) -> None:
        index = message["generation_chunk_index"]
        self.seen |= live.fragments(index)
        self.prompts[index] = message["prompt"]
        time.sleep(self.pause_s)
        live._ack(index)
        if index % 10 == 3 and index + 3 < self.chunks:
            self.wanted[f"e{index}"] = {"prompt": f"snow {self.seed} {index}", "cut": index % 20 == 3}
            self._change(live, f"e{index}")

    def _change(self, live: Live, ident: str) -> None:
        live.send("session.interaction", interaction={"event_id": ident, "event": self.wanted[ident]})


def undisturbed(start: Any, viewer: Viewer) -> dict[int, bytes]:
    """The same session in one process, with each change where the answer said that it lands."""
    server: Served = start()
    live = server.live(prompt=PROMPT, chunks=viewer.chunks, seed=viewer.seed, flow={"mode": "ack", "window": 1})
    landing = {at: ident for ident, at in viewer.asked.items()}
    for index in range(viewer.chunks):
        live.chunk(index)
        if ident := landing.get(index + 1):
            assert live.interact(ident, **viewer.wanted[ident])["at_chunk"] == index + 1
        live._ack(index)
    live.until("session.done")
    return live.fragments()


def watched(viewers: list[Viewer], kill: Callable[[], None]) -> list[Viewer]:
    for viewer in viewers:
        viewer.start()
    while not all(viewer.seen for viewer in viewers):
        time.sleep(0.2)
    kill()
    for viewer in viewers:
        viewer.join(420)
        assert viewer.done, viewer.failure
    return viewers


def check(start: Any, viewers: list[Viewer]) -> None:
    for viewer in viewers:
        assert sorted(viewer.seen) == list(range(viewer.chunks))
        assert viewer.asked and viewer.asked.keys() == viewer.wanted.keys()
        assert all(viewer.prompts[at] == viewer.wanted[ident]["prompt"] for ident, at in viewer.asked.items())
        assert viewer.seen == undisturbed(start, viewer)
