"""kill -9 in the middle: everything that was acknowledged is there, and every byte is as if nothing had happened."""

from __future__ import annotations

import random
import time
from pathlib import Path

import httpx
import pytest
from serving import PROMPT, Live, Process


def film(process: Process, video: str) -> bytes:
    until = time.monotonic() + 120
    while (status := httpx.get(f"{process.url}/v1/videos/{video}", timeout=30).json())["status"] != "completed":
        assert status["status"] != "failed" and time.monotonic() < until, status
        time.sleep(0.1)
    return httpx.get(f"{process.url}/v1/videos/{video}/content", timeout=30).content


def changed(live: Live) -> None:
    """Cut at chunk 2, always: it is not begun before chunk 1 was acknowledged."""
    live.chunk(0)
    live.send("session.ack", chunk=0)
    live.chunk(1)
    assert live.interact("e1", prompt="a red two circles", cut=True)["at_chunk"] == 2


def undisturbed(store: Path, model: tuple[str, ...], chunks: int) -> tuple[dict[int, bytes], bytes]:
    process = Process(store, *model)
    live = Live(process.host, prompt=PROMPT, chunks=chunks, seed=3, flow={"mode": "ack", "window": 1})
    changed(live)
    live.until("session.done", ack=True)
    job = httpx.post(f"{process.url}/v1/videos", json={"prompt": PROMPT, "seed": 9, "seconds": "6"}, timeout=30).json()
    content = film(process, job["id"])
    assert process.kill(15) == 0
    return live.fragments(), content


def killed(store: Path, model: tuple[str, ...], chunks: int, kills: int) -> tuple[dict[int, bytes], bytes]:
    """The same with kills: right after a change was acknowledged, then at random moments."""
    chance = random.Random(7)
    process = Process(store, *model)
    live = Live(process.host, prompt=PROMPT, chunks=chunks, seed=3, flow={"mode": "ack", "window": 1})
    session = live.until("video.start")["session_id"]
    changed(live)
    seen = live.fragments()
    for turn in range(kills):
        process.kill()
        process = Process(store, *model)
        flow = {"mode": "ack", "window": 1}
        live = Live(process.host, type="session.resume", session_id=session, next_chunk=len(seen), flow=flow)
        live.send("session.ack", chunk=len(seen) - 1)
        if turn == kills - 1:
            live.until("session.done", ack=True)
        else:
            live.until("video.chunk_metadata", ack=True)
            time.sleep(chance.uniform(0, 0.4))
        seen |= live.fragments()
    job = httpx.post(f"{process.url}/v1/videos", json={"prompt": PROMPT, "seed": 9, "seconds": "6"}, timeout=30).json()
    for _ in range(kills):
        time.sleep(chance.uniform(0.1, 0.8))
        process.kill()
        process = Process(store, *model)
    content = film(process, job["id"])
    assert process.kill(15) == 0
    return seen, content


@pytest.mark.slow  # a process takes seconds to start
def test_a_killed_server_loses_nothing(tmp_path: Path) -> None:
    whole = undisturbed(tmp_path / "a", ("toy",), 5)
    assert killed(tmp_path / "b", ("toy",), 5, 2) == whole


@pytest.mark.slow
def test_a_killed_server_loses_nothing_of_the_real_model(tmp_path: Path) -> None:
    whole = undisturbed(tmp_path / "a", (), 4)
    assert killed(tmp_path / "b", (), 4, 1) == whole


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    process = Process(tmp_path, "slow_toy")
    live = Live(process.host, prompt=PROMPT, endless=True, seed=3, flow={"mode": "ack", "window": 1})
    session = live.until("video.start")["session_id"]
    at = live.interact("e1", prompt="snow")["at_chunk"]
    process.process.send_signal(15)
    while httpx.get(f"{process.url}/ready", timeout=30).status_code == 200:  # until the first one was heard
        time.sleep(0.05)
    assert process.kill(15) == 143
    again = Process(tmp_path, "toy")
    resumed = Live(again.host, type="session.resume", session_id=session, flow={"mode": "ack", "window": 1})
    assert resumed.chunk(at, ack=True)["prompt"] == "snow"  # the first one, if it had not begun when it was asked for
    assert again.kill(2) == 0


@pytest.mark.slow
def test_a_chunk_that_takes_long_holds_up_no_end(tmp_path: Path) -> None:
    """Whoever restarts a server waits 15 s at most: what was acknowledged is on disk, and the chunk is made again."""
    process = Process(tmp_path, "slow_toy")
    live = Live(process.host, prompt=PROMPT, endless=True, seed=3, flow={"mode": "ack", "window": 1})
    session = live.until("video.start")["session_id"]
    at = live.interact("e1", prompt="snow")["at_chunk"]
    begun = time.monotonic()
    assert process.kill(15) == 0 and time.monotonic() - begun < 15
    again = Process(tmp_path, "toy")
    resumed = Live(again.host, type="session.resume", session_id=session, flow={"mode": "ack", "window": 1})
    assert resumed.chunk(at, ack=True)["prompt"] == "snow"
    assert again.kill(2) == 0
