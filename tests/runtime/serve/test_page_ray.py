"""The page plays on while workers under it are killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import BUFFERED, CHROMIUM, NO_CHROMIUM, blocks, chromium, session_of, shown, told, until
from serving import PROMPT, WORKER, Process, Served

from longtake.runtime.serve.journal import LEASE
from longtake.runtime.serve.store import Store

pytest.importorskip("ray", reason="Ray is not installed: pip install 'longtake[scale]'")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'longtake[dev]'")
pytestmark = [pytest.mark.timeout(900), pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)]


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    one = Process(tmp_path / "ray", "toy", "ray", "workers=2", log=tmp_path / "log")
    yield one
    assert one.kill(signal.SIGTERM) == 0


def maker(process: Process, store: Store, session: str) -> int:
    """The process that has the session now: it writes the log of the replica that the lease names."""
    name = json.loads((store.folder(session) / LEASE).read_text())["worker"].rpartition("#")[2]
    for pid in process.children(WORKER):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if name in os.readlink(f"/proc/{pid}/fd/{number}"):
                    return pid
    raise AssertionError(f"nobody is {name}")


def plays_on(process: Process, start: Any, store: Store, kills: int) -> dict[str, Any]:
    with chromium() as opened:
        page = opened.new_page()
        sockets, heard = [], list[str]()
        page.on(
            "websocket", lambda one: (sockets.append(one), one.on("framereceived", lambda f: heard.append(str(f)[:60])))
        )
        page.goto(process.url)
        until(page, "!document.querySelector('#start').disabled && document.querySelector('#model').textContent")
        page.evaluate("() => { window.broken = 0; video.addEventListener('error', () => window.broken++) }")
        page.fill("#prompt", PROMPT)
        page.click("#start")
        for number in range(kills):
            until(page, shown(2 * number + 1), 400)  # a worker that was killed may have been the last one that was up
            os.kill(maker(process, store, session_of(page)), signal.SIGKILL)
            end = time.monotonic() + 120
            while sum("session.moved" in one for one in heard) <= number and time.monotonic() < end:
                page.wait_for_timeout(50)
        until(page, shown(2 * kills + 3), 400)
        page.click("#stop")
        until(page, "document.querySelector('#state').dataset.state == 'stopped'")
        made = told(process.host, session_of(page))
        assert blocks(page) == made
        length = (29 + 32 * (len(made) - 1)) / 24
        assert page.evaluate("video.currentTime") >= length - 0.1  # every boundary is behind the play-head
        ranges = page.evaluate(BUFFERED)
        assert len(ranges) == 1 and ranges[0][1] == pytest.approx(length, abs=0.05)
        assert page.evaluate("window.broken") == 0 and page.evaluate("video.error") is None
        moved = sum("session.moved" in one for one in heard)
        assert len(sockets) == 1 and moved >= kills
        journal = store.journal(session_of(page))
    server: Served = start()
    alone = server.live(prompt=PROMPT, chunks=len(made), seed=journal.meta.seed)
    alone.until("session.done")
    kept = server.store.journal(alone.messages[-1]["session_id"])
    assert [journal.media(index) for index in range(len(made))] == [kept.media(index) for index in range(len(made))]
    return {"killed": kills, "moved": moved, "sockets": len(sockets), "chunks": len(made), "media_errors": 0}


@pytest.mark.slow
def test_a_film_plays_on_while_its_worker_is_killed(process: Process, start: Any, tmp_path: Path) -> None:
    plays_on(process, start, Store(tmp_path / "ray"), 1)


@pytest.mark.long
def test_a_film_plays_on_while_workers_are_killed(
    process: Process, start: Any, tmp_path: Path, figures: dict[str, Any]
) -> None:
    figures |= plays_on(process, start, Store(tmp_path / "ray"), 5)
