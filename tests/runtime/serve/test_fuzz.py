"""Bad input, much of it: no answer is a 5xx, no exception is unhandled, other sessions make what they would have made."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import random
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import PROMPT, Live, Served
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from longtake.runtime.serve.contract import MESSAGES
from longtake.runtime.serve.limits import Limits
from longtake.runtime.serve.server import Settings

GOOD: list[dict[str, Any]] = [
    {"type": "session.start", "prompt": PROMPT, "chunks": 2},
    {"type": "session.start", "prompt": PROMPT, "endless": True, "flow": {"mode": "ack", "window": 2}},
    {"type": "session.resume", "session_id": "live_0123456789abcdef", "next_chunk": 0},
    {"type": "session.retake", "session_id": "live_0123456789abcdef", "from_chunk": 0},
    {"type": "session.interaction", "interaction": {"event_id": "e", "event": {"prompt": "snow", "cut": True}}},
    {"type": "session.interaction", "interaction": {"event": {"multi_modal_data": {"camera": {"mode": "target"}}}}},
    {"type": "session.ack", "chunk": 0, "stalled_ms": 3},
    {"type": "session.playback", "position_seconds": 1.5},
    {"type": "session.pause"}, {"type": "session.continue"}, {"type": "session.extend", "chunks": 1},
    {"type": "session.snapshot"}, {"type": "session.stop"}, {"type": "session.ping"},
]  # fmt: skip
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    2**70,
    "",
    "x",
    "\x00",
    "é" * 50,
    [],
    {},
    [1],
    {"a": 1},
    "x" * 5000,
    "nan",
    "../..",
    -0.5,
]


def spoiled(chance: random.Random, message: dict[str, Any]) -> Any:
    """A message with something wrong in it, mostly."""
    made: Any = json.loads(json.dumps(message))
    place = made
    while chance.random() < 0.5 and (inner := [v for v in place.values() if isinstance(v, dict) and v]):
        place = chance.choice(inner)
    what = chance.randrange(5)
    key = chance.choice([*place, "extra", "promt"])
    if what == 0:
        place[key] = chance.choice(ODD)
    elif what == 1:
        place.pop(key, None)
    elif what == 2:
        place[str(chance.choice(ODD))[:50]] = chance.choice(ODD)
    elif what == 3:
        made["type"] = chance.choice([*MESSAGES, "session.nothing", 7, None])
    return made


def sent(socket: Any, chance: random.Random) -> None:
    """One bad frame: JSON, half of it, bytes, or nothing of the kind."""
    message = spoiled(chance, chance.choice(GOOD))
    kind = chance.randrange(12)
    text = json.dumps(message)
    if kind == 0:
        socket.send(text[: chance.randrange(len(text) + 1)])
    elif kind == 1:
        socket.send(text.encode())
    elif kind == 2:
        socket.send("[" * 3000)
    else:
        socket.send(text)


def bad_messages(server: Served, count: int, seed: int) -> Counter[str]:
    """What is answered to so many bad messages: codes of errors, types of the rest."""
    chance, left, answers = random.Random(seed), count, Counter[str]()
    while left > 0:
        with contextlib.suppress(ConnectionClosed, TimeoutError):
            socket = connect(f"ws://{server.host}/v1/realtime/video", max_size=None, compression=None, legacy=True)
            for _ in range(chance.randrange(1, 9)):
                left -= 1
                sent(socket, chance)
                with contextlib.suppress(TimeoutError):
                    while True:
                        answer = socket.recv(0.01)
                        if isinstance(answer, str):
                            told = json.loads(answer)
                            answers[told.get("code", told["type"])] += 1
                            assert told.get("code") != "internal_error", told
            socket.close()
    return answers


@pytest.fixture
def roomy(start: Any) -> Served:
    limits = Limits(
        user_sessions=500, user_jobs=500, grace_s=0.2, messages_per_second=1e6, message_burst=10**6, session_chunks=8
    )
    return start(slots=4, limits=limits)


@pytest.fixture
def no_defects(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No defect is in the log at the end."""
    caplog.set_level(logging.WARNING)
    yield
    found = [record for record in caplog.records if record.exc_info and record.levelno >= logging.ERROR]
    assert not found, found


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def messages(server: Served, count: int) -> dict[str, Any]:
    before = server.live(prompt=PROMPT, chunks=3, seed=5)
    before.until("session.done")
    answers = bad_messages(server, count // 5, 0)
    held = resident()
    answers += bad_messages(server, count - count // 5, 1)
    grown = resident() - held
    assert grown < 50e6
    after = Live(server.host, prompt=PROMPT, chunks=3, seed=5)
    after.until("session.done")
    assert after.bytes() == before.bytes() and server.get("/ready").status_code == 200
    return {"messages": count, "growth_mb": round(grown / 1e6, 1), "answers": dict(answers.most_common())}


@pytest.mark.slow
def test_500_bad_messages(roomy: Served, no_defects: None) -> None:
    messages(roomy, 500)


@pytest.mark.long
def test_5000_bad_messages(roomy: Served, no_defects: None, figures: dict[str, Any]) -> None:
    figures |= messages(roomy, 5000)


def fuzzed(server: Served, cases: int) -> Counter[int]:
    """Answers by status to at least so many generated requests, from each operation as many as it has."""
    schemathesis = pytest.importorskip("schemathesis", reason="pip install 'longtake[dev]'")
    from hypothesis import HealthCheck, Phase, given, seed, settings

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    statuses: Counter[int] = Counter()
    held = 0
    for turn in range(50):
        for operation in operations:

            @seed(turn)
            @settings(max_examples=-(-cases // (5 * len(operations))), deadline=None, database=None, phases=[Phase.generate],
                      suppress_health_check=list(HealthCheck))  # fmt: skip
            @given(case=operation.as_strategy())
            def one(case: Any) -> None:
                response = case.call(base_url=server.url)
                statuses[response.status_code] += 1
                assert response.status_code < 500, (case, response.text)

            one()
        held = held or resident()
        if statuses.total() >= cases:
            break
    assert statuses.total() >= cases and resident() - held < 50e6
    assert server.get("/health").status_code == 200
    return statuses


@pytest.mark.slow
def test_200_cases_from_openapi(roomy: Served, no_defects: None) -> None:
    fuzzed(roomy, 200)


@pytest.mark.long
def test_2000_cases_from_openapi(roomy: Served, no_defects: None, figures: dict[str, Any]) -> None:
    figures |= {"cases": 2000, "answers": {str(status): count for status, count in sorted(fuzzed(roomy, 2000).items())}}


BAD_FIRST = [
    ("{", 4400), ("[]", 4400), ('{"type": "session.ping"}', 4400), ('{"type": "x"}', 4400), ('{"type": "session.start"}', 4400),
    ('{"type": "session.resume", "session_id": "live_0123456789abcdef"}', 4404),
    ('{"type": "session.resume", "session_id": "../../etc"}', 4404),
    ('{"type": "session.start", "prompt": "a", "endless": true}', 4400),
    ('{"type": "session.start", "prompt": "a", "width": 640}', 4400),
    ('{"type": "session.start", "prompt": "a", "format": "webm"}', 4400),
    ('{"type": "session.start", "prompt": "a", "flow": {"mode": "ack", "window": 99}}', 4400),
    ('{"type": "session.start", "prompt": "a", "image_reference": {"image_url": "https://x.example/y.png"}}', 4400),
]  # fmt: skip


@pytest.mark.parametrize(("text", "code"), BAD_FIRST)
def test_bad_first_messages(server: Served, text: str, code: int) -> None:
    live = Live(server.host)
    live.socket.send(text)
    assert live.next()["type"] == "error" and live.closed() == code
    assert not list(server.store.sessions.iterdir()) and server.get("/health").status_code == 200


def test_what_a_running_session_refuses(start: Any) -> None:
    server = start(pause_s=0.02)
    live = server.live(prompt=PROMPT, endless=True, flow={"mode": "ack", "window": 1})
    live.chunk(0)
    refusals = [
        ({"type": "session.nothing"}, "unknown_type"),
        ({"type": "session.start", "prompt": PROMPT}, "already_started"),
        ({"type": "session.ack", "chunk": 0, "chnk": 1}, "unknown_field"),
        ({"type": "session.interaction", "interaction": {"event": {}}}, "bad_request"),
        ({"type": "session.interaction", "interaction": {"event": {"prompt": ""}}}, "bad_prompt"),
        ({"type": "session.interaction", "interaction": {"event": {"prompt": "x" * 9000}}}, "bad_prompt"),
        (
            {
                "type": "session.interaction",
                "interaction": {"event": {"multi_modal_data": {"camera": {"mode": "velocity"}}}},
            },
            "interaction_failed",
        ),
        ({"type": "session.extend", "chunks": 1}, "interaction_failed"),
        ({"type": "session.ack", "chunk": -7}, "bad_request"),
    ]
    for message, code in refusals:
        live.socket.send(json.dumps(message))
        assert live.until("error")["code"] == code, message
    near = next(m for m in live.messages if m.get("code") == "unknown_field")
    assert near["longtake"]["fix"] == "did you mean chunk?"
    live.send("session.ack", chunk=0)
    live.chunk(1)
    for _ in range(60):
        live.send("session.ping")
    assert live.until("error")["code"] == "rate_limited"
    time.sleep(0.5)
    live.socket.send("x" * (100 << 10))
    assert live.until("error", code="too_large")["code"] == "too_large" and live.closed() == 4400


def test_nobody_waits_for_a_first_message(start: Any) -> None:
    server = start(limits=Limits(first_message_s=0.3))
    live = Live(server.host)
    told = live.next()
    assert told["code"] == "idle" and told["longtake"]["fix"] and live.closed() == 4408


def test_a_viewer_who_says_nothing_is_parked(start: Any) -> None:
    server = start(limits=Limits(idle_s=0.5))
    live = server.live(prompt=PROMPT, endless=True, flow={"mode": "ack", "window": 1})
    session = live.until("video.start")["session_id"]
    assert live.until("error")["code"] == "idle" and live.closed() == 4408
    again = server.live(type="session.resume", session_id=session, next_chunk=1, flow={"mode": "ack", "window": 1})
    again.until("video.start")
    again.send("session.ack", chunk=0)
    again.chunk(1)


def token_server(start: Any, tmp_path: Path, **more: Any) -> Served:
    file = tmp_path / "tokens"
    file.write_text("anna:0123456789abcdef\nbela:fedcba9876543210\n")
    return start(token_file=file, **more)


def test_tokens_tickets_and_other_peoples_sessions(start: Any, tmp_path: Path) -> None:
    server = token_server(start, tmp_path)
    anna, bela = ({"authorization": f"Bearer {token}"} for token in ("0123456789abcdef", "fedcba9876543210"))
    for path in ("/v1/videos", "/v1/models", "/v1/realtime/sessions"):
        assert server.get(path).status_code == 401 and server.get(path, headers=anna).status_code == 200
    assert server.post("/v1/videos", json={"prompt": PROMPT}).json()["error"]["code"] == "unauthorized"
    with pytest.raises(InvalidStatus) as refused:
        Live(server.host)
    assert refused.value.response.status_code == 401
    ticket = server.post("/v1/realtime/tickets", headers=anna).json()["ticket"]
    live = Live(server.host, query=f"?ticket={ticket}", prompt=PROMPT, chunks=2)
    session = live.until("video.start")["session_id"]
    live.until("session.done")
    other = Live(server.host, headers=bela, type="session.resume", session_id=session)
    assert other.next()["code"] == "not_found" and other.closed() == 4404
    for path in (f"/v1/videos/{session}", f"/v1/videos/{session}/content"):
        assert server.get(path, headers=bela).status_code == 404 and server.get(path, headers=anna).status_code == 200
    assert server.get("/v1/realtime/sessions", headers=bela).json()["data"] == []
    assert server.get("/metrics").text.count("0123456789abcdef") == 0


def test_more_sockets_than_a_user_may_have_are_refused_before_the_handshake(start: Any, tmp_path: Path) -> None:
    server = token_server(start, tmp_path, limits=Limits(user_sessions=1, user_sockets=2))
    anna, bela = ({"authorization": f"Bearer {token}"} for token in ("0123456789abcdef", "fedcba9876543210"))
    held = [Live(server.host, headers=anna) for _ in range(3)]
    with pytest.raises(InvalidStatus) as refused:
        Live(server.host, headers=anna)
    answer = refused.value.response
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0
    assert json.loads(answer.body)["error"]["code"] == "quota"
    Live(server.host, headers=bela).close()  # others are not concerned
    held.pop().close()
    until = time.monotonic() + 10
    while "longtake_websockets 2.0" not in server.get("/metrics").text and time.monotonic() < until:
        time.sleep(0.05)
    live = Live(server.host, headers=anna, prompt=PROMPT, chunks=1)
    live.until("session.done")


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "evil.example"}, "bad_host"),
        ({"origin": "https://evil.example"}, "bad_origin"),
        ({"origin": "null"}, "bad_origin"),
    ],
)
def test_other_pages_are_kept_out(server: Served, headers: dict[str, str], code: str) -> None:
    answer = server.post("/v1/videos", json={"prompt": PROMPT}, headers=headers)
    assert answer.status_code == 403 and answer.json()["error"]["code"] == code
    with pytest.raises(InvalidStatus) as refused:
        Live(server.host, headers={key.title(): value for key, value in headers.items()})
    assert refused.value.response.status_code == 403
    assert server.get("/", headers={"origin": f"http://{server.host}"}).status_code == 200


def test_an_address_that_others_reach_needs_tokens(tmp_path: Path) -> None:
    from longtake.errors import LongtakeError
    from longtake.runtime.serve.store import Store

    with pytest.raises(LongtakeError, match="whoever reaches this address") as error:
        Settings(host="0.0.0.0").door(Store(tmp_path))
    assert "--token-file" in str(error.value)


ELSEWHERE = [
    "http://192.0.2.1/x.png", "https://longtake.example/x.png", "http://127.0.0.1:1/x.png", "http://[::1]:1/x.png",
    "http://169.254.169.254/latest/meta-data", "http://localhost:1", "//longtake.example/x.png", "ftp://longtake.example/x",
    "file:///etc/passwd", "gopher://127.0.0.1:1/_x", "data:text/plain,http://longtake.example", "/etc/passwd", "\\\\h\\x.png",
    "jar:http://longtake.example!/x", "HTTP://longtake.example", " http://longtake.example",
]  # fmt: skip


def test_no_url_is_ever_fetched(server: Served) -> None:
    """Wherever a picture or clip may be named; this process, in which the server runs, connects to the server only."""
    asked: list[str] = []
    watching = True

    def hook(event: str, words: tuple[Any, ...]) -> None:
        if watching and event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
            asked.append(str(words[-1] if event == "socket.connect" else words[0]))

    sys.addaudithook(hook)
    for url in ELSEWHERE:
        picture = {"image_url": url}
        bodies = [("/v1/videos", {"prompt": PROMPT, name: picture}) for name in ("input_reference", "image_reference")]
        bodies += [("/v1/videos", {"story": {"shots": [{"prompt": PROMPT}], name: url}}) for name in ("image", "clip")]
        bodies += [
            ("/v1/videos/extensions", {"prompt": PROMPT, "video": video}) for video in (url, {"id": url}, picture)
        ]
        for path, body in bodies:
            assert 400 <= server.post(path, json=body).status_code < 500, (path, body)
        live = Live(server.host, prompt=PROMPT, chunks=1, image_reference=picture)
        assert live.next()["code"] == "bad_image" and live.closed() == 4400, url
    watching = False
    place = ("127.0.0.1", server.host.rpartition(":")[0])
    assert asked and all(any(one in each for one in place) for each in asked), {*asked}
    assert not any("'127.0.0.1', 1)" in each for each in asked) and not list(server.store.sessions.iterdir())


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 60000 x 60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_pictures_are_judged_by_their_headers(toy: Any, make_generator: Any, tmp_path: Path) -> None:
    from longtake.runtime.serve.contract import ServeError
    from longtake.runtime.serve.requests import checked_image

    limits = Limits()
    held = resident()
    for data in (bomb(), b"", b"GIF89a" + bytes(100), b"\x89PNG\r\n\x1a\n", b"<svg/>", bytes(1000)):
        with pytest.raises(ServeError) as error:
            checked_image(data, limits, "input_reference")
        assert error.value.code == "bad_image"
    assert resident() - held < 100e6
