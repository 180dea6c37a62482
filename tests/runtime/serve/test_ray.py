"""Over Ray Serve, on one machine: workers, the registry and the front are killed, and nothing is lost."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import PROMPT, Live, Process, Served
from websockets.exceptions import ConnectionClosed

pytest.importorskip("ray", reason="Ray is not installed: pip install 'longtake[scale]'")
pytestmark = pytest.mark.timeout(1800)

CHUNKS = 14


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("ray")
    one = Process(folder / "store", "toy", "ray", "workers=3", "slots=2", log=folder / "log")
    yield one
    assert one.kill(signal.SIGTERM) == 0


def processes(of: Process, pattern: str) -> list[int]:
    """Ids of our own cluster's processes by their titles."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            if re.search(pattern, title) and _is_of(int(entry.name), of.process.pid):
                found.append(int(entry.name))
        except (OSError, ValueError):
            continue
    return sorted(found)


def _is_of(pid: int, ancestor: int) -> bool:
    """Whether `ancestor` started it, or what started it."""
    while pid > 1:
        if pid == ancestor:
            return True
        pid = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    return False


class Viewer(threading.Thread):
    """Watches one session to its end, whatever dies meanwhile; changes it once."""

    def __init__(self, host: str, seed: int) -> None:
        super().__init__(daemon=True)
        self.host, self.seed, self.session = host, seed, ""
        self.seen: dict[int, bytes] = {}
        self.prompts: dict[int, str] = {}
        self.asked: dict[str, int] = {}
        self.sockets, self.done, self.failure = 0, False, ""

    def run(self) -> None:
        until = time.monotonic() + 400
        while not self.done and time.monotonic() < until and "worker_lost" not in self.failure:
            try:
                self._watch()
            except (ConnectionClosed, OSError, TimeoutError, EOFError) as error:
                self.failure = repr(error)
                time.sleep(0.5)
        assert self.done, self.failure

    def _watch(self) -> None:
        flow = {"mode": "ack", "window": 1}
        if not self.session:
            live = Live(self.host, prompt=PROMPT, chunks=CHUNKS, seed=self.seed, flow=flow)
        else:
            live = Live(self.host, type="session.resume", session_id=self.session, next_chunk=len(self.seen), flow=flow)
        self.sockets += 1
        if self.seen:
            live._ack(max(self.seen))
        while not self.done:
            message = live.next(90)
            if message["type"] == "video.start":
                self.session = message["session_id"]
            elif message["type"] == "video.chunk_metadata":
                self._saw(live, message)
            elif message["type"] == "session.interaction.queued":
                self.asked[message["event_id"]] = message["at_chunk"]
            elif message["type"] == "error" and message["code"] not in ("bad_ack",):
                self.failure = str(message)
                time.sleep(1)
                return
            self.done = message["type"] == "session.done"

    def _saw(self, live: Live, message: dict[str, Any]) -> None:
        index = message["generation_chunk_index"]
        self.seen |= live.fragments(index)
        self.prompts[index] = message["prompt"]
        live._ack(index)
        if index == 3 and "e1" not in self.asked:
            event = {"prompt": f"snow {self.seed}", "cut": True}
            live.send("session.interaction", interaction={"event_id": "e1", "event": event})


def undisturbed(start: Any, viewer: Viewer) -> dict[int, bytes]:
    """The same session in one process, with the change where the answer said that it lands."""
    server: Served = start()
    live = server.live(prompt=PROMPT, chunks=CHUNKS, seed=viewer.seed, flow={"mode": "ack", "window": 1})
    at = viewer.asked["e1"]
    for index in range(at - 1):
        live.chunk(index)
        live.send("session.ack", chunk=index)
    live.chunk(at - 1)
    assert live.interact("e1", prompt=f"snow {viewer.seed}", cut=True)["at_chunk"] == at
    live.until("session.done", ack=True)
    return live.fragments()


def watched(process: Process, seeds: list[int], kill: Any) -> list[Viewer]:
    viewers = [Viewer(process.host, seed) for seed in seeds]
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
        assert sorted(viewer.seen) == list(range(CHUNKS))
        assert viewer.prompts[viewer.asked["e1"]] == f"snow {viewer.seed}"
        assert viewer.seen == undisturbed(start, viewer)


@pytest.mark.slow
def test_killed_workers_lose_nothing_and_no_socket(process: Process, start: Any) -> None:
    def kill() -> None:
        for _ in range(2):
            os.kill(random.Random(1).choice(processes(process, "ServeReplica:longtake:Maker")), signal.SIGKILL)
            time.sleep(3)

    viewers = watched(process, [1, 2, 3, 4], kill)
    check(start, viewers)
    assert [viewer.sockets for viewer in viewers] == [1] * 4
    moved = httpx.get(f"{process.url}/health", timeout=30)
    assert moved.status_code == 200


@pytest.mark.slow
def test_a_killed_registry_and_a_killed_front_lose_nothing(process: Process, start: Any) -> None:
    job = httpx.post(f"{process.url}/v1/videos", json={"prompt": PROMPT, "seed": 9, "seconds": "12"}, timeout=30).json()

    def kill() -> None:
        os.kill(processes(process, r"ray::DeskActor|longtake-desk")[0], signal.SIGKILL)
        time.sleep(4)
        os.kill(processes(process, "ServeReplica:longtake:Entrance")[0], signal.SIGKILL)

    check(start, watched(process, [5, 6], kill))
    until, status = time.monotonic() + 200, {}
    while status.get("status") != "completed" and time.monotonic() < until:
        status = httpx.get(f"{process.url}/v1/videos/{job['id']}", timeout=30).json()
        time.sleep(0.5)
    film = httpx.get(f"{process.url}/v1/videos/{job['id']}/content", timeout=60).content
    server = start()
    whole = server.post("/v1/videos", json={"prompt": PROMPT, "seed": 9, "seconds": "12"}).json()
    server.wait_for(whole["id"])
    assert film == server.get(f"/v1/videos/{whole['id']}/content").content


@pytest.mark.long
def test_twelve_kills(process: Process, start: Any) -> None:
    chance = random.Random(2)
    titles = ["ServeReplica:longtake:Maker"] * 10 + ["ray::DeskActor|longtake-desk", "ServeReplica:longtake:Entrance"]
    chance.shuffle(titles)

    def kill() -> None:
        for title in titles:
            if found := processes(process, title):
                os.kill(chance.choice(found), signal.SIGKILL)
            time.sleep(chance.uniform(2, 5))

    check(start, watched(process, [11, 12, 13, 14], kill))
