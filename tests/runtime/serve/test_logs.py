"""The log: JSON lines, in which prompts are what the operator wants them to be."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

import pytest
from serving import PROMPT, Served

from longtake.runtime.serve import logs


@pytest.mark.parametrize("prompts", [False, True])
def test_prompts_are_a_length_and_a_hash_unless_they_are_asked_for(
    start: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, prompts: bool
) -> None:
    monkeypatch.setitem(logs._PROMPTS, "shown", prompts)
    caplog.set_level(logging.INFO, "longtake")
    server: Served = start()
    live = server.live(prompt=PROMPT, chunks=3, flow={"mode": "ack", "window": 1})
    live.chunk(0)
    live.interact("e1", prompt="night over the harbour")
    session = live.until("session.done", ack=True)["session_id"]
    server.end()
    lines = [json.loads(logs.JsonLines().format(record)) for record in caplog.records]
    own = [line for line in lines if line.get("session") == session]
    assert all({"ts", "level", "event"} <= line.keys() for line in lines)
    assert [line["chunk"] for line in own if line["event"] == "chunk"] == [0, 1, 2]
    opened, change = (next(line for line in own if line["event"] == name) for name in ("opened", "change"))
    assert opened["worker"].startswith("local-") and change["chunk"] == 1
    told = {"characters": len(PROMPT), "sha256": hashlib.sha256(PROMPT.encode()).hexdigest()[:8]}
    assert opened["prompt"] == (PROMPT if prompts else told)
    assert ("night over the harbour" in json.dumps(lines)) is prompts
