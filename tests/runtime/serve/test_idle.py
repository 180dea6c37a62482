"""Who is parked as idle, and who is not: a clock is moved at the one moment that counts, so that no machine is too slow."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from serving import PROMPT, Live, Served

from longtake.runtime.serve.grants import Grant
from longtake.runtime.serve.limits import Limits
from longtake.runtime.serve.live import Live as Held
from longtake.runtime.serve.server import Settings
from longtake.runtime.serve.worker import Worker

FLOW = {"mode": "ack", "window": 1}


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[Worker]:
    """The workers of servers that are started from now on."""
    made, real = list[Worker](), Settings.worker

    def worker(*facts: Any) -> Worker:
        made.append(real(*facts))
        return made[-1]

    monkeypatch.setattr(Settings, "worker", worker)
    return made


def long_ago(worker: Worker) -> None:
    """Nobody has been heard of for so long that each would be idle."""
    for live in list(worker.lives.values()):
        live.touched -= 2 * worker.idle_s


def test_a_viewer_who_waits_for_slow_chunks_is_not_idle(start: Any, workers: list[Worker]) -> None:
    server: Served = start()
    server.backends[-1].hook = lambda call: long_ago(workers[-1])
    server.live(prompt=PROMPT, chunks=3, flow=FLOW).until("session.done", ack=True)


def test_a_viewer_who_waits_for_the_device_is_not_idle(start: Any, workers: list[Worker]) -> None:
    server: Served = start(slots=2, limits=Limits(user_sessions=8, grace_s=0.5))
    told = server.live(prompt=PROMPT, endless=True, flow=FLOW)
    session = told.until("video.start")["session_id"]
    told.chunk(0, ack=True)
    told.chunk(1)
    told.close()
    until = time.monotonic() + 60
    while workers[-1].lives:
        assert time.monotonic() < until
        time.sleep(0.02)
    making, waiting = threading.Event(), threading.Event()

    def hook(_: int) -> None:
        making.set()
        assert waiting.wait(60)
        long_ago(workers[-1])

    server.backends[-1].hook = hook
    other = Live(server.host, prompt=PROMPT, chunks=1, flow=FLOW)
    assert making.wait(60)
    again = Live(server.host, type="session.resume", session_id=session, next_chunk=2, flow=FLOW)
    while len(workers[-1].lives) < 2:
        assert time.monotonic() < until
        time.sleep(0.02)
    waiting.set()
    other.until("session.done")
    again.until("video.start")
    again._ack(1)
    again.chunk(2)


@pytest.mark.parametrize("taken_over", [False, True])
def test_who_has_waited_is_not_idle_the_moment_his_session_is_there(
    start: Any, workers: list[Worker], taken_over: bool
) -> None:
    server: Served = start()
    live = server.live(prompt=PROMPT, endless=True, flow=FLOW)
    journal = server.store.journal(live.until("video.start")["session_id"])
    live.chunk(0, ack=True)
    live.chunk(1)
    worker = workers[-1]
    if not taken_over:
        live.close()
        until = time.monotonic() + 60
        while worker.lives:
            assert time.monotonic() < until
            time.sleep(0.02)
    with worker._wake:  # the device's thread does nothing meanwhile
        grant = Grant(journal.id, worker.name, journal.leased() + 1)
        held = Held(grant, journal, asyncio.Queue(), asyncio.new_event_loop(), 1)
        worker.lives[grant] = held
        long_ago(worker)
        worker._open(held)
        worker._watch_clocks()
        assert held.session is not None and held.settled and not held.may_begin() and not held.ending
        long_ago(worker)
        worker._watch_clocks()
        assert held.why == "idle"
