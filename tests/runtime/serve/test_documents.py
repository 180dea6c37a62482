"""What docs/serving says is what the server does: interfaces, dashboard, examples."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from serving import PROMPT, Served

from longtake.errors import LongtakeError
from longtake.paths import REPOSITORY
from longtake.runtime.serve.contract import MESSAGES
from longtake.runtime.serve.documents import SENT, asyncapi, openapi
from longtake.runtime.serve.limits import Limits
from longtake.runtime.serve.meters import COUNTERS, GAUGES, HISTOGRAMS, PREFIX

DOCS = REPOSITORY / "docs" / "serving"
MAKE = "python -c 'import json; from longtake.runtime.serve.documents import NAME; print(json.dumps(NAME(), indent=1, sort_keys=True))'"


@pytest.mark.parametrize(("name", "made"), [("openapi", openapi), ("asyncapi", asyncapi)])
def test_the_interfaces_are_as_documented(name: str, made: Any) -> None:
    assert json.loads((DOCS / f"{name}.json").read_text()) == json.loads(json.dumps(made())), MAKE.replace("NAME", name)


def test_every_message_is_documented_and_its_example_accepted(start: Any) -> None:
    """The examples of the AsyncAPI document are played to a server; every answer fits what is said of it."""
    document = json.loads((DOCS / "asyncapi.json").read_text())["channels"]["video"]["messages"]
    assert set(document) == {*MESSAGES, *SENT}
    server = start(pause_s=0.02, limits=Limits(user_sessions=9, grace_s=0.5))
    answers: list[dict[str, Any]] = []

    def example(name: str, **more: Any) -> dict[str, Any]:
        given = dict(document[name]["examples"][0]["payload"])
        given.pop("type")
        return {**given, **more}

    live = server.live(**example("session.start"))
    session = live.until("video.start")["session_id"]
    live.chunk(0)
    for name in (
        "session.pause",
        "session.snapshot",
        "session.continue",
        "session.ping",
        "session.extend",
        "session.interaction",
    ):
        live.send(name, **example(name))
    live.until("session.interaction.queued", ack=True)
    waiting = server.live(prompt=PROMPT, chunks=1)
    waiting.until("session.queued")
    live.chunk(2, ack=True)
    live.send("session.ack", **example("session.ack"))
    live.send("session.playback", **example("session.playback"))
    live.send("session.nothing")
    live.until("error", ack=True)
    live.send("session.stop")
    live.until("session.done", ack=True)
    waiting.until("session.done")
    resumed = server.live(type="session.resume", **example("session.resume", session_id=session, next_chunk=0))
    resumed.until("session.done")
    retaken = server.live(type="session.retake", **example("session.retake", session_id=session, from_chunk=2))
    retaken.until("session.done")
    for one in (live, waiting, resumed, retaken):
        answers += one.messages
    for answer in answers:
        Draft202012Validator(document[answer["type"]]["payload"]).validate(answer)
    assert {answer["type"] for answer in answers} == set(SENT) - {"session.moved"}


def test_the_documented_set_of_vllm_omni(start: Any) -> None:
    """Each of its messages and fields is accepted, or refused by name."""
    server = start(pause_s=0.01)
    first = {
        "model": "", "prompt": PROMPT, "format": "m4s", "width": 128, "height": 128, "fps": 24, "num_frames": 157, "seed": 7,
        "num_inference_steps": 3, "guidance_scale": 1.0, "negative_prompt": "", "size": "128x128", "seconds": "6", "user": "me",
        "streaming_buffer_seconds": 1.25, "guidance_scale_2": None, "boundary_ratio": None, "flow_shift": None, "lora": None,
        "true_cfg_scale": None, "extra_params": None,
    }  # fmt: skip
    live = server.live(**first)
    live.chunk(0)
    interaction = {"event_id": "u1", "event": {"prompt": "night"}, "transition_chunks": 3}
    live.send("session.interaction", interaction=interaction)
    queued = live.until("session.interaction.queued")
    assert queued["event_id"] == "u1" and queued["transition_chunks"] == 0
    live.send("session.ping")
    live.until("session.pong")
    live.send("session.playback", position_seconds=0.5)
    done = live.until("session.done")
    assert (
        done["chunks"] == 5
        and sum(m["num_frames"] for m in live.messages if m["type"] == "video.chunk_metadata") == 157
    )
    for name, value in (
        ("guidance_scale_2", 3.0),
        ("flow_shift", 5.0),
        ("lora", {"path": "x"}),
        ("extra_params", {"a": 1}),
    ):
        refused = server.live(**{**first, name: value})
        error = refused.next()
        assert error["code"] == "unsupported_field" and name in error["message"]


def exposed(text: str) -> dict[str, set[tuple[str, ...]]]:
    """Names in Prometheus text, and the labels of their samples; every line must be one."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            assert re.fullmatch(r"# (HELP|TYPE) \w+ .*", line), line
            continue
        match = re.fullmatch(r'(\w+)(?:\{((?:\w+="(?:[^"\\]|\\.)*",?)*)\})? ([-+0-9.eE]+|\+Inf|NaN)', line)
        assert match, line
        found.setdefault(match[1], set()).add(tuple(re.findall(r"(\w+)=", match[2] or "")))
    return found


def test_metrics_and_the_dashboard(start: Any) -> None:
    server: Served = start(pause_s=0.01, limits=Limits(grace_s=0.1))
    live = server.live(prompt=PROMPT, chunks=3, flow={"mode": "ack", "window": 1})
    session = live.until("video.start")["session_id"]
    live.chunk(0)
    live.interact("e", prompt="snow")
    live.send("session.ack", chunk=0, stalled_ms=20)
    live.chunk(1)
    live.send("session.ack", chunk=0, x=1)
    live.until("error")
    live.close()
    while [one["state"] for one in server.get("/v1/realtime/sessions").json()["data"]] != ["parked"]:
        pass
    server.live(type="session.resume", session_id=session).until("session.done", ack=True)
    server.store.remove(session)
    server.get("/nothing")
    text = server.get("/metrics").text
    found = exposed(text)
    for name, labels in {**{f"{n}_total": ls for n, ls in COUNTERS.items()}, **GAUGES}.items():
        if name != "session_moves_total":  # there is no other worker here
            assert {*labels} == {*next(iter(found[PREFIX + name]))}, name
    assert all(f"{PREFIX}{name}_bucket" in found for name in HISTOGRAMS)
    assert session not in text and "snow" not in text
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"longtake_\w+", target["expr"])
    }
    assert asked <= {*found, f"{PREFIX}session_moves_total"} and len(asked) > 15
    assert {name for name in asked if "moves" in name} == {f"{PREFIX}session_moves_total"}


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
@pytest.mark.parametrize("made", [0, 1])
def test_the_example_with_curl_ends_where_a_video_fails(start: Any, tmp_path: Path, made: int) -> None:
    """The first one, or the take of it."""
    server = start()

    def broken(call: int) -> None:
        if len(list(server.store.all())) > made:
            raise LongtakeError("the toy is broken")

    server.backends[0].hook = broken
    command = ["sh", str(DOCS / "examples" / "curl.sh"), server.url]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "'message': 'the toy is broken'" in done.stderr, done.stderr
    assert [(tmp_path / name).exists() for name in ("curl.mp4", "take.mp4")] == [bool(made), False]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jobs.py", "live.py", "story.py", "curl.sh"])
def test_examples_run(start: Any, tmp_path: Path, name: str) -> None:
    server = start(pause_s=0.005)
    if name == "curl.sh" and shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    url = server.url if name in ("jobs.py", "curl.sh") else server.url.replace("http", "ws")
    command = ["sh" if name.endswith(".sh") else sys.executable, str(DOCS / "examples" / name), url]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    made = {"jobs.py": "video.mp4", "live.py": "live.mp4", "curl.sh": "take.mp4"}
    assert name not in made or (tmp_path / made[name]).stat().st_size > 2000
    assert len((DOCS / "examples" / name).read_text().splitlines()) <= 45
