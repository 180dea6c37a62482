"""Live sessions over a real socket: every message of the contract, and what comes of it."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import av
import httpx
import pytest
from serving import PROMPT, Live, Served, walk

from longtake.runtime.serve.limits import Limits


def shown(data: bytes) -> int:
    """Frames that a player shows of a stream."""
    with av.open(io.BytesIO(data), "r") as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_session_from_start_to_done(server: Served) -> None:
    live = server.live(prompt=PROMPT, num_frames=100, seed=7)
    start = live.until("video.start")
    assert start["format"] == "m4s" and start["mime"].startswith('video/mp4; codecs="avc1.')
    assert start["config"]["num_frames"] == 100 and start["config"]["seed"] == 7 and start["config"]["width"] == 128
    done = live.until("session.done")
    assert live.closed() == 1000
    chunks = [m for m in live.messages if m["type"] == "video.chunk_metadata"]
    assert [c["num_frames"] for c in chunks] == [29, 32, 32, 7] and [c["first_frame"] for c in chunks] == [
        0,
        29,
        61,
        93,
    ]
    assert done["chunks"] == 4 and not done["stopped"] and done["report"]["frames"] == 100
    assert shown(live.bytes()) == 100
    content = server.get(f"/v1/videos/{start['session_id']}/content").content
    assert shown(content) == 100


def test_a_change_lands_where_the_answer_says(start: Any) -> None:
    server = start(pause_s=0.02)
    live = server.live(prompt=PROMPT, chunks=8, flow={"mode": "ack", "window": 2})
    live.chunk(1)
    at = live.interact("e1", prompt="night", cut=True)["at_chunk"]
    assert at == 2 or at == 3
    chunk = live.chunk(at, ack=True)
    assert chunk["prompt"] == "night" and chunk["cut"] and chunk["shot"] == 1
    assert chunk["started_event_ids"] == ["e1"] == chunk["active_event_ids"]
    again = live.interact("e1", prompt="night", cut=True)
    assert again["at_chunk"] == at
    live.send("session.interaction", interaction={"event_id": "e1", "event": {"prompt": "day"}})
    assert live.until("error", ack=True)["code"] == "event_id_conflict"
    live.interact("e2", prompt="dawn")
    chunk = live.until("video.chunk_metadata", ack=True, prompt="dawn")
    assert not chunk["cut"] and chunk["completed_event_ids"] == ["e1"]
    live.close()


def test_the_window_is_kept(start: Any) -> None:
    """Nothing is made further ahead than the window, however slowly the viewer looks."""
    server = start()
    live = server.live(prompt=PROMPT, endless=True, flow={"mode": "ack", "window": 3})
    walk(server, live, window=3, chunks=4, pause_s=0.3)
    live.send("session.ack", chunk=99)
    assert live.until("error")["code"] == "bad_ack"
    live.send("session.stop")
    assert live.until("session.done")["stopped"]


def test_realtime_flow_acknowledges_by_the_media_clock(start: Any) -> None:
    server = start()
    live = server.live(prompt=PROMPT, chunks=4, flow={"mode": "realtime", "window": 1})
    live.until("session.done")
    assert 29 / 24 - 0.3 < live.at[2] - live.at[0] < 29 / 24 + 1.0  # chunk 1 is on the screen once 29 frames were shown


def settled(server: Served, session: str) -> int:
    """Chunks that are there once no more come."""
    count = -1
    while (now := server.store.journal(session).count()) != count:
        count = now
        time.sleep(1.0)
    return count


def test_pause_continue_extend_ping_snapshot(start: Any) -> None:
    server = start(pause_s=0.01)
    live = server.live(prompt=PROMPT, chunks=4, flow={"mode": "ack", "window": 2})
    live.chunk(0)
    live.send("session.pause")
    live.until("session.paused")
    live.send("session.ack", chunk=0)
    live.send("session.ping")
    live.until("session.pong")
    made = settled(server, live.messages[0]["session_id"])
    live.send("session.extend", chunks=2)
    assert live.until("session.extended")["chunks"] == 6
    time.sleep(0.3)
    assert server.store.journal(live.messages[0]["session_id"]).count() == made
    live.send("session.snapshot")
    saved = live.until("session.snapshot.saved")
    assert saved["chunk"] == made
    live.send("session.continue")
    live.until("session.continued")
    live.until("session.done", ack=True)
    assert sorted(live.media) == list(range(6))
    again = server.live(type="session.resume", session_id=saved["snapshot_id"], next_chunk=made)
    again.until("session.done")
    assert again.fragments() == live.fragments(made)


def test_a_session_is_not_made_longer_than_the_limit_bit_by_bit(start: Any) -> None:
    server = start(limits=Limits(session_chunks=6))
    live = server.live(prompt=PROMPT, chunks=4, flow={"mode": "ack", "window": 1})
    live.chunk(0)
    live.send("session.extend", chunks=2)
    assert live.until("session.extended")["chunks"] == 6
    live.send("session.extend", chunks=1)
    assert live.until("error")["code"] == "bad_length"
    live.until("session.done", ack=True)
    assert sorted(live.media) == list(range(6))


def state(server: Served, session: str) -> str:
    (found,) = (one for one in server.get("/v1/realtime/sessions").json()["data"] if one["id"] == session)
    return str(found["state"])


def test_resume_goes_on_byte_for_byte(start: Any, make_toy: Any) -> None:
    server = start(pause_s=0.01, limits=Limits(user_sessions=8, grace_s=0.3))
    whole = server.live(prompt=PROMPT, chunks=6, seed=3)
    whole.until("session.done")
    live = server.live(prompt=PROMPT, chunks=6, seed=3, flow={"mode": "ack", "window": 2})
    session = live.until("video.start")["session_id"]
    live.chunk(1)
    live.drop()
    for _ in range(2):  # at once, and once it is parked
        again = server.live(type="session.resume", session_id=session, next_chunk=0, flow={"mode": "ack", "window": 2})
        again.chunk(1)
        again.drop()
        until = time.monotonic() + 30
        while state(server, session) != "parked":
            assert time.monotonic() < until
            time.sleep(0.05)
    last = server.live(type="session.resume", session_id=session)
    last.until("session.done", ack=True)
    assert last.bytes() == whole.bytes()


def test_a_second_connection_takes_over(start: Any) -> None:
    server = start(pause_s=0.01)
    live = server.live(prompt=PROMPT, endless=True, flow={"mode": "ack"})
    session = live.until("video.start")["session_id"]
    live.chunk(1)
    other = server.live(type="session.resume", session_id=session, next_chunk=1, flow={"mode": "ack"})
    other.chunk(1)
    assert live.until("error")["code"] == "taken_over" and live.closed() == 4409
    other.send("session.ack", chunk=1)
    other.chunk(2)
    other.close()


def test_sessions_in_turn_equal_sessions_alone(start: Any) -> None:
    server = start(slots=3)
    alone = []
    for seed in (1, 2, 3):
        live = server.live(prompt=PROMPT, chunks=5, seed=seed)
        live.until("session.done")
        alone.append(live.bytes())
    together = [server.live(prompt=PROMPT, chunks=5, seed=seed) for seed in (1, 2, 3)]
    for live in together:
        live.until("session.done")
    assert [live.bytes() for live in together] == alone


def test_who_waits_longer_than_sessions_are_kept_is_not_swept_away(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtake.runtime.serve.jobs.EXPIRE_EVERY", 0.1)
    server = start(pause_s=0.02, limits=Limits(user_sessions=8, parked_s=1))
    first = server.live(prompt=PROMPT, endless=True, flow={"mode": "ack", "window": 1})
    first.until("video.start")
    waiting = server.live(prompt=PROMPT, chunks=1)
    waiting.until("session.queued")
    for index in range(8):
        first.chunk(index)
        time.sleep(0.25)
        first.send("session.ack", chunk=index)
    first.close()
    waiting.until("session.done")


def test_a_queue_has_positions(start: Any) -> None:
    server = start(pause_s=0.01)
    first = server.live(prompt=PROMPT, endless=True, flow={"mode": "ack"})
    first.chunk(0)
    second = server.live(prompt=PROMPT, chunks=1)
    queued = second.until("session.queued")
    assert queued["position"] == 0 and queued["estimate_s"] is None  # nobody has given a place back yet
    third = server.live(prompt=PROMPT, chunks=1)
    assert third.until("session.queued")["position"] == 1
    third.send("session.interaction", interaction={"event": {"prompt": "snow"}})
    assert third.until("error")["code"] == "not_started"
    second.send("session.stop")
    assert second.until("session.done")["stopped"]
    assert third.until("session.queued")["position"] == 0
    first.send("session.stop")
    third.until("session.done")
    again = server.live(prompt=PROMPT, endless=True, flow={"mode": "ack"})
    again.chunk(0)
    assert server.live(prompt=PROMPT, chunks=1).until("session.queued")["estimate_s"] > 0


def test_retakes_live(start: Any) -> None:
    server = start(pause_s=0.01)
    live = server.live(prompt=PROMPT, chunks=6, seed=3, flow={"mode": "ack", "window": 1})
    session = live.until("video.start")["session_id"]
    live.chunk(0)
    live.send("session.ack", chunk=0)
    live.interact("e", prompt="snow", cut=True)
    live.until("session.done", ack=True)
    whole = live.bytes()
    same = server.live(type="session.retake", session_id=session, from_chunk=3, next_chunk=0)
    start_message = same.until("video.start")
    assert start_message["config"]["parent"] == session and start_message["config"]["from_chunk"] == 3
    same.until("session.done")
    assert same.bytes() == whole
    other = server.live(type="session.retake", session_id=session, from_chunk=3, next_chunk=0, prompt="rain", cut=True)
    other.until("session.done")
    assert [other.media[i] == live.media[i] for i in range(6)] == [True] * 3 + [False] * 3
    chunks = [m for m in other.messages if m["type"] == "video.chunk_metadata"]
    assert [c["prompt"] for c in chunks][3:] == ["rain"] * 3 and chunks[3]["cut"]
    reseeded = server.live(type="session.retake", session_id=session, from_chunk=0, seed=4)
    reseeded.until("session.done")
    assert all(reseeded.media[i] != live.media[i] for i in range(6))


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/v1/models", "/metrics", "/static/app.js"])
def test_what_is_there(server: Served, path: str) -> None:
    response = server.get(path)
    assert response.status_code == 200
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"


def test_ending_parks_what_runs(start: Any) -> None:
    server = start(pause_s=0.02)
    live = server.live(prompt=PROMPT, endless=True, seed=5, flow={"mode": "ack"})
    session = live.until("video.start")["session_id"]
    live.chunk(1)
    server.end()
    assert live.closed() == 1001
    journal = server.store.journal(session)
    assert journal.end() is None and journal.snapshots()[0][0] == journal.count()
    with pytest.raises(httpx.HTTPError):
        server.get("/health")
    other = start()
    again = Live(other.host, type="session.resume", session_id=session, next_chunk=2, flow={"mode": "ack"})
    again.chunk(2)
    again.close()


@pytest.mark.parametrize("where", ["denoise", "decode"])
def test_a_chunk_that_fails_is_tried_once_more(start: Any, where: str) -> None:
    server = start()
    whole = server.live(prompt=PROMPT, chunks=4, seed=3)
    whole.until("session.done")
    for times in (1, 9):
        live = server.live(prompt=PROMPT, chunks=4, seed=3, flow={"mode": "ack", "window": 2})
        live.chunk(0)
        fail(server.backends[-1], where, times)
        live.send("session.ack", chunk=0)
        if times == 1:
            live.until("session.done", ack=True)
            assert live.fragments() == whole.fragments()
        else:
            error = live.until("error", ack=True)
            assert error["code"] == "chunk_failed" and live.closed() == 1011
            assert server.get("/ready").status_code == 200
            fail(server.backends[-1], where, 0)  # whatever it was is mended: the session goes on
            again = server.live(type="session.resume", session_id=error["request_id"])
            again.until("session.done")
            assert again.fragments() == whole.fragments()


def test_nobody_writes_into_a_session_that_has_failed(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunk before the one that fails may still be on its way to the disk: its viewer resumes at once."""
    from longtake.runtime.serve import journal

    written = journal.fsynced

    def late(path: Path, data: bytes) -> None:
        written(path, data)
        time.sleep(1.0 if path.suffix == ".m4s" else 0)

    def broken(*_: Any) -> None:
        time.sleep(0.2)
        raise RuntimeError("broken")

    server = start()
    live = server.live(prompt=PROMPT, chunks=6, seed=3)
    monkeypatch.setattr(journal, "fsynced", late)
    live.chunk(0)
    server.backends[-1].hook = broken
    error = live.until("error")
    fail(server.backends[-1], "denoise", 0)
    server.live(type="session.resume", session_id=error["request_id"]).until("session.done")


def fail(backend: Any, where: str, times: int) -> None:
    """Make the next `times` passes, or decoded latents, fail."""
    left = [times]

    def broken(*_: Any) -> None:
        if left[0] > 0:
            left[0] -= 1
            raise RuntimeError("broken")

    if where == "denoise":
        backend.hook = broken
    else:
        backend.on_decode = broken
