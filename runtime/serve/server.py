"""One process that serves: a socket, the application, a worker once its model is open, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from longtake.errors import LongtakeError
from longtake.runtime.generator import Generator
from longtake.runtime.serve.app import app_from
from longtake.runtime.serve.auth import Door, tokens_from_file
from longtake.runtime.serve.describe import session_gb
from longtake.runtime.serve.desk import Desk
from longtake.runtime.serve.front import Front
from longtake.runtime.serve.grants import Workers
from longtake.runtime.serve.jobs import Jobs
from longtake.runtime.serve.limits import FRAME_BYTES, Limits
from longtake.runtime.serve.local import LocalWorkers
from longtake.runtime.serve.meters import Meters, prometheus
from longtake.runtime.serve.store import Store
from longtake.runtime.serve.traces import traces_to
from longtake.runtime.serve.worker import Worker

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "::1", "localhost")
PARK_S = 8.0  # in which everything is parked after a signal; then sockets and threads have their time
END_S = 12.0  # then the process ends, whatever a chunk or a thread still does: what was acknowledged is on disk
FAILURE_EVERY = 0.5  # seconds

Say = Callable[[str], None]
Open = Callable[[Say], Generator]  # opens the model, saying meanwhile what it does


@dataclass(frozen=True)
class Settings:
    """How one process serves. store: None for a temporary folder, whose sessions end with the process. traces: a collector's URL."""

    host: str = "127.0.0.1"
    port: int = 8000
    store: Path | None = None
    token_file: Path | None = None
    origins: tuple[str, ...] = ()
    slots: int = 1
    codec: str = "h264"
    traces: str | None = None
    limits: Limits = field(default_factory=Limits)

    def door(self, store: Store) -> Door:
        """Who comes in. Raises LongtakeError for an address that others reach without tokens."""
        if self.token_file is None and self.host not in LOOPBACK:
            fix = "pass --token-file FILE, with a line user:token each, or leave --host out"
            got = f"--host {self.host} without tokens"
            raise LongtakeError("whoever reaches this address could use the GPU", got=got, expected="tokens", fix=fix)
        tokens = None if self.token_file is None else tokens_from_file(self.token_file)
        return Door(store.secret(), tokens, (self.host,), self.origins)

    def shared_store(self) -> Store:
        """The store that several processes see. Raises LongtakeError if none is named, or it cannot be used."""
        if self.store is None:
            fix = "pass --store FOLDER, seen by all machines"
            raise LongtakeError("several processes need one store", got="no --store", fix=fix)
        return Store(self.store)

    def front(self, store: Store, desk: Any, workers: Workers, meters: Meters, status: str = "") -> Front:
        """A front over a registry and workers, here or elsewhere; it says `status` until that is empty."""
        traces = traces_to(self.traces)
        return Front(store, desk, workers, self.limits, meters, self.door(store), self.codec, status, traces)

    def worker(self, generator: Generator, store: Store, name: str, meters: Meters) -> Worker:
        """A worker that holds the model."""
        return Worker(generator, store, name, meters, idle_s=self.limits.idle_s, paused_s=self.limits.paused_s)


@dataclass(frozen=True)
class Size:
    """Of a cluster: workers at least and at most, fronts, and the GPUs of each worker."""

    least: int = 1
    most: int = 1
    fronts: int = 1
    gpus: int = 0


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises LongtakeError naming the next free port if `port` is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
        opened.listen(512)
    except OSError as error:
        opened.close()
        if error.errno != errno.EADDRINUSE:
            fix = "check --host and --port"
            raise LongtakeError(f"cannot listen on {host}:{port}", got=error.strerror, fix=fix) from None
        fix = f"pass --port {free_port(host, port + 1)}"
        raise LongtakeError(
            f"port {port} is taken", got=f"{host}:{port} in use", expected="a free port", fix=fix
        ) from None
    opened.setblocking(False)
    return opened


def free_port(host: str, start: int) -> int:
    """The first port from `start` on that nobody uses; 0 if there is none near."""
    for port in range(start, min(start + 100, 65536)):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
            tried.bind((host, port))
            return port
    return 0


class _Server(uvicorn.Server):
    """Signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_server(app: FastAPI) -> uvicorn.Server:
    """uvicorn as the design wants it: video does not compress, and without deflate a slow reader is felt soon."""
    return _Server(
        uvicorn.Config(
            app,
            ws="websockets-sansio",
            ws_per_message_deflate=False,
            ws_max_size=FRAME_BYTES,
            ws_ping_interval=20.0,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=2,
        )
    )


def slots_of(generator: Generator, asked: int) -> int:
    """Sessions at a time: as many as asked for, on a GPU no more than fit beside the weights."""
    need = session_gb(generator)
    if need is None or generator.backend.device.type != "cuda":
        return asked
    free, _ = torch.cuda.mem_get_info(generator.backend.device)
    return max(1, min(asked, int(free / 1e9 / max(need, 1e-3))))


def serve(settings: Settings, open_model: Open, announce: Say) -> int:
    """Serve until a signal comes; returns the exit code.

    Raises:
        LongtakeError: the port is taken, the store cannot be used, the model cannot be opened, or it runs no more.
    """
    with contextlib.ExitStack() as stack:
        root = settings.store
        if root is None:
            root = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="longtake-serve-", ignore_cleanup_errors=True))
            )
            log.warning("no --store: sessions end with this process")
        store = Store(root)
        settings.door(store)  # refused before anything listens
        opened = stack.enter_context(contextlib.closing(listening(settings.host, settings.port)))
        late = threading.Timer(END_S, _leave, (None if settings.store else root,))
        late.daemon = True
        stack.callback(late.cancel)
        return asyncio.run(served(settings, store, opened, open_model, announce, None, late.start))


def _leave(temporary: Path | None) -> None:
    """End the process now; a store of its own goes with it."""
    if temporary is not None:
        shutil.rmtree(temporary, ignore_errors=True)
    os._exit(0)


async def served(
    settings: Settings,
    store: Store,
    opened: socket.socket,
    open_model: Open,
    announce: Say,
    ending: asyncio.Event | None,
    signalled: Callable[[], None] = lambda: None,
) -> int:
    """See `serve`. ending: set by whoever wants it to end; by signals if None: `signalled` is called at the first one."""
    meters = prometheus()
    desk, workers = Desk(settings.limits, meters), LocalWorkers()
    front = settings.front(store, desk, workers, meters, "the model is being opened")
    jobs = front.jobs = Jobs(front)
    server = http_server(app_from(front))
    if ending is None:
        _on_signals(ending := asyncio.Event(), signalled)
    serving = asyncio.create_task(server.serve([opened]))
    opening = asyncio.create_task(_open(settings, front, workers, open_model))
    failure: BaseException | None = None
    try:
        stop = asyncio.create_task(ending.wait())
        await asyncio.wait({opening, stop, serving}, return_when=asyncio.FIRST_COMPLETED)
        if opening.done() and not (failure := opening.exception()):
            host, port = opened.getsockname()[:2]
            announce(f"http://{f'[{host}]' if ':' in host else host}:{port}/")
            await jobs.begin()
            failing = asyncio.create_task(_failure(workers))
            await asyncio.wait({stop, serving, failing}, return_when=asyncio.FIRST_COMPLETED)
            failure = failing.result() if failing.done() else None
            failing.cancel()
    finally:
        await _end(front, workers, jobs)
        server.should_exit = True
        await serving
        if not opening.done():  # a thread that builds cannot be ended: nothing that it makes is under a final name yet
            os._exit(0)
    if failure is not None:
        raise failure
    return 0


async def _open(settings: Settings, front: Front, workers: LocalWorkers, open_model: Open) -> None:
    def say(words: str) -> None:
        front.status = words

    generator = await asyncio.to_thread(open_model, say)
    name = f"local-{os.getpid()}"
    worker = settings.worker(generator, front.store, name, front.meters)
    workers.worker = worker
    about = await asyncio.to_thread(worker.describe)
    await front.desk.register(name, slots_of(generator, settings.slots), 0, about)
    front.status = ""


async def _failure(workers: LocalWorkers) -> LongtakeError:
    """Wait for what ends the worker: a backend that runs no more networks."""
    while workers.worker is None or (failure := workers.worker.generator.backend.failure) is None:
        await asyncio.sleep(FAILURE_EVERY)
    return failure


async def _end(front: Front, workers: LocalWorkers, jobs: Jobs) -> None:
    """No new sessions; the running chunk ends, everything is parked, sockets are told to come back later."""
    front.leaving = True
    jobs.end()
    if workers.worker is not None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(workers.worker.close, PARK_S), PARK_S + 1)
    told = (asyncio.wait_for(connection.close(1001), 1) for connection in list(front.connections))
    await asyncio.gather(*told, return_exceptions=True)
    await front.settle(1.0)
    if workers.worker is not None:
        workers.worker.generator.close()


def _on_signals(ending: asyncio.Event, signalled: Callable[[], None]) -> None:
    """The first signal ends in order, the second at once: what was acknowledged is on disk."""
    if threading.current_thread() is not threading.main_thread():
        return
    loop = asyncio.get_running_loop()

    def on(number: int) -> None:
        if ending.is_set():
            os._exit(128 + number)
        ending.set()
        signalled()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, on, number)
