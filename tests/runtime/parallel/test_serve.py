"""`longtake serve --gpus 2`: a lost rank ends the server with its name; sessions and jobs go on with the next server."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
import pytest
from children import children
from serving import PROMPT, Live, Process

from longtake.commands import serve
from longtake.commands.serve import ModelOptions, opened
from longtake.errors import LongtakeError
from longtake.formats.exported import Export
from longtake.formats.recipe import recipe_named
from longtake.runtime.generator import Generator


def test_what_cannot_be_shared_is_refused_before_anything_is_served(tmp_path: Path) -> None:
    recipe = recipe_named("tiny_w4a16_sm90")
    Export(recipe.onnx_name, "tiny", recipe.precision, recipe.cache, {}, ("red", "two")).write(tmp_path)
    model = ModelOptions(engines=str(tmp_path), device="cpu", force=True)
    with pytest.raises(LongtakeError, match="3 GPUs cannot share the heads of tiny evenly"):
        opened(model, 3, lambda words: None)


@pytest.mark.parametrize("built", (True, False))
def test_ranks_get_the_engines_where_some_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: bool
) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "engines").mkdir()
    if built:
        (tmp_path / "engines" / "bundle.json").touch()
    given: list[Path] = []
    monkeypatch.setattr(serve, "ready", lambda name, backend, say: tmp_path / "onnx")
    monkeypatch.setattr(Generator, "from_engines", lambda engines, *rest, **more: given.append(engines))
    opened(ModelOptions(), 2, lambda words: None)
    assert given == [tmp_path / ("engines" if built else "onnx")]


@pytest.mark.slow  # three processes import torch
def test_a_lost_rank_ends_the_server_and_the_next_one_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = Process(tmp_path / "store", "ranks", log=log)
    live = Live(process.host, prompt=PROMPT, chunks=3, seed=3, flow={"mode": "ack", "window": 1})
    session = live.until("video.start")["session_id"]
    live.chunk(0)
    job = httpx.post(f"{process.url}/v1/videos", json={"prompt": PROMPT, "seed": 9, "seconds": "2"}, timeout=30).json()
    (rank,) = children(process.process.pid)
    os.kill(rank, signal.SIGKILL)
    live.send("session.ack", chunk=0)
    assert process.process.wait(60) != 0
    said = log.read_text()
    assert "the 2 ranks that share this video have lost each other" in said
    assert "rank 1 has ended: exit code -9" in said

    after = Process(tmp_path / "store")
    flow = {"mode": "ack", "window": 1}
    again = Live(after.host, type="session.resume", session_id=session, next_chunk=1, flow=flow)
    again.send("session.ack", chunk=0)
    again.until("session.done", ack=True)
    assert sorted(again.fragments()) == [1, 2]
    until = time.monotonic() + 120
    while (status := httpx.get(f"{after.url}/v1/videos/{job['id']}", timeout=30).json())["status"] != "completed":
        assert status["status"] != "failed" and time.monotonic() < until, status
        time.sleep(0.2)
    assert after.kill(15) == 0
