"""A server for tests: in a thread of this process, or in a process of its own; and a small live client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from longtake.paths import REPOSITORY
from longtake.runtime.generator import Generator
from longtake.runtime.serve.server import Settings, listening, served
from longtake.runtime.serve.store import Store

# Titles of Ray's processes
WORKER, REGISTRY, FRONT = (
    "ServeReplica:longtake:Maker",
    "ray::DeskActor|longtake-desk",
    "ServeReplica:longtake:Entrance",
)
STUDENT = REPOSITORY / "training" / "checkpoints" / "tiny-4step"
PROMPT = "a green seven drifts left over a dark blue background, soft light"


def tiny() -> Generator:
    """The shipped student, by PyTorch on one thread."""
    import torch

    torch.set_num_threads(1)
    return Generator.from_checkpoint(STUDENT)


class Served:
    """A server in a thread. `make` opens the model."""

    def __init__(self, make: Callable[[], Generator], store: Path, settings: Settings | None = None) -> None:
        self.settings = settings or Settings(store=store)
        self.store, self.backends = Store(store), list[Any]()
        self.socket = listening("127.0.0.1", 0)
        self.host = f"127.0.0.1:{self.socket.getsockname()[1]}"
        self.url = f"http://{self.host}"
        self._ready, self._make = threading.Event(), make
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(60) and self.failure is None, self.failure

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self.failure = error
            self._ready.set()

    async def _main(self) -> None:
        self._ending, self._loop = asyncio.Event(), asyncio.get_running_loop()
        await served(
            self.settings,
            self.store,
            self.socket,
            lambda say: self._make(),
            lambda _: self._ready.set(),
            self._ending,
        )

    def end(self) -> None:
        """Ask it to end, and wait."""
        self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join(30)
        assert not self._thread.is_alive()

    def live(self, **first: Any) -> Live:
        return Live(self.host, **first)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **more)

    def post(self, path: str, **more: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **more)

    def client_delete(self, video: str) -> bool:
        return bool(httpx.delete(f"{self.url}/v1/videos/{video}", timeout=60).json()["deleted"])

    def wait_for(self, video: str, status: str = "completed", seconds: float = 120) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while (found := self.get(f"/v1/videos/{video}").json())["status"] != status:
            assert time.monotonic() < until and found["status"] != "failed", found
            time.sleep(0.05)
        return found


class Live:
    """A live session by the messages of the contract. first: fields of the first message; type "session.start" if none."""

    def __init__(self, host: str, /, headers: dict[str, str] | None = None, query: str = "", **first: Any) -> None:
        url = f"ws://{host}/v1/realtime/video{query}"
        others = dict(headers or {})
        place, port = host.rsplit(":", 1)
        wire = socket.create_connection((place, int(port)))
        url = url.replace(host, others.pop("Host", host))  # one such header: a second one is no HTTP
        self.socket: ClientConnection = connect(
            url, sock=wire, max_size=None, compression=None, additional_headers=others, legacy=True
        )
        self.messages: list[dict[str, Any]] = []
        self.media: dict[int, bytes] = {}
        self.at: dict[int, float] = {}
        self.begun = time.monotonic()
        if first:
            self.send(first.pop("type", "session.start"), **first)

    def send(self, kind: str, /, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def next(self, timeout: float = 60) -> dict[str, Any]:
        """The next message; the media that it announces is kept."""
        message: dict[str, Any] = json.loads(self.socket.recv(timeout))
        self.messages.append(message)
        if message["type"] == "video.chunk_metadata":
            data = self.socket.recv(timeout)
            assert isinstance(data, bytes) and len(data) == message["byte_length"]
            self.media[message["generation_chunk_index"]] = data
            self.at[message["generation_chunk_index"]] = time.monotonic() - self.begun
        return message

    def until(self, kind: str, ack: bool = False, **wanted: Any) -> dict[str, Any]:
        """Read until a message of a kind with such fields. ack: acknowledge every chunk, those that are here included."""
        if ack and self.media:
            self._ack(max(self.media))
        while True:
            message = self.next()
            if message["type"] == "video.chunk_metadata" and ack:
                self._ack(message["generation_chunk_index"])
            if message["type"] == kind and all(message.get(key) == value for key, value in wanted.items()):
                return message
            assert message["type"] != "error" or kind == "error", message

    def _ack(self, chunk: int) -> None:
        with contextlib.suppress(ConnectionClosed):  # the last chunk's may come when all is over
            self.send("session.ack", chunk=chunk)

    def chunk(self, index: int, ack: bool = False) -> dict[str, Any]:
        return self.until("video.chunk_metadata", ack, generation_chunk_index=index)

    def interact(self, event_id: str, **event: Any) -> dict[str, Any]:
        self.send("session.interaction", interaction={"event_id": event_id, "event": event})
        return self.until("session.interaction.queued", event_id=event_id)

    def closed(self, timeout: float = 10) -> int | None:
        """The code with which the server closes the socket."""
        try:
            while True:
                self.socket.recv(timeout)
        except TimeoutError:
            raise
        except Exception:
            return self.socket.close_code

    def close(self) -> None:
        self.socket.close()

    def drop(self) -> None:
        """Vanish, as a laptop does whose lid is closed."""
        self.socket.socket.close()

    def fragments(self, start: int = 0) -> dict[int, bytes]:
        """Media from chunk `start` on, without the init segment that the first of a connection has before it."""
        return {index: data[data.index(b"moof") - 4 :] for index, data in self.media.items() if index >= start}

    def bytes(self) -> bytes:
        return b"".join(self.media[index] for index in sorted(self.media))


def parked(server: Served, session: str) -> None:
    """Wait until a session that nobody watches has given its place back: its whole state is kept then."""
    until = time.monotonic() + 30
    while not server.store.journal(session).snapshots():
        assert time.monotonic() < until
        time.sleep(0.05)


def walk(server: Served, live: Live, window: int, chunks: int, pause_s: float) -> None:
    """Look at `chunks` chunks, slowly: nothing is made further ahead than the window."""
    journal = server.store.journal(live.until("video.start")["session_id"])
    live.chunk(window - 1)
    for shown in range(chunks):
        time.sleep(pause_s)
        assert journal.count() == shown + window
        live.send("session.ack", chunk=shown)
        live.chunk(shown + window)


class Process:
    """`longtake serve`'s server in a process of its own, over the student or the toy; it can be killed."""

    def __init__(self, store: Path, *options: str, log: Path | None = None) -> None:
        command = [sys.executable, str(Path(__file__).with_name("serving_process.py")), str(store), *options]
        paths = [str(REPOSITORY), str(Path(__file__).parent)]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        errors = open(log, "ab") if log else None
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environ)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip().rstrip("/")
        assert self.url.startswith("http"), "it did not start"
        self.host = self.url.removeprefix("http://")

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send a signal, and wait for the end; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(120)

    def children(self, title: str) -> list[int]:
        """See `children_of`."""
        return children_of(self.process.pid, title)


def children_of(parent: int, title: str) -> list[int]:
    """Ids of the processes that a process started, or what it started, by a pattern of their titles."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            if re.search(title, words) and _is_of(int(entry.name), parent):
                found.append(int(entry.name))
    return sorted(found)


def _is_of(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        pid = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    return False
