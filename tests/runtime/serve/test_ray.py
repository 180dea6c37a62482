"""Over Ray Serve, on one machine: workers, the registry and the front are killed, and nothing is lost."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from serving import PROMPT, Live, Process, Served
from websockets.exceptions import ConnectionClosed, InvalidStatus

pytest.importorskip("ray", reason="Ray is not installed: pip install 'longtake[scale]'")
pytestmark = pytest.mark.timeout(1800)

CHUNKS = 14
WORKER, REGISTRY, FRONT = (
    "ServeReplica:longtake:Maker",
    "ray::DeskActor|longtake-desk",
    "ServeReplica:longtake:Entrance",
)


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
    """Watches one session to its end, whatever dies meanwhile; changes it now and then. pause_s: it looks at a chunk so long."""

    def __init__(self, host: str, seed: int, chunks: int = CHUNKS, pause_s: float = 0.0) -> None:
        super().__init__(daemon=True)
        self.host, self.seed, self.session, self.chunks, self.pause_s = host, seed, "", chunks, pause_s
        self.wanted: dict[str, dict[str, Any]] = {}
        self.seen: dict[int, bytes] = {}
        self.prompts: dict[int, str] = {}
        self.asked: dict[str, int] = {}
        self.sockets, self.refused, self.done, self.failure = 0, 0, False, ""

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


def watched(viewers: list[Viewer], kill: Any) -> list[Viewer]:
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


@pytest.mark.parametrize("answer", ["nothing", "an error", "the same", "a newer one"])
def test_a_front_without_a_registry_is_not_ill(answer: str) -> None:
    """Serve ends a front whose health check fails or hangs, and every socket with it."""
    from longtake.runtime.serve.contract import ServeError
    from longtake.runtime.serve.ray_app import Entrance

    closed: list[int] = []

    async def generation() -> int:
        if answer == "an error":
            raise ServeError("not_ready", "the registry is away", status=503)
        await asyncio.sleep(30 if answer == "nothing" else 0)
        return 2 if answer == "a newer one" else 1

    async def close(code: int) -> None:
        closed.append(code)

    desk, connection = SimpleNamespace(generation=generation), SimpleNamespace(close=close)
    front = SimpleNamespace(leaving=False, desk=desk, connections=[connection])
    asyncio.run(asyncio.wait_for(Entrance.check_health(SimpleNamespace(front=front, generation=1)), 5))
    assert closed == ([1001] if answer == "a newer one" else []) and front.leaving == bool(closed)


@pytest.mark.slow
def test_killed_workers_lose_nothing_and_no_socket(process: Process, start: Any) -> None:
    def kill() -> None:
        for _ in range(2):
            os.kill(random.Random(1).choice(processes(process, WORKER)), signal.SIGKILL)
            time.sleep(3)

    viewers = watched([Viewer(process.host, seed) for seed in (1, 2, 3, 4)], kill)
    check(start, viewers)
    assert [viewer.sockets for viewer in viewers] == [1] * 4
    moved = httpx.get(f"{process.url}/health", timeout=30)
    assert moved.status_code == 200


@pytest.mark.slow
def test_a_killed_registry_and_a_killed_front_lose_nothing(process: Process, start: Any) -> None:
    job = httpx.post(f"{process.url}/v1/videos", json={"prompt": PROMPT, "seed": 9, "seconds": "12"}, timeout=30).json()

    def kill() -> None:
        os.kill(processes(process, REGISTRY)[0], signal.SIGKILL)
        time.sleep(4)
        os.kill(processes(process, FRONT)[0], signal.SIGKILL)

    check(start, watched([Viewer(process.host, seed) for seed in (5, 6)], kill))
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
def test_twelve_kills(process: Process, start: Any, figures: dict[str, Any]) -> None:
    chance = random.Random(2)
    titles = [WORKER] * 10 + [REGISTRY, FRONT]
    chance.shuffle(titles)
    viewers = [Viewer(process.host, seed, chunks=60, pause_s=1.0) for seed in (11, 12, 13, 14)]
    running = []

    def kill() -> None:
        for title in titles:
            while not (found := processes(process, title)):
                time.sleep(0.1)
            running.append(sum(not viewer.done for viewer in viewers))
            os.kill(chance.choice(found), signal.SIGKILL)
            time.sleep(chance.uniform(2, 5))

    watched(viewers, kill)
    check(start, viewers)
    assert all(running), "a kill after the last film's end shows nothing"
    figures |= {
        "killed": {"workers": titles.count(WORKER), "registry": 1, "front": 1},
        "sessions_then_running": running,
    }
    figures |= {"chunks": [viewer.chunks for viewer in viewers], "changes": [len(viewer.asked) for viewer in viewers]}
    figures |= {"sockets": [viewer.sockets for viewer in viewers], "byte_identical": len(viewers)}
    figures |= {"handshakes_refused": [viewer.refused for viewer in viewers]}
